"""Integer weights and activations with ranges fixed from calibration data.

Every chosen weight stands on a symmetric integer grid for each output channel, every tensor that
goes into an integer operator on an 8-bit grid whose range comes from calibration data. Batch norm
is folded first. The result is a Program with fake-quantisation nodes where OpenVINO and ONNX
Runtime look for them, so that it runs on integer kernels, and with straight-through gradients, so
that it can be trained on; frozen, its weights are integers.

Papers: Jacob et al. 2018 (arXiv 1712.05877); Krishnamoorthi 2018 (arXiv 1806.08342); bias
correction: Nagel et al. 2019 (arXiv 1906.04721).

Helps: convolutional networks and transformer encoders on CPUs with integer instructions (AVX512
VNNI, AMX); files a quarter of float32. 8 bits rarely cost more than 0.3 points.
Does not: where bf16 is as fast already (very small networks at batch 1, where the number of
operators decides); below 5 bits without training afterwards; tensors with far outliers, which are
found by measurement and left float. Batch norm is gone afterwards, so train it before.
Cost: one pass over `samples` calibration samples, half a pass over 32 samples for each quantised
tensor (`skip_above`), and one more pass with `bias_correction: empirical`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from laconic.core.errors import RecipeError
from laconic.methods.base import Context, Method, Outcome
from laconic.program.freezing import freeze
from laconic.program.normalize import base_name
from laconic.program.program import FAKE_QUANTIZE, Program
from laconic.program.sites import Sites
from laconic.solvers import sensitivity
from laconic.solvers.finite import refuse_broken
from laconic.solvers.layers import folding
from laconic.solvers.quantization import bias_correction as biases
from laconic.solvers.quantization import insertion, output_ranges, placement, ranges, smoothing
from laconic.solvers.quantization.placement import Place
from laconic.solvers.quantization.ranges import Grid
from laconic.solvers.quantization.weight_sites import (
    WeightSite,
    choose_sites,
    weight_sites,
)
from laconic.statistics.base import Statistic
from laconic.statistics.batches import Batches
from laconic.statistics.collect import collect
from laconic.statistics.histogram import Histogram
from laconic.statistics.moments import Moments

_SENSITIVITY_SAMPLES = 32

Range = tuple[float, float]


class QuantizeStatic(Method):
    """Options of `quantize.static`.

    Attributes:
        weights: whether weights are quantised.
        activations: whether activations are quantised; without them only the file gets smaller.
        bits: of the weights' codes, 2 to 8; activations have 8.
        per_channel: one weight scale for each output channel, not one for the tensor.
        power_of_two: all steps are powers of two: shifts in place of products.
        weight_range: "mse" clips each channel for the least squared error, "minmax" clips nothing;
            "output" for the least error of the layer's outputs on the calibration data.
        range: how activation ranges are chosen: "minmax", "percentile", "mse", "entropy", or
            "output": the least error of the outputs of the layers that read it ("mse" where none
            does directly).
        percentile: per cent of the values that "percentile" clips at neither end.
        symmetric: True: signed activations have zero point 0; False: all have the zero point that
            fits best; "auto": symmetric at convolutions, additions and products of two activations
            (fastest there), with a zero point in front of linear layers.
        smoothing: how far outlier channels in front of linear layers on sequences are moved into
            the weights, 0 to 1; None leaves them.
        bias_correction: "none", "analytic" or "empirical".
        samples: calibration samples.
        skip_above: an activation whose quantisation alone moves the outputs by more than this share
            of their energy stays float; None measures nothing.
        freeze: store the weights as integers; the Program then does not train on.
        ranges: resolved: place → (low, high), instead of calibration.
        keep_float: resolved: places that stay float.
    """

    weights: bool = True
    activations: bool = True
    bits: int = Field(default=8, ge=2, le=8)
    per_channel: bool = True
    power_of_two: bool = False
    weight_range: ranges.OutputRule = "mse"
    range: ranges.OutputRule = "mse"
    percentile: float = Field(default=99.99, gt=50, le=100)
    symmetric: bool | Literal["auto"] = "auto"
    bias_correction: Literal["none", "analytic", "empirical"] = "analytic"
    smoothing: float | None = Field(default=0.85, ge=0, le=1)
    samples: int = Field(default=300, ge=1)
    skip_above: float | None = Field(default=0.01, gt=0)
    freeze: bool = False
    ranges: dict[str, Range] | None = None
    keep_float: tuple[str, ...] = ()

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Quantise the chosen weights and the activations in front of their operators.

        Sites are names of weights, and of operators without weights (module path, node name).

        Raises:
            RecipeError: sites that match nothing; `ranges` that do not fit the program.
            DataError: no calibration data, or NaN or infinite values; names the node.
        """
        refuse_broken(program)
        work = _Work(program.clone().to(context.device), context)
        folded = folding.fold_batch_norms(work.program, forwards=False)
        work.notes += folded.notes
        work.program.propagate()
        self._select(work, sites)
        if not work.sites and not work.places:
            work.notes.append("nothing to quantise: no float weight of a known operator is left")
            return Outcome(program=work.program, notes=work.notes)
        self._smooth(work)
        self._calibrate(work)
        self._guard(work)
        plain = work.program.clone()
        if self.weights:
            self._insert_weights(work)
        self._insert_activations(work)
        self._correct(work, plain)
        made = work.program
        made.drop_unused()
        made.recompile()
        made = freeze(made) if self.freeze else made
        return Outcome(
            program=made,
            resolved=self._resolved(work),
            notes=work.notes,
            figures={
                "folded": len(folded.folded),
                "weights": len(work.sites) if self.weights else 0,
                "activations": len(work.grids),
                "smoothed": len(work.smoothed),
                "sensitivity": work.errors,
            },
        )

    # choosing ---------------------------------------------------------------------------------

    def _select(self, work: "_Work", sites: Sites) -> None:
        found, notes = weight_sites(work.program)
        operators = placement.operator_sites(work.program, found)
        names = [site.name for site in found] + operators
        chosen = set(choose_sites(work.program, sites, names))
        work.notes += notes
        work.sites = [site for site in found if site.name in chosen]
        work.operators = [name for name in operators if name in chosen]
        self._place(work)

    def _place(self, work: "_Work") -> None:
        if self.activations:
            work.places = placement.places(work.program, work.sites, work.operators)

    def _is_symmetric(self, place: Place) -> bool:
        if self.symmetric != "auto":
            return self.symmetric or "product" in place.kinds
        return place.kinds != {"matrix"} or any(
            base_name(user).startswith("conv") for user in place.users
        )

    def _smooth(self, work: "_Work") -> None:
        if self.smoothing is None or not (self.activations and self.weights):
            return
        work.smoothed = smoothing.smooth(
            work.program,
            work.sites,
            work.batches(self.samples),
            self.smoothing,
            work.context.progress,
        )
        if work.smoothed:
            self._place(work)

    # calibration ------------------------------------------------------------------------------

    def _calibrate(self, work: "_Work") -> None:
        wanted: dict[tuple[str, str], tuple[str, str, Statistic]] = {}
        if self.ranges is None:
            for place in work.places:
                wanted["range", place.name] = (place.name, "output", Histogram())
        if self.bias_correction == "analytic":
            for node, _ in work.layers():
                moments = Moments(biases.bias_axis(node))
                wanted["input", node.name] = (node.name, "input 0", moments)
        if self.bias_correction == "empirical":
            for node, _ in work.layers():
                moments = Moments(biases.bias_axis(node))
                wanted["output", node.name] = (node.name, "output", moments)
        if wanted:
            collect(work.program, work.batches(self.samples), wanted, work.context.progress)
        for (_, name), (_, _, statistic) in wanted.items():
            if isinstance(statistic, Histogram):
                work.histograms[name] = statistic
            elif isinstance(statistic, Moments):
                work.means[name] = statistic.mean
        self._choose_ranges(work)

    def _choose_ranges(self, work: "_Work") -> None:
        groups: dict[int, list[Place]] = {}
        for place in work.places:
            groups.setdefault(place.group, []).append(place)
        suited = self._suited(work, groups)
        for number, members in groups.items():
            symmetric = any(self._is_symmetric(place) for place in members)
            if self.ranges is not None:
                self._take_range(work, members, symmetric)
                continue
            names = [place.name for place in members]
            total = _merged([work.histograms[name] for name in names])
            reason, chosen = self._range_of(total, symmetric, suited.get(number))
            if reason:
                work.skip(members, reason)
                continue
            for name in names:
                work.ranges[name] = chosen
                work.grids[name] = self._grid(chosen, symmetric)

    def _suited(self, work: "_Work", groups: Mapping[int, Sequence[Place]]) -> dict[int, Range]:
        """Of each group of places the range that its readers' outputs suffer least from."""
        if self.range != "output" or self.ranges is not None:
            return {}
        told = {
            number: (members, _merged([work.histograms[place.name] for place in members]),
                     any(self._is_symmetric(place) for place in members))
            for number, members in groups.items()
        }  # fmt: skip
        seen = {number: held for number, held in told.items() if _has_range(held[1])}
        batches = list(work.batches(min(self.samples, output_ranges.SAMPLES)))
        progress = work.context.progress
        return output_ranges.activation_ranges(
            work.program, seen, batches, self.percentile, progress
        )

    def _range_of(
        self, total: Histogram, symmetric: bool, suited: Range | None
    ) -> tuple[str, Range]:
        """The range over a histogram, or why there is none."""
        if not _has_range(total):
            return ranges.unfit(total), (0.0, 0.0)
        rule = "mse" if self.range == "output" else self.range
        chosen = suited or ranges.choose(
            total, rule, symmetric=symmetric, percentile=self.percentile
        )
        return ranges.unfit(total, self._grid(chosen, symmetric)), chosen

    def _grid(self, chosen: Range, symmetric: bool) -> Grid:
        return ranges.grid(*chosen, symmetric=symmetric, power_of_two=self.power_of_two)

    def _take_range(self, work: "_Work", members: Sequence[Place], symmetric: bool) -> None:
        assert self.ranges is not None
        for place in members:
            if place.name in self.keep_float:
                continue
            if place.name not in self.ranges:
                raise RecipeError(
                    f"no range for {place.name}",
                    where="quantize.static ranges",
                    hint="resolved ranges belong to the very program they were measured on; "
                    "leave 'ranges' out to calibrate again",
                )
            work.ranges[place.name] = self.ranges[place.name]
            work.grids[place.name] = self._grid(self.ranges[place.name], symmetric)

    # changing the graph -----------------------------------------------------------------------

    def _guard(self, work: "_Work") -> None:
        """Measure what each quantised activation does to the outputs; leave the worst float."""
        if self.skip_above is None or self.ranges is not None or not work.grids:
            return
        probe, names = work.program.clone(), {site.name for site in work.sites}
        sites = [site for site in weight_sites(probe)[0] if site.name in names]
        inserted = {
            place.name: [insertion.quantize_activation(probe, place, work.grids[place.name])]
            for place in placement.places(probe, sites, work.operators)
            if place.name in work.grids
        }
        probe.recompile()
        batches = list(work.batches(min(self.samples, _SENSITIVITY_SAMPLES)))
        work.errors = sensitivity.output_errors(probe, inserted, batches, work.context.progress)
        for place in work.places:
            error = work.errors.get(place.name, 0.0)
            if error > self.skip_above:
                work.skip([place], f"quantised alone it moves the outputs by {error:.2%}")

    def _insert_activations(self, work: "_Work") -> None:
        for place in work.places:
            if place.name in work.grids:
                insertion.quantize_activation(work.program, place, work.grids[place.name])
        work.program.recompile()

    def _insert_weights(self, work: "_Work") -> None:
        if self.weight_range == "output":
            batches = list(work.batches(min(self.samples, output_ranges.SAMPLES)))
            names = [site.name for site in work.sites]
            work.moments = output_ranges.moments(
                work.program, names, batches, work.context.progress
            )
        for site in work.sites:
            weight = work.program.tensor(site.name).detach()
            axis = site.axis if self.per_channel else None
            chosen = ranges.weight_grid(
                weight, axis, self.weight_range, self.bits,
                power_of_two=self.power_of_two, moments=work.moments.get(site.name),
            )  # fmt: skip
            insertion.quantize_weight(work.program, site, axis, chosen)
            difference = ranges.on_grid(weight, axis, chosen).double() - weight.double()
            for node, name in work.layers():
                if name == site.name and node.name in work.means:
                    work.shifts[node.name] = difference
        work.program.recompile()

    def _correct(self, work: "_Work", plain: Program) -> None:
        if self.bias_correction == "none" or not self.weights:
            return
        layers, probe = work.layers(), work.batches(min(self.samples, biases.GUARDED))
        guard = biases.Guard(plain, work.program, layers, probe)
        self._shift(work, layers)
        work.notes += guard.settle()

    def _shift(self, work: "_Work", layers: Sequence[tuple[fx.Node, str]]) -> None:
        if self.bias_correction == "analytic":
            for node, name in layers:
                shift = biases.mean_shift(node, work.shifts[node.name], work.means[node.name])
                biases.add_to_bias(work.program, node, name, -shift)
            return
        for node, name in layers:
            zeros = torch.zeros_like(work.means[node.name])
            biases.add_to_bias(work.program, node, name, zeros)
        batches = list(work.batches(self.samples))
        biases.correct_empirically(work.program, layers, work.means, batches, work.context.progress)

    def _resolved(self, work: "_Work") -> Mapping[str, object]:
        plain = self.model_dump(mode="json", exclude_defaults=True)
        return {**plain, "ranges": {n: list(r) for n, r in work.ranges.items()},
                "keep_float": work.kept}  # fmt: skip


@dataclass
class _Work:
    """What is known while the method runs."""

    program: Program
    context: Context
    sites: list[WeightSite] = field(default_factory=list[WeightSite])
    operators: list[str] = field(default_factory=list[str])
    smoothed: list[str] = field(default_factory=list[str])
    places: list[Place] = field(default_factory=list[Place])
    notes: list[str] = field(default_factory=list[str])
    histograms: dict[str, Histogram] = field(default_factory=dict[str, Histogram])
    means: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    shifts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    ranges: dict[str, Range] = field(default_factory=dict[str, Range])
    grids: dict[str, Grid] = field(default_factory=dict[str, Grid])
    errors: dict[str, float] = field(default_factory=dict[str, float])
    moments: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    kept: list[str] = field(default_factory=list[str])

    def layers(self) -> list[tuple[fx.Node, str]]:
        """Operators with a bias whose weight is a site, with the weight's name."""
        found: list[tuple[fx.Node, str]] = []
        for site in self.sites:
            for node in site.operators:
                weight: Any = node.args[1]
                plain = weight.op == "get_attr" or weight.target is FAKE_QUANTIZE  # not turned
                if biases.has_bias(node) and plain:
                    found.append((node, site.name))
        return found

    def batches(self, samples: int) -> Batches:
        """Calibration inputs on the device."""
        return Batches(self.program, self.context.task, samples, self.context.device, size=32)

    def skip(self, members: Sequence[Place], reason: str) -> None:
        """Leave places float."""
        for place in members:
            self.notes.append(f"{place.name}: stays float, {reason}")
            self.kept.append(place.name)
            self.grids.pop(place.name, None)
            self.ranges.pop(place.name, None)


def _merged(found: Sequence[Histogram]) -> Histogram:
    """All values of several histograms."""
    total = Histogram(found[0].bins)
    for histogram in found:
        total.merge(histogram)
    return total


def _has_range(histogram: Histogram) -> bool:
    return histogram.total > 0 and not histogram.minimum == histogram.maximum == 0
