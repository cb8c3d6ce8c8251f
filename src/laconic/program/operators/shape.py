"""Operators that rearrange axes: view, permute, expand, pixel shuffle and their kin."""

from collections.abc import Sequence

from torch import fx

from laconic.program import axes
from laconic.program.axes import Atom, Term, product
from laconic.program.equations import Arguments, Dims, Equations, Row


def view(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Row-major reshape; the sizes asked for follow the axes they stand for."""
    result = reshape(see, node, see.dims(a["self"]), node.meta["shape"])
    if "size" in a or "shape" in a:
        see.sizes(node, "size" if "size" in a else "shape", result)
    return result


def reshape(see: Equations, node: fx.Node, old: Dims, shape: Sequence[int]) -> Dims:
    """Terms of `shape` for the elements of `old` in row-major order."""
    fresh: Dims = tuple(Atom(size) for size in shape)
    if any(size == 0 for size in shape):
        see.freeze(node, "an empty tensor", *old)
        return see.rigid(node, "an empty tensor", *shape)
    result: list[Term] = list(fresh)
    place = 0
    for one, other in axes.stretches(old, fresh):
        wide = [term for term in one if term.size != 1]
        targets = [i for i in range(place, place + len(other)) if fresh[i].size != 1]
        if len(wide) == 1 and len(targets) == 1:
            result[targets[0]] = wide[0]
        elif wide:
            see.same(product(*wide), product(*(fresh[i] for i in targets)), node)
        place += len(other)
    return tuple(result)


def flatten(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """A run of dimensions becomes one."""
    return reshape(see, node, see.dims(a["self"]), node.meta["shape"])


def unflatten(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """One dimension becomes several."""
    result = reshape(see, node, see.dims(a["self"]), node.meta["shape"])
    dim = a["dim"] % len(see.dims(a["self"]))
    see.sizes(node, "sizes", result[dim : dim + len(a["sizes"])])
    return result


def permute(see: Equations, _: fx.Node, a: Arguments) -> Dims:
    """Dimensions in another order."""
    x = see.dims(a["self"])
    return tuple(x[dim] for dim in a["dims"])


def transpose(see: Equations, _: fx.Node, a: Arguments) -> Dims:
    """Two dimensions change places."""
    x = list(see.dims(a["self"]))
    one, other = a["dim0"], a["dim1"]
    if x:
        x[one], x[other] = x[other], x[one]
    return tuple(x)


def last_two(see: Equations, _: fx.Node, a: Arguments) -> Dims:
    """The last two dimensions change places."""
    x = see.dims(a["self"])
    return (*x[:-2], *x[-2:][::-1])


def reverse(see: Equations, _: fx.Node, a: Arguments) -> Dims:
    """All dimensions in reverse order."""
    return see.dims(a["self"])[::-1]


def movedim(see: Equations, _: fx.Node, a: Arguments) -> Dims:
    """Dimensions move to other places."""
    x = see.dims(a["self"])
    source, target = (
        [d % len(x) for d in ([a[name]] if isinstance(a[name], int) else a[name])]
        for name in ("source", "destination")
    )
    rest = iter(term for place, term in enumerate(x) if place not in source)
    moved = {to: x[place] for to, place in zip(target, source, strict=True)}
    return tuple(moved[place] if place in moved else next(rest) for place in range(len(x)))


def squeeze(see: Equations, _: fx.Node, a: Arguments) -> Dims:
    """Dimensions of size one go."""
    x = see.dims(a["self"])
    asked = a.get("dim")
    dims = range(len(x)) if asked is None else [asked] if isinstance(asked, int) else asked
    gone = {dim % len(x) for dim in dims if x[dim].size == 1} if x else set[int]()
    return tuple(term for place, term in enumerate(x) if place not in gone)


def unsqueeze(see: Equations, _: fx.Node, a: Arguments) -> Dims:
    """A dimension of size one comes."""
    x = list(see.dims(a["self"]))
    x.insert(a["dim"] % (len(x) + 1), Atom(1))
    return tuple(x)


def expand(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Dimensions of size one become new axes; the others stay."""
    x = see.dims(a["self"])
    shape, sizes = node.meta["shape"], a.get("size")
    x = (*(Atom(1) for _ in range(len(shape) - len(x))), *x)
    result: list[Term] = []
    for place, (size, term) in enumerate(zip(shape, x, strict=True)):
        symbolic = sizes is None or isinstance(sizes[place], fx.Node)
        if term.size == size:
            result.append(term)
        elif symbolic:
            result += see.rigid(node, "a size of the inputs", size)
        else:
            result.append(Atom(size))
    if sizes is not None:
        see.sizes(node, "size", result)
    return tuple(result)


def expand_as(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Broadcast to the shape of another tensor."""
    return see.broadcast(node, see.dims(a["other"]), see.dims(a["self"]))


def view_as(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Reshape to the shape of another tensor."""
    result = reshape(see, node, see.dims(a["self"]), node.meta["shape"])
    for one, other in zip(result, see.dims(a["other"]), strict=True):
        see.same(one, other, node)
    return result


def repeat(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """The whole tensor over and over: copies x axis."""
    x = see.dims(a["self"])
    argument = "repeats" if "repeats" in a else "dims"
    asked = a[argument]
    x = (*(Atom(1) for _ in range(len(asked) - len(x))), *x)
    copies: list[Term] = []
    for place, entry in enumerate(asked):
        count = node.meta["shape"][place] // x[place].size if x[place].size else 1
        fixed = isinstance(entry, fx.Node)
        copies.append(see.rigid(node, "a size of the inputs", count)[0] if fixed else Atom(count))
    if len(asked) == len(x):
        see.sizes(node, argument, copies)
    return tuple(product(copy, term) for copy, term in zip(copies, x, strict=True))


def repeat_interleave(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Every element over and over: axis x copies."""
    x = list(see.dims(a["self"]))
    repeats, dim = a.get("repeats"), a.get("dim")
    if not isinstance(repeats, int) or dim is None:
        see.freeze(node, "a number of copies that depends on data", *x)
        return see.rigid(node, "depends on data", *node.meta["shape"])
    copies = Atom(repeats)
    see.size(node, "repeats", copies)
    x[dim] = product(x[dim], copies)
    if isinstance(a.get("output_size"), int):
        see.size(node, "output_size", x[dim])
    return tuple(x)


def pixel_shuffle(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """[..., c r r, h, w] → [..., c, h r, w r]."""
    x, factor = see.dims(a["self"]), a["upscale_factor"]
    rows, columns = see.rigid(node, "positions in space", factor, factor)
    channels = Atom(x[-3].size // factor**2)
    see.same(x[-3], product(channels, rows, columns), node)
    return (*x[:-3], channels, product(x[-2], rows), product(x[-1], columns))


def pixel_unshuffle(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """[..., c, h r, w r] → [..., c r r, h, w]."""
    x, factor = see.dims(a["self"]), a["downscale_factor"]
    see.freeze(node, "positions in space are mixed", *x[-2:])
    rows, columns = see.rigid(node, "positions in space", factor, factor)
    places = see.rigid(node, "positions in space", *node.meta["shape"][-2:])
    return (*x[:-3], product(x[-3], rows, columns), *places)


def channel_shuffle(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Channels = groups x rest become rest x groups."""
    x = see.dims(a["self"])
    groups, rest = Atom(a["groups"]), Atom(x[1].size // a["groups"])
    see.same(x[1], product(groups, rest), node)
    see.size(node, "groups", groups)
    return (x[0], product(rest, groups), *x[2:])


ROWS: dict[str, Row] = {
    "aten.view": view,
    "aten.reshape": view,
    "aten._unsafe_view": view,
    "aten.flatten": flatten,
    "aten.unflatten": unflatten,
    "aten.permute": permute,
    "aten.transpose": transpose,
    "aten.swapaxes": lambda see, node, a: transpose(
        see, node, {"self": a["self"], "dim0": a["axis0"], "dim1": a["axis1"]}
    ),
    "aten.t": reverse,
    "aten.numpy_T": reverse,
    "aten.mT": last_two,
    "aten.adjoint": last_two,
    "aten.movedim": movedim,
    "aten.squeeze": squeeze,
    "aten.unsqueeze": unsqueeze,
    "aten.expand": expand,
    "aten.broadcast_to": expand,
    "aten.expand_as": expand_as,
    "aten.view_as": view_as,
    "aten.reshape_as": view_as,
    "aten.repeat": repeat,
    "aten.tile": repeat,
    "aten.repeat_interleave": repeat_interleave,
    "aten.pixel_shuffle": pixel_shuffle,
    "aten.pixel_unshuffle": pixel_unshuffle,
    "aten.channel_shuffle": channel_shuffle,
}
