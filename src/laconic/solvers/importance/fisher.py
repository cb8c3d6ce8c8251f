"""Empirical Fisher: half the mean over samples of (dL/dgate)^2 (Theis et al. 2018).

The second-order estimate of the loss that closing one gate costs, in nats. One backward pass over
the calibration data; no labels (targets are drawn from the model's own prediction, so this is the
true Fisher information up to sampling). The cheapest good score; blind to what compensation can
repair.
"""

from laconic.solvers.importance._gates import mean_over_samples
from laconic.solvers.importance.base import Importance, Scene
from laconic.solvers.weights.elimination import Removal, by_score


class Fisher(Importance):
    """Half the mean squared gate gradient."""

    def removals(self, scene: Scene) -> dict[str, Removal]:
        """The smallest first."""
        return {name: by_score(0.5 * score) for name, score in mean_over_samples(scene, 2).items()}
