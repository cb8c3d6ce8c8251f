"""Operators that pick elements: slice, select, index, gather, embedding, roll, pad."""

from typing import Any

from torch import fx

from laconic.program.axes import Atom, Term, concatenation, product, rigid
from laconic.program.equations import Arguments, Dims, Equations, Row

_INDEXED = "indices are picked by number"


def slice_(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """A run of an axis, cut out of it; with a step, one place in every run of `step`."""
    x = list(see.dims(a["self"]))
    dim = a["dim"] % len(x)
    size, step = x[dim].size, a["step"] or 1
    start, end = _bound(a["start"], 0, size), _bound(a["end"], size, size)
    if start is None or end is None:
        see.freeze(node, "bounds that depend on the inputs", x[dim])
        x[dim] = see.rigid(node, "bounds that depend on the inputs", node.meta["shape"][dim])[0]
        return tuple(x)
    if step != 1:
        x[dim] = _strided(see, node, a, x[dim], start, end)
        return tuple(x)
    end = max(start, end)
    cuts = sorted({start, end} - {0, size})
    pieces = see.pieces(node, x[dim], cuts) if start < end else None
    if pieces is None:
        see.freeze(node, "cannot be cut there", x[dim])
        x[dim] = see.rigid(node, "cannot be cut there", end - start)[0]
        return tuple(x)
    before, inside = (pieces[:1], pieces[1]) if start else ([], pieces[0])
    if start:
        see.size(node, "start", before[0])
    if end < size or isinstance(a["end"], int) and 0 < a["end"] <= size:
        see.size(node, "end", concatenation(*before, inside))
    x[dim] = inside
    return tuple(x)


def _bound(value: Any, default: int, size: int) -> int | None:
    if value is None:
        return default
    if not isinstance(value, int):
        return None
    return min(max(value + size if value < 0 else value, 0), size)


def _strided(see: Equations, node: fx.Node, a: Arguments, term: Term, start: int, end: int) -> Term:
    """Every `step`-th place of the whole axis: axis = runs x step."""
    step, count = a["step"], node.meta["shape"][a["dim"] % len(node.meta["shape"])]
    if rigid(term) or term.size % step or start >= step or end != term.size:
        see.freeze(node, "a step that does not divide it", term)
        return see.rigid(node, "a step", count)[0]
    runs = Atom(term.size // step)
    see.same(term, product(runs, see.rigid(node, _INDEXED, step)[0]), node)
    if isinstance(a["end"], int) and 0 < a["end"] <= term.size:
        see.size(node, "end", term)
    return runs


def narrow(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """`length` places from `start`."""
    x = list(see.dims(a["self"]))
    see.freeze(node, _INDEXED, x[a["dim"]])
    x[a["dim"]] = see.rigid(node, _INDEXED, node.meta["shape"][a["dim"]])[0]
    return tuple(x)


def select(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """One index of an axis, which therefore stays."""
    x = list(see.dims(a["self"]))
    see.freeze(node, _INDEXED, x.pop(a["dim"]))
    return tuple(x)


def index(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Advanced indexing: indexed axes stay, the others pass."""
    x, entries = see.dims(a["self"]), list(a["indices"])
    if any(e is not None and str(e.meta["dtype"]) in _MASKS for e in entries):
        see.freeze(node, "picked by a mask", *x)
        return see.rigid(node, "picked by a mask", *node.meta["shape"])
    entries += [None] * (len(x) - len(entries))
    used = [place for place, entry in enumerate(entries) if entry is not None]
    see.freeze(node, _INDEXED, *(x[place] for place in used))
    picked = see.broadcast(node, *(see.dims(entries[place]) for place in used))
    rest = [term for place, term in enumerate(x) if place not in used]
    together = used == list(range(used[0], used[0] + len(used)))
    front = used[0] if together else 0
    return (*rest[:front], *picked, *rest[front:])


_MASKS = ("torch.bool", "torch.uint8")


def index_select(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Rows of one axis by number."""
    x = list(see.dims(a["self"]))
    see.freeze(node, _INDEXED, x[a["dim"]])
    x[a["dim"]] = (*see.dims(a["index"]), Atom(1))[0]
    return tuple(x)


def gather(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Elements of one axis by number, element by element of the others."""
    x, found = see.dims(a["self"]), see.dims(a["index"])
    dim = a["dim"] % len(x)
    for place, (one, other) in enumerate(zip(x, found, strict=True)):
        if place == dim or one.size != other.size:
            see.freeze(node, _INDEXED, one, *([] if place == dim else [other]))
        else:
            see.same(one, other, node)
    return found


def embedding(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Rows of weight [count, width] by number; the width may shrink, the rows may not."""
    weight = see.dims(a["weight"])
    see.freeze(node, "rows are looked up by number", weight[0])
    see.role(a["weight"], 1, "producer")
    return (*see.dims(a["indices"]), weight[1])


def overwrite(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """A slice or an index of `self` is replaced by `src`; that axis stays."""
    x = see.dims(a["self"])
    dim, source = a["dim"] % len(x), see.dims(a["src"])
    rest = x if len(source) == len(x) else (*x[:dim], *x[dim + 1 :])
    see.freeze(node, _INDEXED, x[dim])
    for one, other in zip(rest, source, strict=False):
        see.same(one, other, node)
    return x


def copy(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """The values of `src` in the shape of `self`."""
    return see.broadcast(node, see.dims(a["self"]), see.dims(a["src"]))


def index_put(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Elements at given places are replaced; every axis stays."""
    x = see.dims(a["self"])
    see.freeze(node, _INDEXED, *x, *see.dims(a["values"]))
    return x


def roll(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Axes are turned or mirrored: their order matters."""
    x = see.dims(a["self"])
    dims = a["dims"] if a["dims"] else range(len(x))
    see.freeze(node, "order along it matters", *(x[dim] for dim in dims))
    return x


def ordered(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Operators for which order along one axis matters, and that keep its size."""
    x = see.dims(node.args[0])
    see.freeze(node, "order along it matters", *([x[a["dim"]]] if x else []))
    return x


def triangle(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """tril, triu: the last two axes are compared by number."""
    x = see.dims(a["self"])
    see.freeze(node, "rows and columns are compared by number", *x[-2:])
    return x


def diff(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Differences of neighbours."""
    x = list(see.dims(a["self"]))
    see.freeze(node, "order along it matters", x[a["dim"]])
    x[a["dim"]] = see.rigid(node, "differences", node.meta["shape"][a["dim"]])[0]
    return tuple(x)


def pad(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Constant padding: before + axis + after; any other mode needs the axis as it is."""
    x, asked = list(see.dims(a["self"])), list(a["pad"])
    constant = a.get("mode", "constant") == "constant"
    terms: list[Term | None] = [None] * len(asked)
    for place in range(len(asked) // 2):
        dim = len(x) - 1 - place
        sides = asked[2 * place : 2 * place + 2]
        new = node.meta["shape"][dim]
        if sides == [0, 0]:
            continue
        plain = constant and all(isinstance(side, int) and side >= 0 for side in sides)
        if not plain or rigid(x[dim]):
            see.freeze(node, "padded", x[dim])
            x[dim] = see.rigid(node, "padded", new)[0]
            continue
        before, after = Atom(sides[0]), Atom(sides[1])
        terms[2 * place], terms[2 * place + 1] = before, after
        x[dim] = concatenation(before, x[dim], after)
    see.sizes(node, "pad", terms)
    return tuple(x)


def spectrum(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Fourier transforms mix all places of an axis, which therefore stays."""
    x = list(see.dims(a["self"]))
    asked = a.get("dim")
    dims = range(len(x)) if asked is None else [asked] if isinstance(asked, int) else asked
    for dim in dims:
        see.freeze(node, "all places along it are mixed", x[dim])
        x[dim] = see.rigid(node, "frequencies", node.meta["shape"][dim])[0]
    return tuple(x)


def unfold(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Windows along one axis, as a new last dimension."""
    x = list(see.dims(a["self"]))
    dim = a["dimension"] % len(x)
    see.freeze(node, "windows along it", x[dim])
    x[dim], last = see.rigid(node, "windows", node.meta["shape"][dim], a["size"])
    return (*x, last)


ROWS: dict[str, Row] = {
    "aten.slice": slice_,
    "aten.narrow": narrow,
    "aten.select": select,
    "aten.index": index,
    "aten.index_select": index_select,
    "aten.gather": gather,
    "aten.embedding": embedding,
    "aten.slice_scatter": overwrite,
    "aten.select_scatter": overwrite,
    "aten.copy": copy,
    "aten.index_put": index_put,
    "aten.roll": roll,
    "aten.flip": roll,
    "aten.cumsum": ordered,
    "aten.cumprod": ordered,
    "aten.tril": triangle,
    "aten.triu": triangle,
    "aten.diff": diff,
    "aten.pad": pad,
    "aten.constant_pad_nd": pad,
    "aten.unfold": unfold,
}
_SPECTRA = "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn"
ROWS.update({f"aten.fft_{name}": spectrum for name in _SPECTRA.split()})
