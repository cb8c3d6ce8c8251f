"""Laconic's own operators: a form in front of the operator that uses the weight."""

from torch import fx

from laconic.program.axes import Term, product
from laconic.program.equations import Arguments, Dims, Equations, Row


def quantized(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Axes pass; scale and zero point go with the axis they stand on, if there is one.

    Scales of runs go with the first of the other dimensions where every run is so many whole
    indices of it: those leave together. Elsewhere the runs stay, and what they are cut from.
    """
    dims = see.dims(node.args[0])
    for name in ("scale", "zero_point"):
        side = see.dims(a.get(name))
        if a["axis"] is None or not side:
            continue
        if side[0].size > 1:
            see.same(dims[a["axis"]], side[0], node)
        if len(side) == 2:
            _runs(see, node, dims, side[1], a["axis"])
    return dims


def _runs(see: Equations, node: fx.Node, dims: Dims, runs: Term, axis: int) -> None:
    """Tie the runs of each slice of `axis` to the dimension they are cut from."""
    others = [term for place, term in enumerate(dims) if place != axis % len(dims)]
    if runs.size == 1:
        return
    if not others or others[0].size % runs.size:
        see.freeze(node, "its scales belong to runs of elements", runs, *others)
        return
    first, *rest = others
    see.freeze(node, "a run of elements shares a scale", *rest)
    count = first.size // runs.size
    inner = see.rigid(node, "a run of elements shares a scale", count) if count > 1 else ()
    see.same(first, product(runs, *inner), node)


def passed(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Axes pass; the range is that of whatever is there, zero always included."""
    del node
    return see.dims(a["x"])


def lookup(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Axes pass; books go with the runs of the axis they belong to, and stay whole."""
    dims, (*books, width) = see.dims(a["codes"]), see.dims(a["values"])
    see.freeze(node, "codes point into it", width)
    for book in books:
        axis, group = dims[a["axis"]], a["group"]
        if axis.size == book.size * group:
            run = see.rigid(node, "slices share a book", group) if group > 1 else ()
            see.same(axis, product(book, *run), node)
        else:
            see.freeze(node, "the last book has fewer slices", axis, book)
    return dims


def combine(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Coefficients `[rank]`, basis `[rank, *shape]` → `[*shape]`; the rank stays."""
    rank, *dims = see.dims(a["basis_"])
    see.freeze(node, "every coefficient belongs to one tensor of the basis", rank)
    see.freeze(node, "every tensor of the basis has one coefficient", *see.dims(a["coefficients"]))
    return tuple(dims)


def whole(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Runs of elements, or buckets, that belong to positions: every size stays."""
    for value in a.values():
        see.freeze(node, "what is stored belongs to positions", *see.dims(value))
    return see.rigid(node, "what is stored belongs to positions", *node.meta["shape"])


def member(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """`[rows of all models, ...]` → `[rows of one, ...]`."""
    why = "several models are stored together"
    rows, *dims = see.dims(a["rows"])
    see.freeze(node, why, rows)
    kept = see.rigid(node, why, node.meta["shape"][0]) if a["sizes"] else ()
    result = (*kept, *dims)
    for one, other in zip(result, see.dims(a["base"]), strict=False):
        see.same(one, other, node)
    return result


ROWS: dict[str, Row] = {
    "laconic.fake_quantize": quantized,
    "laconic.dequantize": quantized,
    "laconic.fake_levels": quantized,
    "laconic.levels": quantized,
    "laconic.dynamic_quantize": passed,
    "laconic.lookup": lookup,
    "laconic.combine": combine,
    "laconic.vectors": whole,
    "laconic.hashed": whole,
    "laconic.member": member,
}
