"""Equalise the ranges of channels across layers, so that one scale suits a whole tensor.

Each channel is divided where it is written and multiplied where it is read, until its rows and its
columns take the same share of their tensors' ranges. Channels are followed through the groups, so
that residual streams with several writers and readers, concatenations and depthwise convolutions
are one case. The network computes what it computed; quantise it afterwards.

Paper: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction"
(arXiv 1906.04721).

Helps: grids with one scale a tensor (many phones and NPUs), networks with depthwise convolutions,
whose channels often differ by factors of a hundred; powers of two as scales; activations too, since
channels that were far apart come together.
Does not: weights with a scale for each output channel gain little; channels that meet something
that is not positively homogeneous (ReLU6, SiLU, a norm over channels) stay, the notes say which.
Batch norm is folded first. Cost: milliseconds; no data.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from laconic.methods.base import Context, Method, Outcome
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import selection
from laconic.solvers.channels.channel_region import Region, Regions
from laconic.solvers.finite import refuse_broken
from laconic.solvers.layers import folding
from laconic.solvers.quantization import equalization

_MOST_NOTES = 20


class QuantizeEqualize(Method):
    """Options of `quantize.equalize`. Sites are names of groups (see `laconic inspect`).

    Attributes:
        rounds: most passes over all groups; neighbours share weights.
    """

    quick: ClassVar[Mapping[str, Any]] = {"rounds": 2}

    rounds: int = Field(default=40, ge=1)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """The same function with equalised channels; equal up to float rounding in eval mode.

        Raises:
            RecipeError: sites match nothing, or only groups that cannot shrink.
            DataError: a parameter holds NaN or infinite values.
        """
        refuse_broken(program)
        made = program.clone().to(context.device)
        folded = folding.fold_batch_norms(made, forwards=False)
        made.propagate()
        notes = list(folded.notes)
        found = groups(made)
        finder = Regions(made, found)
        chosen: list[Region] = []
        for name in selection.chosen(found, sites):
            region = finder.of(found.find(name))
            reason = region if isinstance(region, str) else _hindrance(region)
            if reason:
                notes.append(f"{name} keeps its scales: {reason}")
            elif isinstance(region, Region):
                chosen.append(region)
        before = {region.group.name: equalization.spread(made, region) for region in chosen}
        passes = equalization.equalize(made, chosen, self.rounds)
        after = {region.group.name: equalization.spread(made, region) for region in chosen}
        if not chosen:
            notes.append("nothing to equalise: no group can be scaled")
        made.recompile()
        return Outcome(
            program=made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=notes[:_MOST_NOTES],
            figures={
                "folded": len(folded.folded),
                "passes": passes if chosen else 0,
                "spread": {name: [before[name], after[name]] for name in before},
            },
        )


def _hindrance(region: Region) -> str:
    """Why a region cannot be scaled; empty if it can."""
    if any(writer.norm is not None for writer in region.writers):
        return "a batch norm that could not be folded stands behind its writer"
    if not region.scalable:
        return "an operator on its way does not give a multiple for a multiple"
    return ""
