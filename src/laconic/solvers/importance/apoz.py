"""Average percentage of zeros (Hu et al. 2016, "Network trimming"): what hardly ever fires goes.

The share of values that are not zero where the next layers read them. One forward pass, no labels.
Says nothing about activations without exact zeros (GELU, tanh, a residual stream that is read
before a ReLU); such groups are noted.
"""

import torch

from laconic.solvers.importance._activations import per_index
from laconic.solvers.importance.base import Importance, Scene
from laconic.solvers.weights.elimination import Removal, by_score
from laconic.statistics.zeros import Zeros


class Apoz(Importance):
    """Share of values that are not zero."""

    def removals(self, scene: Scene) -> dict[str, Removal]:
        """Those with the most zeros first."""
        found = per_index(scene, Zeros, lambda zeros: 1 - zeros.share)
        for name, score in found.items():
            if bool((score == score[0]).all()) and len(score) > 1:
                scene.notes.append(
                    f"{name}: all its channels are zero equally often, so their order is arbitrary"
                )
        return {name: by_score(torch.nan_to_num(score)) for name, score in found.items()}
