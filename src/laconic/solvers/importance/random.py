"""Chance: the control that every other score has to beat.

Scores are drawn uniformly from 0 to 1 from the run's seed. Needs no data.
"""

from typing import ClassVar

import torch

from laconic.solvers.importance.base import Importance, Scene
from laconic.solvers.weights.elimination import Removal, by_score


class Random(Importance):
    """Uniform random numbers."""

    needs_data: ClassVar[bool] = False

    def removals(self, scene: Scene) -> dict[str, Removal]:
        """In an order that only the seed decides."""
        generator = torch.Generator().manual_seed(scene.seed)
        return {
            group.name: by_score(torch.rand(group.size, generator=generator))
            for group in scene.groups
        }
