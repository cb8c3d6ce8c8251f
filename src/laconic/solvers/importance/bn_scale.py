"""Scale of the batch norm behind a channel (network slimming, Liu et al. 2017).

|gamma| is the spread a channel leaves its batch norm with. Needs no data. Made for networks trained
with an L1 penalty on these scales; on others it is a weak guide. Groups without a batch norm are
left whole, and noted.
"""

from typing import ClassVar

import torch
from torch import Tensor

from laconic.core.errors import RecipeError
from laconic.program.groups import Group
from laconic.program.program import Program
from laconic.solvers.importance.base import Importance, Scene, pooled, relative
from laconic.solvers.recalibrate import norms
from laconic.solvers.weights.elimination import Removal, by_score


class BnScale(Importance):
    """Absolute scale of the batch norms that a channel goes through."""

    needs_data: ClassVar[bool] = False

    def removals(self, scene: Scene) -> dict[str, Removal]:
        """The smallest first.

        Raises:
            RecipeError: none of the groups has a batch norm.
        """
        weights = {norm.weight for norm in norms(scene.program) if norm.weight is not None}
        found: dict[str, Removal] = {}
        for group in scene.groups:
            scales = _scales(scene.program, group, weights)
            if scales:
                found[group.name] = by_score(torch.stack(scales).mean(0))
            else:
                scene.notes.append(f"{group.name}: no batch norm scales it, left whole")
        if scene.groups and not found:
            raise RecipeError(
                "bn_scale needs batch norms, and none scales a group that may shrink",
                where=scene.groups[0].name,
                hint="choose another importance; a network whose batch norms were folded has none",
            )
        return found


def _scales(program: Program, group: Group, weights: set[str]) -> list[Tensor]:
    """One for each batch norm that scales every index, relative to its mean, float64 `[size]`."""
    found: list[Tensor] = []
    for member in group.members:
        if member.tensor in weights:
            scale = program.tensor(member.tensor).detach().double().abs().cpu()
            index = group.index(member)
            count = pooled(torch.ones_like(scale), index, group.size)
            found.append(relative(pooled(scale, index, group.size) / count))
    return found
