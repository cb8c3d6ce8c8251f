"""Information that a channel's activations carry over the data (Luo & Wu 2017, "Entropy-based").

The entropy of each channel's values, counted on one grid for all channels of a tensor: a channel
that hardly moves at the scale of its neighbours tells the next layer little. One forward pass, no
labels. It asks how much a channel says, not whether anybody listens or another says the same.
"""

from laconic.solvers.importance._activations import per_index
from laconic.solvers.importance.base import Importance, Scene
from laconic.solvers.weights.elimination import Removal, by_score
from laconic.statistics.histogram import Histogram

BINS = 512
"""Of the grid around zero; half of them for activations that are never negative."""


class Entropy(Importance):
    """Bits of a channel's values, as the layers that read it see them."""

    def removals(self, scene: Scene) -> dict[str, Removal]:
        """The least informative first."""
        found = per_index(scene, lambda axis: Histogram(BINS, axis), Histogram.entropy)
        return {name: by_score(score) for name, score in found.items()}
