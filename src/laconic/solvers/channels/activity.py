"""How active the indices of groups are while a Program trains, where the next layers read them.

A training step gives the watched values as further outputs, each batch gives every channel a score,
and the mean over batches counts. A group that no layer reads, or along which activations are
multiplied (the shared axis of query and key), is watched where the first layer writes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from laconic.program.freezing import plain
from laconic.program.groups import Group, Member
from laconic.program.program import Program
from laconic.solvers.importance.base import (
    in_products,
    pooled,
    reading_layers,
    relative,
    writing_layers,
)
from laconic.solvers.importance.entropy import BINS
from laconic.statistics.histogram import Histogram
from laconic.statistics.layers import Layer
from laconic.training.job import Forward, Loss, Objective
from laconic.training.processes import Processes
from laconic.training.taps import tapped

Kind = Literal["flow", "mean", "apoz", "entropy"]
"""flow: mean magnitude times the norm of the weights that read it; mean: mean magnitude;
apoz: share of values that are not zero; entropy: bits of its values."""


@dataclass(frozen=True)
class _Look:
    """A group seen at the value `node`, whose channels lie along `axis` (counted from the end)."""

    group: Group
    member: Member
    layer: Layer
    node: str
    axis: int
    reads: bool

    @property
    def key(self) -> str:
        """What tells values apart: groups may share one."""
        return f"{self.node}:{self.axis}"


class Activity:
    """Scores of the channels of a Program in training, means over the batches that were watched."""

    def __init__(self, kind: Kind) -> None:
        self._kind: Kind = kind
        self._looks: list[_Look] = []
        self._nodes: list[str] = []
        self._sums: dict[str, Tensor] = {}
        self._run: Any = None
        self.batches = 0

    def aim(self, program: Program, groups: Sequence[Group]) -> list[str]:
        """Watch these groups of `program` from now on; forget what was seen before.

        Returns the names of groups that no layer reads or writes, which cannot be watched.
        """
        bare = plain(program)  # layers are seen past the quantisation of their weights
        self._looks = [look for group in groups for look in _looks(bare, group)]
        self._nodes = list(dict.fromkeys(look.node for look in self._looks))
        self._sums, self.batches = {}, 0
        self._program = program
        with tapped(program, self._nodes):
            self._run = program.recompile()
        seen = {look.group.name for look in self._looks}
        return [group.name for group in groups if group.name not in seen]

    def watching(self, objective: Objective) -> Objective:
        """An objective of the same value that sees what its forward pass computes."""

        def seeing(forward: Forward, batch: Any, number: int) -> Loss:
            del forward  # it may be compiled, without the values that are wanted

            def watched(*flat: Tensor) -> tuple[Tensor, ...]:
                values = self._run(self._program, *flat)
                end = len(values) - len(self._nodes)
                self._see(values[end:])
                return values[:end]

            return objective(watched, batch, number)

        return seeing

    @torch.no_grad()
    def _see(self, values: Sequence[Tensor]) -> None:
        by_name = dict(zip(self._nodes, values, strict=True))
        for key, look in {look.key: look for look in self._looks}.items():
            score = self._score(by_name[look.node].detach().float(), look.axis).double().cpu()
            self._sums[key] = self._sums.get(key, torch.zeros_like(score)) + score
        self.batches += 1

    def _score(self, value: Tensor, axis: int) -> Tensor:
        if self._kind == "entropy":
            seen = Histogram(BINS, axis)
            seen.update(value)
            return seen.entropy()
        rows = value.movedim(axis, 0).flatten(1)
        return (rows != 0).float().mean(1) if self._kind == "apoz" else rows.abs().mean(1)

    def scores(self) -> dict[str, Tensor]:
        """Group → activity of each index, float64 `[size]`, relative to the group's mean.

        The same in all processes that train together.
        """
        sums = {key: total.clone() for key, total in sorted(self._sums.items())}
        Processes.current().sum_(list(sums.values()))
        rows: dict[str, list[Tensor]] = {}
        for look in self._looks:
            if look.key in sums:
                found = sums[look.key] / max(self.batches, 1) * self._weights(look)
                row = _of_group(look, found)
                rows.setdefault(look.group.name, []).append(relative(row))
        return {name: torch.stack(found).mean(0) for name, found in rows.items()}

    def _weights(self, look: _Look) -> Tensor | float:
        """Norms of the weights that read each channel, for "flow"."""
        layer = look.layer
        if self._kind != "flow" or not look.reads or layer.groups > 1:
            return 1.0
        weight = self._program.tensor(layer.weight).detach().double()
        return weight.movedim(layer.in_dim, 0).flatten(1).norm(dim=1).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """What was seen so far."""
        return {**self._sums, "batches": torch.tensor(self.batches)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`; `aim` comes first."""
        self._sums = {key: value.clone() for key, value in tensors.items() if key != "batches"}
        self.batches = int(tensors["batches"])


def _looks(program: Program, group: Group) -> list[_Look]:
    readers = [] if in_products(group) else reading_layers(program, group)
    if readers:
        return [
            _Look(group, member, layer, layer.source.name, -1 - layer.space, True)
            for layer, member in readers
        ]
    return [
        _Look(group, member, layer, layer.node.name, -1 - layer.space, False)
        for layer, member in writing_layers(program, group)[:1]
    ]


def _of_group(look: _Look, scores: Tensor) -> Tensor:
    """The mean over the channels of each index."""
    index = look.group.index(look.member)
    if len(index) != len(scores):  # the weight holds the channels of one convolution group
        index = index.repeat(len(scores) // len(index))
    size = look.group.size
    return pooled(scores, index, size) / pooled(torch.ones_like(scores), index, size)
