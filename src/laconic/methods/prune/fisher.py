"""Empirical Fisher pruning: weights that cost the least loss, by its curvature, go.

Idea: at a trained network's optimum the gradient is zero and removing w costs w^2 x E[g^2] / 2,
the diagonal of the Fisher information. Targets are drawn from the model's own prediction, which
makes it the true Fisher information and needs no labels; gradients of such targets have mean zero,
so small batches give it without a gradient for each sample.

Papers: Theis et al. 2018 (arXiv 1801.05787); LeCun et al. 1989, "Optimal brain damage".

Helps: one threshold for the whole network in the unit of the loss (nats): it takes most where it
harms least. The score that `prune.obs` shares the weights out with.
Does not: the diagonal knows nothing of weights that could stand in for each other; `prune.obs`
does, and repairs what is left. Data a network was trained on make it oversure: raise `temperature`
or give augmented ones. Zeros make files smaller, not dense runtimes faster.

Cost: one backward pass over `samples`, in batches of 16; a float for each weight.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.weights.weight_masks import Amount, Pruning
from laconic.solvers.weights.weight_scores import Sampled, scored


class Fisher(Amount, Sampled, Method):
    """Options of `prune.fisher`: fields as in `Amount` and `Sampled`."""

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8}

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Zero the weights of the smallest expected loss. A replay needs the same data.

        Raises:
            RecipeError: sites that match nothing.
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        work = Pruning(program, sites, context.device)
        keep = self.kept(scored("fisher", work, self.calibration(context)))
        return Outcome(
            program=work.close(keep),
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=work.notes,
            figures=work.figures,
        )
