"""First-order pruning: weights whose removal changes the loss least along its gradient go.

Idea: removing w changes the loss by about gradient x w; the score is the mean of its magnitude over
small batches. Targets are drawn from the model's own prediction, so no labels are needed.

Paper: Molchanov et al. 2019 (arXiv 1906.10771), there for whole channels.

Helps: where magnitudes say little because layers are scaled differently: the score is in the unit
of the loss, so one threshold serves the whole network.
Does not: `prune.fisher` counts the same gradients squared, which is the curvature a trained network
has where its gradient is zero, and usually ranks better; neither repairs what is left, as
`prune.obs` does. Zeros make files smaller, not dense runtimes faster.

Cost: one backward pass over `samples`, in batches of 16; a float for each weight.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.weights.weight_masks import Amount, Pruning
from laconic.solvers.weights.weight_scores import Sampled, scored


class Taylor(Amount, Sampled, Method):
    """Options of `prune.taylor`: fields as in `Amount` and `Sampled`."""

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8}

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Zero the weights of the smallest first-order effect. A replay needs the same data.

        Raises:
            RecipeError: sites that match nothing.
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        work = Pruning(program, sites, context.device)
        keep = self.kept(scored("taylor", work, self.calibration(context)))
        return Outcome(
            program=work.close(keep),
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=work.notes,
            figures=work.figures,
        )
