"""Weights on a grid, each rounded to the nearest point; activations stay float.

Idea: the scale of every output channel (or of every `group` weights of one) comes from the weights
alone, then each weight takes the nearest point. Grids: integers of 2 to 16 bits, with or without a
zero point; `ternary`, the integers -1, 0, 1; and fixed levels: `binary` (-1, 1), `nf4` (quantiles
of a normal distribution), `fp4_e2m1`, `fp8_e4m3`, `fp8_e5m2`. `mxfp4` and `mxfp8` are fp4 and fp8
e4m3 with a scale that is a power of two for every 32 weights. Batch norm is folded first. The
float weights stay behind the node until the Program is frozen, so that it can be trained on.

Papers: the range of least error: Choukroun et al. 2019 (arXiv 1902.06822); binary: Rastegari et
al., "XNOR-Net" (arXiv 1603.05279); nf4: Dettmers et al. 2023 (arXiv 2305.14314); MX: Rouhani et al.
2023 (arXiv 2310.10537).

Helps: a file of a quarter (8 bits) to an eighth of its size in a second and without data. 8 bits
lose nothing that can be measured, 6 hardly anything.
Does not: below 4 bits, where `quantize.gptq` and `quantize.round` lose far less, and 1 or 2 bits
need training (`quantize.train`, `quantize.binary`). With a thousand samples at hand
`bias_correction: batch_norm` gives much of it back in seconds (a ResNet-20 of 91.5 on validation at
4, 3 and 2 bits: 91.0, 85.3, 14.0 without, 91.3, 89.7, 77.1 with it); "empirical" can make it worse.
Convolutions are not faster: a runtime decodes their weights. Linear layers with a `group` of 16,
32, 64, 128 or 256 can be: ONNX Runtime and OpenVINO have kernels that read integers of 4 or 8 bits,
and at precision int8 put the inputs on 8 bits themselves (OpenVINO where the grid is `symmetric`).
fp8 stands in ONNX files as fp8 bytes, other levels as floats.

Cost: about 50 passes over the weights with "mse", one with "minmax"; no data, except with a
`bias_correction`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from laconic.core.errors import RecipeError
from laconic.forms import affine, levels
from laconic.forms.affine import Affine
from laconic.forms.levels import Levels
from laconic.methods.base import Context, Method, Outcome
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import insertion, ranges
from laconic.solvers.quantization.kernels import without_kernel
from laconic.solvers.quantization.ranges import Grid
from laconic.solvers.quantization.weight_correction import CorrectionOptions
from laconic.solvers.quantization.weight_rounding import GridOptions, Rounding, opened
from laconic.solvers.quantization.weight_sites import WeightSite

GridName = Literal[
    "int", "ternary", "binary", "nf4", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2", "mxfp4", "mxfp8"
]
_MX = {"mxfp4": "fp4_e2m1", "mxfp8": "fp8_e4m3"}
_MX_GROUP = 32


class QuantizeWeights(GridOptions, CorrectionOptions, Method):
    """Options of `quantize.weights`; `symmetric`, `freeze` as in `GridOptions`.

    Attributes:
        grid: see the module.
        bits: of the codes of grid "int", 1 to 16; 1 is grid "binary".
        group: weights of an output channel that share a scale; None: all of them (of mxfp4 and
            mxfp8: 32). A channel of no more weights than that has one scale.
        per_channel: one scale for each output channel, not one for the tensor.
        power_of_two: scales are powers of two: a shift instead of a product.
        weight_range: "minmax" clips nothing, "mse" has the least squared error; for integers also
            "percentile" and "entropy", one share of its range for all channels of a weight, and
            "output", the least error of the layer's outputs on calibration data.
        percentile: per cent of the weights that "percentile" clips at neither end.
        first_last: bits of the first and the last layer, on an integer grid with a scale for each
            channel, where that is more than the others have; None: like the others.
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8, "bias_correction": "analytic"}

    grid: GridName = "int"
    bits: int = Field(default=8, ge=1, le=16)
    first_last: int | None = Field(default=8, ge=2, le=16)
    per_channel: bool = True
    power_of_two: bool = False
    percentile: float = Field(default=99.9, gt=50, le=100)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Round the chosen weights. With a correction a replay needs the same data.

        Raises:
            RecipeError: sites that match nothing; options that contradict each other; a group that
                does not divide a weight, by name.
            DataError: weights that are not finite; for a correction, data that are missing.
        """
        self._check()
        probe = self.model_copy(update={"bits": max(self._width(), 2), "group": None})
        work = opened(program, sites, probe, context)
        before = work.program.clone()
        chosen = {site.name: self._choose(work, site) for site in work.sites}
        work.sites = [site for site in work.sites if _resolves(work, site, chosen[site.name].form)]
        for site in work.sites:
            old = before.tensor(site.name)
            work.program.set_tensor(site.name, chosen[site.name].form.decode().to(old))
        shifts = self.power_of_two or self.grid in _MX
        free = [name for name, held in chosen.items() if held.form.scale.ndim and not shifts]
        factors = self.correct(work, before, context, free)
        for site in work.sites:
            weight = before.tensor(site.name).detach()
            if (factor := factors.get(site.name)) is not None:
                weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
                chosen[site.name] = chosen[site.name].widened(factor)
            work.program.set_tensor(site.name, weight)
            chosen[site.name].insert(work.program, site)
        made = work.program
        made.drop_unused()
        made.recompile()
        work.notes += without_kernel(made, context.runtime)
        return Outcome(
            program=freeze(made) if self.freeze else made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=work.notes,
            figures=_figures([chosen[site.name].form for site in work.sites]),
        )

    def _check(self) -> None:
        """Raises RecipeError: options that contradict each other."""
        name = self._levels()
        if self.grid != "int" and self.bits != type(self).model_fields["bits"].default:
            raise RecipeError(
                f"bits = {self.bits} with grid {self.grid}, which has its own",
                where="quantize.weights bits",
                hint="leave bits out, or take grid: int",
            )
        if name and self.weight_range not in ("minmax", "mse"):
            raise RecipeError(
                f"weight_range = {self.weight_range} for the levels {name}, expected minmax or mse",
                where="quantize.weights weight_range",
            )
        if self.group is not None and not self.per_channel:
            raise RecipeError(
                f"group = {self.group} with one scale for the tensor",
                where="quantize.weights group",
                hint="leave per_channel true",
            )

    def _levels(self) -> str | None:
        """The fixed levels that are meant, if any."""
        if self.grid == "int":
            return "binary" if self.bits == 1 else None
        return None if self.grid == "ternary" else _MX.get(self.grid, self.grid)

    def _width(self) -> int:
        """Bits of a code of the grid."""
        name = self._levels()
        return levels.bits(name) if name else 2 if self.grid == "ternary" else self.bits

    def _choose(self, work: Rounding, site: WeightSite) -> "_Chosen":
        """The form of a weight, its codes rounded to nearest."""
        weight = work.program.tensor(site.name).detach()
        end = self.first_last is not None and self.first_last > self._width()
        if end and work.bits[site.name] != work.options.bits:
            return self._integers(work, site.name, site.axis, work.bits[site.name], None)
        group = self.group or (_MX_GROUP if self.grid in _MX else None)
        axis = site.axis if self.per_channel else None
        if group is not None:
            axis = 0 if axis is None else axis
            group = self._group(work, site.name, affine.slice_size(weight.shape, axis), group)
        name = self._levels()
        if name is None:
            return self._integers(work, site.name, axis, self._width(), group)
        scale = ranges.level_scale(
            weight,
            axis,
            name,
            "minmax" if self.weight_range == "minmax" else "mse",
            group=group,
            power_of_two=self.power_of_two or self.grid in _MX,
        )
        codes = levels.encode(weight, scale, axis, name)
        return _Chosen(Levels(codes, scale, axis, name))

    def _group(self, work: Rounding, name: str, size: int, group: int) -> int | None:
        """The group of a weight whose channels have `size` weights."""
        if group >= size:
            return None
        if size % group == 0:
            return group
        if self.group is None:
            work.notes.append(
                f"{name}: a scale for each channel, {size} weights are no blocks of 32"
            )
            return None
        fits = ", ".join(str(g) for g in range(1, size + 1) if size % g == 0)
        raise RecipeError(
            f"a group of {group} does not divide the {size} weights of an output channel",
            where=name,
            hint=f"sizes that divide: {fits}; or leave it out of the sites",
        )

    def _integers(
        self, work: Rounding, name: str, axis: int | None, bits: int, group: int | None
    ) -> "_Chosen":
        weight = work.program.tensor(name).detach()
        grid = ranges.weight_grid(
            weight,
            axis,
            self.weight_range,
            bits,
            group=group,
            symmetric=self.symmetric or self.grid == "ternary",
            power_of_two=self.power_of_two,
            percentile=self.percentile,
            moments=work.moments.get(name),
        )
        parts = (grid.scale, grid.zero_point, axis, grid.qmin, grid.qmax)
        return _Chosen(Affine(affine.encode(weight, *parts), *parts))


@dataclass(frozen=True)
class _Chosen:
    """What a weight becomes."""

    form: Affine | Levels

    def widened(self, factor: Tensor) -> "_Chosen":
        """The same codes with scales of each channel times `factor` `[channels]`."""
        scale = self.form.scale
        return _Chosen(
            replace(self.form, scale=scale * factor.reshape(-1, *[1] * (scale.ndim - 1)))
        )

    def insert(self, program: Program, site: WeightSite) -> None:
        """Put the node behind the float weight."""
        held = self.form
        if isinstance(held, Levels):
            insertion.insert_levels(program, site, held.axis, held.scale, held.name)
            return
        grid = Grid(held.scale, held.zero_point, held.qmin, held.qmax)
        insertion.quantize_weight(program, site, held.axis, grid)


def _resolves(work: Rounding, site: WeightSite, form: Affine | Levels) -> bool:
    """Whether the grid is of any use to each scale's weights; otherwise it is noted why not."""
    weight = work.program.tensor(site.name).detach()
    step = min(v for v in levels.values(form.name) if v > 0) if isinstance(form, Levels) else 1.0
    lost = ranges.stretched(weight, form.axis, form.scale, step)
    if lost:
        work.notes.append(
            f"{site.name}: stays float, outliers of {float(weight.abs().max()):.3g} stretch {lost} "
            f"of its {form.scale.numel()} scales until their other weights are lost"
        )
    return not lost


def _figures(forms: Sequence[Affine | Levels]) -> dict[str, Any]:
    """Bits of a weight as stored: codes, scales and zero points, before any entropy coding."""
    stored = sum(8 * form.nbytes() for form in forms)
    total = sum(form.codes.numel() for form in forms)
    return {"effective_bits": stored / max(total, 1), "weights": len(forms)}
