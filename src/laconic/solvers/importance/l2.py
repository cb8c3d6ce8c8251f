"""Sum of squared weights of each channel.

Needs no data. Every weight that writes or reads the channel counts, relative to the mean of its
group. A weak guide: it ignores the scale of the activations.
"""

from typing import ClassVar

from laconic.solvers.importance.base import Importance, Scene, norms_of
from laconic.solvers.weights.elimination import Removal, by_score


class L2(Importance):
    """Squared weights."""

    needs_data: ClassVar[bool] = False

    def removals(self, scene: Scene) -> dict[str, Removal]:
        """The smallest sums first."""
        return {g.name: by_score(norms_of(scene.program, g, 2)) for g in scene.groups}
