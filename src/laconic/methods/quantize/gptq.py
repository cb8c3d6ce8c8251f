"""Weights on integer grids, each layer's rounding errors made up for by its other weights.

Idea: rounding a weight changes a layer's outputs; the weights of the same row that are still to be
rounded can take most of that back, as far as their inputs go together. Layer by layer, front to
back: second moments of the inputs from the network as rounded so far, one sweep over the columns
(those with the largest moments first), then passes that round each weight again given all others.
With `refit` (the default) each layer is before that fitted by least squares to what it gave in the
float network, and its scales and its bias are fitted to the codes it gets; without, it is GPTQ as
published. Batch norm is folded first. No labels, no training.

Papers: GPTQ (Frantar et al. 2022, arXiv 2210.17323); passes: QuantEase (Behdin et al. 2023, arXiv
2309.01885); fitting against the float network: as in He et al. 2017 (arXiv 1707.06168).

Helps: 3 and 4 bits, where rounding to nearest breaks and `quantize.round` is too slow; large linear
layers. Does not: at 8 bits nearest is as good. Weights only: a file gets smaller, a runtime is
faster only where it has a kernel for such weights. Transposed convolutions, look-up tables and
layers whose inputs never vary are rounded to nearest, and noted; a grouped convolution and a weight
that several layers read are rounded from the moments of their own inputs, without a fit.

Cost: one pass over `samples` in two networks side by side, and for each layer of n columns and m
rows n^3 + (1 + passes) m n^2 multiply-adds. One layer's moments are held at a time.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization.gptq_layers import Plan, Rounder
from laconic.solvers.quantization.weight_rounding import GridOptions, opened


class Gptq(GridOptions, Method):
    """Options of `quantize.gptq`; the grid's as in `GridOptions`.

    Attributes:
        samples: calibration samples at most.
        damping: added to the moments of the inputs, in units of their mean.
        act_order: round columns with large moments first.
        passes: how often each weight is rounded again behind the sweep.
        refit: fit weights, scales and biases to the float network as well.
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8}

    samples: int = Field(default=Plan.samples, ge=1)
    damping: float = Field(default=Plan.damping, gt=0)
    act_order: bool = Plan.act_order
    passes: int = Field(default=Plan.passes, ge=0)
    refit: bool = Plan.refit

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Round the chosen weights. A replay needs the same data.

        Raises:
            RecipeError: sites that match nothing.
            DataError: weights that are not finite; calibration data that are missing or unfit.
        """
        work = opened(program, sites, self, context)
        plan = Plan(self.samples, self.damping, self.act_order, self.passes, self.refit)
        rounder = Rounder(work, plan, context)
        rounder.round()
        made = work.close()
        return Outcome(
            program=made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=work.notes,
            figures={**work.figures(), "errors": rounder.errors},
        )
