"""Concatenation and its reverse, and a choice by row: cat, stack, split, chunk, unbind, choose."""

from itertools import accumulate

from torch import fx

from laconic.program.axes import Term, concatenation
from laconic.program.equations import Arguments, Dims, Equations, Row
from laconic.program.rewrites import Sections


def cat(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Along `dim` the axes follow each other; all others are shared."""
    operands = [see.dims(tensor) for tensor in a["tensors"]]
    operands = [dims for dims in operands if len(dims) == len(node.meta["shape"])]
    dim = a["dim"] % len(operands[0])
    result: list[Term] = list(operands[0])
    for place in range(len(result)):
        column = [dims[place] for dims in operands]
        if place == dim:
            result[place] = concatenation(*column)
            continue
        for term in column[1:]:
            see.same(column[0], term, node)
    return tuple(result)


def stack(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """A new axis with one place for each operand."""
    operands = [see.dims(tensor) for tensor in a["tensors"]]
    result = list(see.broadcast(node, *operands))
    dim = a["dim"] % (len(result) + 1)
    result[dim:dim] = see.rigid(node, "one place for each operand", len(operands))
    return tuple(result)


def split(see: Equations, node: fx.Node, a: Arguments) -> list[Dims] | Dims:
    """Consecutive pieces of one axis."""
    x = see.dims(a["self"])
    dim = a["dim"] % len(x)
    sizes = [shape[dim] for shape in node.meta["shape"]]
    if sum(sizes) != x[dim].size or 0 in sizes:
        return ()
    pieces = see.pieces(node, x[dim], list(accumulate(sizes))[:-1])
    if pieces is None:
        pieces = see.rigid(node, "a piece of an axis that cannot be cut there", *sizes)
    else:
        see.rewrite(Sections(node, dim, tuple(pieces)))
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in pieces]


def unbind(see: Equations, node: fx.Node, a: Arguments) -> list[Dims]:
    """One tensor for every index of an axis, which therefore stays."""
    x = see.dims(a["self"])
    dim = a["dim"] % len(x)
    see.freeze(node, "every index is taken apart", x[dim])
    return [(*x[:dim], *x[dim + 1 :])] * x[dim].size


def choose(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Two of one shape, and a row's choice between them: all axes are shared."""
    there = see.dims(a["there"])
    for one, other in zip(there, see.dims(a["otherwise"]), strict=True):
        see.same(one, other, node)
    for row in see.dims(a["rows"]):
        see.same(there[0], row, node)
    return there


ROWS: dict[str, Row] = {
    "aten.cat": cat,
    "aten.concat": cat,
    "aten.stack": stack,
    "aten.split": split,
    "aten.split_with_sizes": split,
    "aten.chunk": split,
    "aten.unsafe_chunk": split,
    "aten.tensor_split": split,
    "aten.unbind": unbind,
    "laconic.choose": choose,
}
