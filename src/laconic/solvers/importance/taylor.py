"""First-order Taylor: the mean over samples of |dL/dgate| (Molchanov et al. 2017, 2019).

One backward pass over the calibration data; no labels (targets are drawn from the model's own
prediction). Good order within a network in one step; blind to what compensation can repair.
"""

from laconic.solvers.importance._gates import mean_over_samples
from laconic.solvers.importance.base import Importance, Scene
from laconic.solvers.weights.elimination import Removal, by_score


class Taylor(Importance):
    """Mean absolute gate gradient."""

    def removals(self, scene: Scene) -> dict[str, Removal]:
        """The smallest first."""
        return {name: by_score(score) for name, score in mean_over_samples(scene, 1).items()}
