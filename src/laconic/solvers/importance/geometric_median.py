"""Distance to the other filters (FPGM, He et al. 2019): near the median means replaceable.

The sum of distances from a channel's weights to those of all other channels of its layer, relative
to the mean of the group; a filter in the middle of the others can be expressed by them. Needs no
data. Unlike a norm it does not take small filters for useless ones, but it ignores what the
activations do.
"""

from typing import ClassVar

import torch
from torch import Tensor

from laconic.program.groups import Group, Member
from laconic.program.program import Program
from laconic.solvers.importance.base import Importance, Scene, relative
from laconic.solvers.weights.elimination import Removal, by_score


class GeometricMedian(Importance):
    """Sum of distances to the other filters."""

    needs_data: ClassVar[bool] = False

    def removals(self, scene: Scene) -> dict[str, Removal]:
        """The most central first."""
        return {g.name: by_score(_distances(scene.program, g)) for g in scene.groups}


def _distances(program: Program, group: Group) -> Tensor:
    """Mean over the layers that write the group, each relative to its mean, float64 `[size]`."""
    members = group.by_role("producer") or group.by_role("consumer") or group.members
    held = [m for m in members if program.tensor(m.tensor).is_floating_point()]
    if not held:
        return torch.ones(group.size, dtype=torch.float64)
    found = [_rows(program.tensor(member.tensor), group, member) for member in held]
    return torch.stack([relative(torch.cdist(rows, rows).sum(1)) for rows in found]).mean(0)


def _rows(tensor: Tensor, group: Group, member: Member) -> Tensor:
    """All weights of each index, float64 `[size, weights]`."""
    index = group.index(member)
    order = index.argsort(stable=True)[int((index < 0).sum()) :]
    along = tensor.detach().double().cpu().movedim(member.dim, 0)
    return along[order].reshape(group.size, -1)
