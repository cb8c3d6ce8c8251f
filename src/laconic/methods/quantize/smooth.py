"""Move outlier channels from activations into the weights that read them, before quantising.

Activations share one scale a tensor, weights have one a channel: where few channels of a
transformer's activations are far larger than the others, dividing them and multiplying the
weights' columns lets both fit their grids. The division goes into the layer norm in front, or is
one multiplication. The network computes what it computed; quantise it afterwards (`quantize.static`
does this by itself in front of its own calibration).

Paper: Xiao et al. 2022, "SmoothQuant" (arXiv 2211.10438).

Helps: transformers in front of `quantize.dynamic`, `quantize.train` or a weight method that is
followed by integer activations.
Does not: convolutional networks, linear layers on single vectors, activations whose largest channel
is less than twice the median (they stay as they are).
Cost: one pass over `samples` calibration samples.
"""

from pydantic import Field

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.finite import refuse_broken
from laconic.solvers.quantization import smoothing
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.statistics.batches import Batches


class QuantizeSmooth(Method):
    """Options of `quantize.smooth`. Sites are names of weights.

    Attributes:
        strength: how far outliers move: 0 leaves the weights even, 1 the activations.
        samples: calibration samples.
    """

    strength: float = Field(default=0.5, ge=0, le=1)
    samples: int = Field(default=300, ge=1)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """The same function, outliers moved; equal up to float rounding in eval mode.

        Raises:
            RecipeError: sites that match nothing.
            DataError: no calibration data, or NaN or infinite values; names the node.
        """
        refuse_broken(program)
        made = program.clone().to(context.device)
        made.propagate()
        found, notes = weight_sites(made)
        chosen = set(sites.choose([site.name for site in found])) if found else set[str]()
        wanted = [site for site in found if site.name in chosen]
        batches = Batches(made, context.task, self.samples, context.device)
        moved = smoothing.smooth(made, wanted, batches, self.strength, context.progress)
        if not moved:
            notes.append("nothing to smooth: no channels of a linear layer's input stand out")
        return Outcome(
            program=made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=notes,
            figures={"smoothed": len(moved)},
        )
