"""Integer weights, and activations that find their own range each time the network runs.

Idea: in front of every matrix product with a stored weight the activation is put on an 8-bit grid
over the range it has right then, zero included; the weight stands on a symmetric grid with a scale
for each output channel. Nothing is calibrated, so nothing can be seen at run time that was not
seen in calibration. Batch norm is folded first; gradients pass straight through.

Papers: Krishnamoorthi 2018 (arXiv 1806.08342); a range for each token: Yao et al., "ZeroQuant"
(arXiv 2206.01861).

Helps: transformers and recurrent or linear layers whose activations differ a lot from input to
input, or where there are no data; ONNX Runtime runs 8 bits with one range a tensor on its integer
kernels (DynamicQuantizeLinear, MatMulInteger).
Does not: convolutional networks, whose ranges hardly change: `quantize.static` is faster there, so
convolutions are left alone unless `convolutions` is true. One range a tensor makes a sample's
result depend a little on the others of its batch; a range for each token does not, but no runtime
has a kernel for it. OpenVINO and Inductor compute either in floats: right, and no faster; at
precision int8 OpenVINO finds ranges itself where `quantize.weights` has groups and is symmetric.

Cost: no data; at run time one more pass over each activation.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from laconic.methods.base import Context, Method, Outcome
from laconic.program.freezing import freeze
from laconic.program.normalize import base_name
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import insertion, placement, ranges
from laconic.solvers.quantization.placement import Place
from laconic.solvers.quantization.weight_rounding import GridOptions, Rounding, opened
from laconic.solvers.quantization.weight_sites import WeightSite

_INTEGER_RUNTIMES = ("auto", "onnxruntime")


class QuantizeDynamic(Method):
    """Options of `quantize.dynamic`.

    Attributes:
        bits: of the weights' codes, 2 to 8.
        activation_bits: of the activations' codes; a runtime has kernels for 8 only.
        per_channel: one weight scale for each output channel, not one for the tensor.
        per_token: a range for each position of a sequence, not one for the tensor.
        convolutions: whether convolutions are quantised as well.
        weight_range: "mse" clips each channel for the least squared error, "minmax" clips nothing,
            "output" needs data: the least error of the layer's outputs.
        freeze: store the weights as integers; the Program then does not train on.
    """

    quick: ClassVar[Mapping[str, Any]] = {"convolutions": True}

    bits: int = Field(default=8, ge=2, le=8)
    activation_bits: int = Field(default=8, ge=2, le=8)
    per_channel: bool = True
    per_token: bool = False
    convolutions: bool = False
    weight_range: ranges.OutputRule = "mse"
    freeze: bool = False

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Quantise the chosen weights and what they are multiplied with.

        Raises:
            RecipeError: sites that match nothing.
            DataError: weights that are not finite.
        """
        options = GridOptions(
            bits=self.bits, symmetric=True, weight_range=self.weight_range, first_last=None
        )
        work = opened(program, sites, options, context)
        work.sites = [site for site in work.sites if self._takes(work, site)]
        places = placement.places(work.program, work.sites, [])
        for place in places:
            token = self.per_token and not _convolved(place)
            insertion.insert_dynamic(work.program, place, self.activation_bits, token)
        for site in work.sites:
            axis = site.axis if self.per_channel else None
            weight = work.program.tensor(site.name).detach()
            grid = ranges.weight_grid(
                weight, axis, self.weight_range, self.bits, moments=work.moments.get(site.name)
            )
            insertion.quantize_weight(work.program, site, axis, grid)
        made = work.program
        made.drop_unused()
        made.recompile()
        if places:
            work.notes += self._about(context.runtime)
        return Outcome(
            program=freeze(made) if self.freeze else made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=work.notes,
            figures={"weights": len(work.sites), "activations": len(places)},
        )

    def _takes(self, work: Rounding, site: WeightSite) -> bool:
        """Whether a weight is quantised; convolutions that are left alone are noted."""
        conv = any(base_name(node).startswith("conv") for node in site.operators)
        if conv and not self.convolutions:
            work.notes.append(
                f"{site.name}: stays float, it is a convolution's (convolutions: true)"
            )
        return self.convolutions or not conv

    def _about(self, runtime: str) -> list[str]:
        """What the chosen runtime makes of it."""
        if self.per_token:
            return ["no runtime has a kernel for a range for each token: computed in floats"]
        if self.activation_bits != 8:
            return [f"no runtime has a kernel for {self.activation_bits} bits: computed in floats"]
        if runtime not in _INTEGER_RUNTIMES:
            return [f"{runtime} computes ranges at run time in floats; onnxruntime in integers"]
        return []


def _convolved(place: Place) -> bool:
    return any(base_name(user).startswith("conv") for user in place.users)
