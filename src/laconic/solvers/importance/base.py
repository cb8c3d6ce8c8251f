"""What every importance score is given and gives.

A score is a file of this folder with one class. It says in which order the indices of each group
go and what each costs (`Removal`). Harms of `taylor`, `fisher` and `obs` are in the unit of the
model's loss (nats for a classifier), so they can be compared between groups; those of all others
are relative to the mean of their group.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from laconic.core.progress import SILENT, Progress
from laconic.program.groups import Group, Member
from laconic.program.program import Program
from laconic.solvers.weights.elimination import Removal
from laconic.statistics.gradients import Loss
from laconic.statistics.layers import Layer, layers


@dataclass(frozen=True)
class Scene:
    """What there is to score.

    Attributes:
        program: in eval mode; never changed.
        groups: the groups to score.
        batches: flat calibration inputs; empty for a score that needs none.
        loss: what gradients are taken of, summed over samples; None for a score without gradients.
        seed: of every random choice.
        progress: where long work shows that it goes on.
        notes: sentences about what a score had to fall back to; scores append.
    """

    program: Program
    groups: Sequence[Group]
    batches: Sequence[Sequence[Tensor]] = ()
    loss: Loss | None = None
    seed: int = 0
    progress: Progress = SILENT
    notes: list[str] = field(default_factory=list[str])


class Importance(ABC):
    """A way of scoring the indices of groups."""

    needs_data: ClassVar[bool] = True
    """Whether it looks at calibration data."""

    @abstractmethod
    def removals(self, scene: Scene) -> dict[str, Removal]:
        """Group name → order of removal and harm of each index."""


def reading_layers(program: Program, group: Group) -> list[tuple[Layer, Member]]:
    """The layers that read a group's axis as input columns, with the member that says so."""
    members = {(m.tensor, m.dim): m for m in group.by_role("consumer")}
    return [
        (layer, members[layer.weight, layer.in_dim])
        for layer in layers(program)
        if (layer.weight, layer.in_dim) in members
    ]


def in_products(group: Group) -> bool:
    """Whether activations are multiplied along the group (the shared axis of query and key).

    What reads such a group after the product tells only part of what removing an index costs.
    """
    return group.atom.hint == "head_dim"


def writing_layers(program: Program, group: Group) -> list[tuple[Layer, Member]]:
    """The layers that write a group's axis as output rows."""
    members = {(m.tensor, m.dim): m for m in group.by_role("producer")}
    return [
        (layer, members[layer.weight, layer.out_dim])
        for layer in layers(program)
        if (layer.weight, layer.out_dim) in members
    ]


def pooled(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums `[..., positions]` over the positions of each index: `[..., size]`; -1 is left out."""
    belongs = index >= 0
    found = values.new_zeros((*values.shape[:-1], size))
    return found.index_add_(-1, index[belongs].to(values.device), values[..., belongs])


def relative(scores: Tensor) -> Tensor:
    """Scores `[size]` of a group in units of their mean; zeros stay zeros."""
    mean = float(scores.mean())
    return scores / mean if mean > 0 else scores


def norms_of(program: Program, group: Group, power: int) -> Tensor:
    """Sum of |w|^power of every index over the group's weights, each relative to its mean.

    float64 `[size]`; 1 is the mean of the group.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    counted = 0
    members = [m for m in group.members if m.role in ("producer", "consumer")] or group.members
    for member in members:
        tensor = program.tensor(member.tensor).detach()
        if not tensor.is_floating_point():
            continue
        along = tensor.double().abs().pow(power).movedim(member.dim, -1)
        along = along.reshape(-1, along.shape[-1]).sum(0).cpu()
        sums = pooled(along, group.index(member), group.size)
        mean = float(sums.mean())
        if mean > 0:
            total += sums / mean
            counted += 1
    return total / max(counted, 1)
