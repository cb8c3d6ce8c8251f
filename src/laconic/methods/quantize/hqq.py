"""Weights on integer grids without any data: scales and zero points that outliers do not stretch.

Idea: a grid for the least squared error still widens for a few weights far out, at the cost of all
others. A norm below one leaves these out: half-quadratic splitting moves them into an auxiliary
tensor and fits the scale and the zero point of each channel or group to the rest, in turns; codes
are then the nearest ones. Batch norm is folded first.

Paper: Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). There
zero points are real numbers; here they are codes, so that any integer runtime can hold them, and
the scales are fitted as well.

Helps: where there are no data, or no time, and far outliers; groups of 32 to 128 weights. Does not:
with one scale for a channel of a convolution at 2 and 3 bits, whose large weights matter (a
ResNet-20 at 3 bits: 72.7 on validation, rounded to nearest on `mse` grids 85.3, `quantize.gptq`
91.2), unless `bias_correction: batch_norm` follows (89.2); where data are to be had,
`quantize.gptq` and `quantize.round` lose far less. Weights only: a file gets smaller, a runtime is
faster only where it has a kernel for such weights.

Cost: `rounds` passes over the weights, no data, except with a `bias_correction`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import ranges
from laconic.solvers.quantization.half_quadratic import half_quadratic
from laconic.solvers.quantization.weight_correction import CorrectionOptions
from laconic.solvers.quantization.weight_rounding import GridOptions, opened


class Hqq(GridOptions, CorrectionOptions, Method):
    """Options of `quantize.hqq`; the grid's as in `GridOptions`, also those of the correction.

    Attributes:
        norm: of the weights' errors, above 0 and at most 1.
        rounds: of the splitting; 0 is rounding to nearest.
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8, "bias_correction": "analytic"}

    norm: float = Field(default=0.7, gt=0, le=1)
    rounds: int = Field(default=20, ge=0)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Round the chosen weights. With a correction a replay needs the same data.

        Raises:
            RecipeError: sites that match nothing.
            DataError: weights that are not finite; data for a correction that are missing or unfit.
        """
        work = opened(program, sites, self, context)
        before = work.program.clone()
        for site in context.progress.track(work.sites, "fitting grids", len(work.sites)):
            weight = work.program.tensor(site.name).detach()
            grid = work.grid(site, weight)
            grid = half_quadratic(weight, site.axis, grid, norm=self.norm, rounds=self.rounds)
            work.settle(site, ranges.on_grid(weight, site.axis, grid), grid)
        self.correct_settled(work, before, context)
        made = work.close()
        return Outcome(
            program=made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=work.notes,
            figures=work.figures(),
        )
