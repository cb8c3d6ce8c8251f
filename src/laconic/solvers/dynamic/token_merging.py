"""Fewer tokens behind a layer, as plain operators: merged in pairs, dropped, or dropped into one.

Every token has a weight: how many tokens of the input it stands for; those of padding have none.
The weights of a sample keep their sum. All shapes but the batch are fixed and nothing is scattered
(each token that moves is a row of a small one-hot matrix), so every runtime has these operators.
"""

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from laconic.program.program import Program
from laconic.solvers.dynamic.token_layers import Layer

By = Literal["merge", "drop", "fuse"]
_TINY = 1e-12
_NOTHING = 1e-30  # its logarithm hides a key, and is finite
_ATEN: Any = torch.ops.aten


class Writer:
    """Puts operators in front of a node."""

    def __init__(self, program: Program, before: fx.Node, origin: str) -> None:
        """`origin`: the module path they are said to come from."""
        self._graph, self._before, self._origin = program.graph, before, origin
        tensors = (tensor.device for _, tensor in program.tensors())
        self._device = next(tensors, torch.device("cpu"))

    def __call__(self, target: Any, *args: Any, **options: Any) -> fx.Node:
        """The node of one operator."""
        with self._graph.inserting_before(self._before):
            made = self._graph.call_function(target, args, options)
        made.meta = {"origin": self._origin}
        return made

    def rows(self, x: fx.Node, index: fx.Node, width: int) -> fx.Node:
        """Rows `index [batch, r]` of `x [batch, n, width]`."""
        spread = self(_ATEN.unsqueeze.default, index, -1)
        if width > 1:
            spread = self(_ATEN.expand.default, spread, [-1, -1, width])
        return self(_ATEN.gather.default, x, 1, spread)

    def run(self, x: fx.Node, start: int, end: int, step: int = 1, dim: int = 1) -> fx.Node:
        """Places `start` to `end` of a dimension."""
        return self(_ATEN.slice.Tensor, x, dim, start, end, step)

    def places(self, count: int) -> fx.Node:
        """0 to `count`, as a column."""
        line = self(_ATEN.arange.default, count, device=self._device, pin_memory=False)
        return self(_ATEN.unsqueeze.default, line, 1)


@dataclass(frozen=True)
class Reduction:
    """What happens behind one layer.

    Attributes:
        layer: where.
        tokens: how many arrive.
        lead: leading tokens that are read by number (class tokens): they stay as they are.
        removed: how many go.
        width: channels of the stream.
    """

    layer: Layer
    tokens: int
    lead: int
    removed: int
    width: int

    @property
    def left(self) -> int:
        """How many tokens there are behind it."""
        return self.tokens - self.removed


def most(by: By, tokens: int, lead: int) -> int:
    """How many tokens a layer can lose at most.

    >>> most("merge", 9, 1), most("drop", 9, 1)
    (4, 7)
    """
    rest = tokens - lead
    return max(0, rest // 2 if by == "merge" else rest - 1)


def reduce(
    write: Writer, by: By, x: fx.Node, weight: fx.Node | None, here: Reduction
) -> tuple[fx.Node, fx.Node | None]:
    """The stream with fewer tokens, and their weights.

    Args:
        write: puts the operators in place.
        by: "merge": alternate tokens look for the most similar other one, and the most similar
            pairs become their mean (bipartite soft matching); "drop": those that attention looks at
            least go; "fuse": those become one token.
        x: the stream `[batch, tokens, width]`.
        weight: `[batch, tokens]`, or None where all weigh the same.
        here: how many go.
    """
    lead = write.run(x, 0, here.lead) if here.lead else None
    rest = write.run(x, here.lead, here.tokens) if here.lead else x
    own = None if weight is None else write.run(weight, here.lead, here.tokens)
    made, now = _merged(write, x, rest, own, here) if by == "merge" else _kept(
        write, by, weight, rest, own, here
    )  # fmt: skip
    if lead is not None:
        made = write(_ATEN.cat.default, [lead, made], 1)
        if now is not None:
            first = now if weight is None else weight
            ones = write.run(first, 0, here.lead)
            if weight is None:
                ones = write(_ATEN.ones_like.default, ones)
            now = write(_ATEN.cat.default, [ones, now], 1)
    return made, now


# merging ------------------------------------------------------------------------------------


def _merged(
    write: Writer, x: fx.Node, rest: fx.Node, weight: fx.Node | None, here: Reduction
) -> tuple[fx.Node, fx.Node]:
    """Of the tokens at even places the most similar go, each into its partner at an odd place."""
    count = here.tokens - here.lead
    many, few = (count + 1) // 2, count // 2
    even, odd = (write.run(rest, start, count, 2) for start in (0, 1))
    sides = _directions(write, x, here)
    turned = write(_ATEN.transpose.int, sides[1], -2, -1)
    likeness = write(_ATEN.matmul.default, sides[0], turned)
    heavy = light = None
    if weight is not None:
        heavy, light = (write.run(weight, start, count, 2) for start in (0, 1))
        empty = write(_ATEN.unsqueeze.default, write(_ATEN.le.Scalar, light, 0), 1)
        likeness = write(_ATEN.masked_fill.Scalar, likeness, empty, -2.0)  # padding attracts nobody
    best = write(_ATEN.amax.default, likeness, [-1])
    partner = write(_ATEN.argmax.default, likeness, -1)
    if heavy is not None:
        best = _padding_first(write, best, heavy, many)
    order = _order(write, best, many)
    gone = write.run(order, 0, here.removed)
    stays = write.run(order, here.removed, many)
    goal = write(_ATEN.gather.default, partner, 1, gone)
    line = write(_ATEN.unsqueeze.default, goal, 1)
    onto = write(_ATEN.eq.Tensor, line, write.places(few))
    onto = write(_ATEN.to.dtype, onto, here.layer.total.meta["dtype"])
    moved = write.rows(even, gone, here.width)
    if heavy is None or light is None:
        added = write(_ATEN.sum.dim_IntList, onto, [-1])
        total = write(_ATEN.add.Scalar, added, 1.0)
        stay_weight = write.run(write(_ATEN.ones_like.default, best), here.removed, many)
    else:
        carried = write(_ATEN.gather.default, heavy, 1, gone)
        column = write(_ATEN.unsqueeze.default, carried, -1)
        moved = write(_ATEN.mul.Tensor, moved, column)
        added = write(_ATEN.squeeze.dim, write(_ATEN.matmul.default, onto, column), -1)
        total = write(_ATEN.add.Tensor, light, added)
        odd = write(_ATEN.mul.Tensor, odd, write(_ATEN.unsqueeze.default, light, -1))
        stay_weight = write(_ATEN.gather.default, heavy, 1, stays)
    both = write(_ATEN.add.Tensor, odd, write(_ATEN.matmul.default, onto, moved))
    divided = write(_ATEN.unsqueeze.default, write(_ATEN.clamp_min.default, total, _TINY), -1)
    mean = write(_ATEN.div.Tensor, both, divided)
    unmoved = write.rows(even, stays, here.width)
    return (
        write(_ATEN.cat.default, [unmoved, mean], 1),
        write(_ATEN.cat.default, [stay_weight, total], 1),
    )


def _directions(write: Writer, x: fx.Node, here: Reduction) -> list[fx.Node]:
    """Unit vectors of even and odd tokens: mean keys of all heads, or the stream itself."""
    metric = x
    if here.layer.keys is not None:
        metric = write(_ATEN.mean.dim, here.layer.keys, [1])
    squares = write(_ATEN.mul.Tensor, metric, metric)
    norm = write(_ATEN.sum.dim_IntList, squares, [-1], True)
    scale = write(_ATEN.rsqrt.default, write(_ATEN.add.Scalar, norm, _TINY))
    unit = write(_ATEN.mul.Tensor, metric, scale)
    return [write.run(unit, here.lead + start, here.tokens, 2) for start in (0, 1)]


def _padding_first(write: Writer, best: fx.Node, weight: fx.Node, count: int) -> fx.Node:
    """Scores (cosines) in which tokens without weight stand above all others, the last first.

    No two of them are equal: runtimes order equals differently.
    """
    line = write(_ATEN.squeeze.dim, write.places(count), 1)
    above = write(_ATEN.add.Scalar, write(_ATEN.to.dtype, line, torch.float32), 2.0)
    return write(_ATEN.where.self, write(_ATEN.le.Scalar, weight, 0), above, best)


def _order(write: Writer, score: fx.Node, count: int) -> fx.Node:
    """Places by falling score: `[batch, count]`."""
    ranked = write(_ATEN.topk.default, score, count, -1, True, True)
    return write(operator.getitem, ranked, 1)


# dropping -----------------------------------------------------------------------------------


def _kept(
    write: Writer,
    by: By,
    weight: fx.Node | None,
    rest: fx.Node,
    own: fx.Node | None,
    here: Reduction,
) -> tuple[fx.Node, fx.Node | None]:
    """The tokens that attention looks at; with "fuse" the mean of the others behind them."""
    count = here.tokens - here.lead
    looked = _looked_at(write, weight, here)
    order = _order(write, looked, count)
    fused = by == "fuse"
    left = count - here.removed - fused
    stays, gone = write.run(order, 0, left), write.run(order, left, count)
    kept = write.rows(rest, stays, here.width)
    if not fused and own is None:
        return kept, None
    if own is None:
        own = write(_ATEN.ones_like.default, looked)
    held = write(_ATEN.gather.default, own, 1, stays)
    if not fused:
        whole, part = (write(_ATEN.sum.dim_IntList, one, [-1], True) for one in (own, held))
        share = write(_ATEN.div.Tensor, whole, write(_ATEN.clamp_min.default, part, _TINY))
        return kept, write(_ATEN.mul.Tensor, held, share)
    lost = write(_ATEN.gather.default, own, 1, gone)
    worth = write(_ATEN.gather.default, looked, 1, gone)
    worth = write(_ATEN.clamp_min.default, write(_ATEN.mul.Tensor, worth, lost), _TINY)
    parts = write.rows(rest, gone, here.width)
    row = write(_ATEN.matmul.default, write(_ATEN.unsqueeze.default, worth, 1), parts)
    divisor = write(_ATEN.unsqueeze.default,
                    write(_ATEN.sum.dim_IntList, worth, [-1], True), -1)  # fmt: skip
    mean = write(_ATEN.div.Tensor, row, divisor)
    sums = write(_ATEN.sum.dim_IntList, lost, [-1], True)
    return (
        write(_ATEN.cat.default, [kept, mean], 1),
        write(_ATEN.cat.default, [held, sums], 1),
    )


def _looked_at(write: Writer, weight: fx.Node | None, here: Reduction) -> fx.Node:
    """How much attention each token gets, mean over heads: `[batch, tokens - lead]`.

    It is that of the first class token; where there is none, that of the mean of all queries.
    """
    queries, keys = here.layer.queries, here.layer.keys
    assert queries is not None and keys is not None
    if here.lead:
        asks = write.run(queries, 0, 1, dim=2)
    elif weight is None:
        asks = write(_ATEN.mean.dim, queries, [2], True)
    else:
        column = write(_ATEN.unsqueeze.default, write(_ATEN.unsqueeze.default, weight, 1), -1)
        asks = write(_ATEN.mul.Tensor, queries, column)
        asks = write(_ATEN.sum.dim_IntList, asks, [2], True)
        total = write(_ATEN.clamp_min.default,
                      write(_ATEN.sum.dim_IntList, column, [2], True), _TINY)  # fmt: skip
        asks = write(_ATEN.div.Tensor, asks, total)
    turned = write(_ATEN.transpose.int, keys, -2, -1)
    scores = write(_ATEN.matmul.default, asks, turned)
    scores = write(_ATEN.mul.Scalar, scores, here.layer.scale)
    if weight is not None:
        scores = write(_ATEN.add.Tensor, scores, logarithm(write, weight, 4))
    shares = write(_ATEN.softmax.int, scores, -1)
    mean = write(_ATEN.mean.dim, shares, [1, 2])
    return write.run(mean, here.lead, here.tokens) if here.lead else mean


# what weights do behind it ------------------------------------------------------------------


def logarithm(write: Writer, weight: fx.Node, dimensions: int) -> fx.Node:
    """What is added to attention's products: `[batch, 1, ..., tokens]` of so many dimensions."""
    bias = write(_ATEN.log.default, write(_ATEN.clamp_min.default, weight, _NOTHING))
    for _ in range(dimensions - 2):
        bias = write(_ATEN.unsqueeze.default, bias, 1)
    return bias


def weighed(
    write: Writer, value: fx.Node, rank: int, weight: fx.Node, place: int, scale: float
) -> fx.Node:
    """A value times the weights of its tokens, dimension `place` of `rank`, times a number."""
    own = weight if scale == 1.0 else write(_ATEN.mul.Scalar, weight, scale)
    for dim in range(1, rank):
        if dim != place:
            own = write(_ATEN.unsqueeze.default, own, dim)
    return write(_ATEN.mul.Tensor, value, own)
