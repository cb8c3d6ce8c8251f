"""All calibration batches on their way through a graph together, weights changing behind them.

Solvers that work front to back (refits, recalibration) need at every operator the values that the
part of the network already worked on gives. Going through the network once, with all batches side
by side, costs one forward pass instead of one for every operator.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from laconic.program.program import Program
from laconic.statistics.walk import Order, Walk

MEMORY = 3 * 2**30
"""Bytes that the values under way may take together."""


class Convoy:
    """One walk per batch, all at the same node."""

    def __init__(self, program: Program, batches: Iterable[Sequence[Tensor]]) -> None:
        self.order = Order(program)
        self._walks = [Walk(program, batch, self.order) for batch in batches]

    def __len__(self) -> int:
        return len(self._walks)

    def __iter__(self) -> Iterator[Walk]:
        return iter(self._walks)

    @torch.no_grad()
    def before(self, node: fx.Node, hold: Iterable[fx.Node] = ()) -> None:
        """Bring every batch to just before `node`."""
        for walk in self._walks:
            walk.run(self.order.place[node], hold=hold)

    @torch.no_grad()
    def past(self, node: fx.Node, hold: Iterable[fx.Node] = ()) -> None:
        """Bring every batch past `node`; the values of `hold` stay."""
        held = [node, *hold]
        for walk in self._walks:
            walk.run(self.order.place[node] + 1, hold=held)

    def forget(self, node: fx.Node) -> None:
        """Drop a value that was held, unless a later node needs it anyway."""
        for walk in self._walks:
            if self.order.last_use[node] < walk.next:
                walk.values.pop(node, None)


def sample_bytes(program: Program) -> int:
    """Most bytes that one sample's values under way take, from the example's shapes."""
    order, live, largest = Order(program), 0, 0
    for place, node in enumerate(order.nodes):
        live += _size(node)
        largest = max(largest, live)
        live -= sum(_size(dead) for dead in order.dead_after.get(place, ()))
    return largest // max(program.batch_size(), 1)


def affordable(program: Program, walks: int = 1, memory: int = MEMORY) -> int:
    """How many samples may be under way at once in `walks` convoys; at least 8."""
    return max(memory // max(walks * sample_bytes(program), 1), 8)


def _size(node: fx.Node) -> int:
    if node.op == "get_attr" or node.op == "output":
        return 0
    return _bytes(node.meta.get("shape"), node.meta.get("dtype"))


def _bytes(shape: Any, dtype: Any) -> int:
    if isinstance(dtype, tuple):
        return sum(_bytes(s, d) for s, d in zip(shape, dtype, strict=True))
    return prod(shape) * dtype.itemsize if isinstance(dtype, torch.dtype) else 0
