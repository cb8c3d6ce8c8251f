"""Magnitude pruning: the smallest weights become zero.

Idea: a weight near zero hardly matters, so keep the largest `ratio`, the top `count`, or all above
a `threshold`, for each tensor or over all of them. Pruned weights are exact zeros in the stored
tensor and stay zero when training goes on; every later step (folding, quantisation, cutting
channels, export) sees an ordinary tensor.

Papers: Han et al. 2015 (arXiv 1506.02626); global against layer by layer: Blalock et al. 2020
(arXiv 2003.03033).

Helps: files (zeros are entropy-coded), and as the start of a recovery by training. Up to about half
of a network's weights go for a fraction of a point, without any data.
Does not: dense runtimes multiply by zeros as fast as by anything else, so latency stays; beyond
about 70 % without training afterwards, where `prune.obs` holds much longer. Scopes: "global" leaves
more where weights are large; with `relative` each tensor is first divided by its mean, which
protects tensors of small weights.

Cost: a selection over the weights; seconds for any network; no data.
"""

from typing import Literal

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.weights.weight_masks import Amount, Pruning
from laconic.solvers.weights.weight_scores import magnitudes


class Magnitude(Amount, Method):
    """Options of `prune.magnitude`; `ratio`, `count`, `threshold`, `scope` as in `Amount`.

    Attributes:
        norm: "l1" scores a weight by its magnitude, "l2" by its square (the same order; it is the
            unit of `threshold`, and of the mean that `relative` divides by).
        relative: divide the scores of every tensor by their mean.
    """

    norm: Literal["l1", "l2"] = "l1"
    relative: bool = False

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Zero the weights of the smallest magnitude.

        Raises:
            RecipeError: sites that match nothing.
        """
        work = Pruning(program, sites, context.device)
        keep = self.kept(magnitudes(work.weights(), self.norm, relative=self.relative))
        return Outcome(
            program=work.close(keep),
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=work.notes,
            figures=work.figures,
        )
