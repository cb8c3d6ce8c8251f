"""Convolutions, grouped, depthwise and transposed ones included.

With groups: out = G x Og, channels in = G x Ig, and the number of groups is the size of G, so that
whole groups and channels within every group shrink independently. Multiply-adds: one per output
element and weight that reaches it (transposed: per input element); biases are not counted.
"""

from torch import fx

from laconic.program.axes import Atom, Term, product
from laconic.program.equations import Arguments, Dims, Equations, Row


def convolution(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Input [n, in, ...], weight [out, in/groups, ...], bias [out] → [n, out, ...]."""
    x, weight = see.dims(a["input"]), see.dims(a["weight"])
    space = len(weight) - 2
    batch, channels = x[: -space - 1], x[-space - 1]
    out = _grouped(see, node, a, channels, weight[0], weight[1])
    _describe(see, node, a, weight[0], producer=0, consumer=1)
    see.freeze(node, "positions in space are mixed", *x[-space:], *weight[2:])
    places = see.rigid(node, "positions in space", *node.meta["shape"][-space:])
    see.count(node, *batch, out, *places, *weight[1:])
    return (*batch, out, *places)


def transposed(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Input [n, in, ...], weight [in, out/groups, ...], bias [out] → [n, out, ...]."""
    x, weight = see.dims(a["input"]), see.dims(a["weight"])
    space = len(weight) - 2
    batch, channels = x[: -space - 1], x[-space - 1]
    out: Term = Atom(weight[1].size * a["groups"])
    _grouped(see, node, a, out, weight[0], weight[1])
    see.same(channels, weight[0], node)
    _describe(see, node, a, out, producer=1, consumer=0)
    see.freeze(node, "positions in space are mixed", *x[-space:], *weight[2:])
    places = see.rigid(node, "positions in space", *node.meta["shape"][-space:])
    see.count(node, *batch, channels, *x[-space:], *weight[1:])
    return (*batch, out, *places)


def general(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """`aten.convolution`, which is either."""
    return transposed(see, node, a) if a["transposed"] else convolution(see, node, a)


def _grouped(
    see: Equations, node: fx.Node, a: Arguments, shared: Term, outer: Term, inner: Term
) -> Term:
    """State shared = G x inner and outer = G x rest; `outer` is the weight's first axis."""
    groups = a["groups"]
    if groups == 1:
        see.same(shared, inner, node)
        return outer
    count = Atom(groups, hint="groups")
    see.same(shared, product(count, inner), node)
    see.same(outer, product(count, Atom(outer.size // groups, hint="per_group")), node)
    see.hint(inner, "per_group")
    see.size(node, "groups", count)
    return outer


def _describe(
    see: Equations, node: fx.Node, a: Arguments, out: Term, producer: int, consumer: int
) -> None:
    if see.dims(a["bias"]):
        see.same(out, see.dims(a["bias"])[0], node)
    depthwise = a["groups"] > 1 and see.dims(a["weight"])[0].size == a["groups"]
    see.role(a["weight"], producer, "parameter" if depthwise and producer == 0 else "producer")
    see.role(a["weight"], consumer, "consumer")
    for dim in range(2, len(see.dims(a["weight"]))):
        see.role(a["weight"], dim, "kernel")


ROWS: dict[str, Row] = {"aten.convolution": general}
ROWS.update({f"aten.conv{n}d": convolution for n in (1, 2, 3)})
ROWS.update({f"aten.conv_transpose{n}d": transposed for n in (1, 2, 3)})
