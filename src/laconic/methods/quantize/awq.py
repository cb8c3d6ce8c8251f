"""Weights on integer grids, the input channels that count most scaled up before they are rounded.

Idea: few input channels of a layer carry most of its activations' energy, and errors of their
weights count most. Multiplying these columns before rounding, and dividing the channel where it is
made, gives them finer steps without a single extra bit: in the rows of the layers that write the
channel, where all on the way gives multiples for multiples (ReLU, pooling, residual sums, heads of
an attention), or in the layer norm in front. How far is searched for each group of channels, by
what rounding does to the outputs. Weights are then rounded to nearest, and mean and spread of
each channel's outputs corrected. Batch norm is folded first.

Paper: Lin et al. 2023, "AWQ" (arXiv 2306.00978), with the root mean square of a channel in place of
its mean magnitude, and the clipping left to `weight_range`.

Helps: transformers at 4 and 3 bits, whose activations have outlier channels, and whatever rounds
afterwards. Does not: at 2 bits and in networks whose channels are alike, where `quantize.gptq` and
`quantize.round` do far more; channels that meet something that is not homogeneous (GELU, a sigmoid)
stay. Weights only: a file gets smaller, a runtime is faster only where it has a kernel for it.

Cost: one pass over `samples`, and `tries` roundings of every weight.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import salience
from laconic.solvers.quantization.weight_correction import Correction, CorrectionOptions
from laconic.solvers.quantization.weight_rounding import GridOptions, opened


class Awq(GridOptions, CorrectionOptions, Method):
    """Options of `quantize.awq`; the grid's as in `GridOptions`, also those of the correction.

    Attributes:
        tries: exponents between 0 and 1 that are tried for each group of channels; 1 scales none.
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8, "tries": 4}

    bias_correction: Correction = "batch_norm"
    tries: int = Field(default=20, ge=1)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Scale channels and round the chosen weights. A replay needs the same data.

        Raises:
            RecipeError: sites that match nothing.
            DataError: weights that are not finite; calibration data that are missing or unfit.
        """
        work = opened(program, sites, self, context)
        exponents = salience.protect(work, context, self.samples, self.tries)
        if work.sites and not exponents:
            work.notes.append("no channels were scaled: none can be, or nothing is gained by it")
        before = work.program.clone()
        work.settle_rest()
        self.correct_settled(work, before, context)
        made = work.close()
        return Outcome(
            program=made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=work.notes,
            figures={**work.figures(), "exponents": exponents},
        )
