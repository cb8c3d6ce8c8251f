"""Weights on integer grids whose roundings are learned, one residual block after the other.

Idea: which way each weight is rounded is learned, together with the scales and the biases, so that
every block gives what it gives in the float network: block by block, from the inputs that the
network rounded so far gives it, by a few hundred steps of Adam on calibration data. No labels, no
loss of the task, and no gradient leaves a block: blocks are the parts of the graph between two
places where a single tensor carries everything on (a residual block, a layer of a chain, attention
or feed-forward of a transformer). Batch norm is folded first: a learned scale and bias for each
channel do what measuring it anew would do. Where activations stand on grids already (put
`quantize.static` with `weights: false` in front), the goal is the network without them, and their
steps are learned with the weights.

Papers: AdaRound (Nagel et al. 2020, arXiv 2004.10568; `way: sigmoid`, or `reach: 0.5` after
AutoRound, arXiv 2309.05516: codes at most one from the nearest); AdaQuant (Hubara et al. 2020,
arXiv 2006.10518; `way: straight`, codes go where the block wants them); blocks: BRECQ (Li et al.
2021, arXiv 2102.05426); mixed inputs: QDrop (Wei et al. 2022, arXiv 2203.05740).

Helps: 2 to 4 bits after training, where nothing else holds. Does not: at 8 bits, where weights are
rounded to nearest here as well; with a few dozen samples. Weights alone make a file smaller; a
runtime is faster only where it has a kernel for such weights. Weights that several layers read are
rounded to nearest, and noted.

Cost: `steps` forward and backward passes of a batch through each block, that is `steps` times
`batch` samples through the whole network; one block's tensors for all samples are held at a time.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization.reconstruction import LearningOptions, Reconstruction
from laconic.solvers.quantization.weight_rounding import GridOptions, opened


class Round(GridOptions, LearningOptions, Method):
    """Options of `quantize.round`: the grid's (`GridOptions`) and `LearningOptions`."""

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8, "steps": 4, "batch": 4, "precision": "fp32"}

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Round the chosen weights. A replay needs the same data.

        Raises:
            RecipeError: sites that match nothing.
            DataError: weights that are not finite; calibration data that are missing or unfit.
        """
        work = opened(program, sites, self, context)
        learning = Reconstruction(work, self, context)
        learning.run()
        made = work.close()
        plain = self.model_dump(mode="json", exclude_defaults=True)
        return Outcome(
            program=made,
            resolved={**plain, "precision": self.settled_precision(context.device)},
            notes=work.notes,
            figures={**work.figures(), "errors": learning.errors},
        )
