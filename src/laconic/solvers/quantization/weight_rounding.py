"""What methods that put weights on integer grids share: which weights, which grids, and the end.

A method opens a program (`opened`: a copy on the device, batch norm folded, weights chosen), gives
the weights it has worked on their values (`Rounding.settle`), and closes it: every chosen weight
that nobody settled is rounded to nearest, and the nodes that stand for the grids are put in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, fx

from laconic.forms import affine
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.finite import refuse_broken
from laconic.solvers.layers import folding
from laconic.solvers.quantization import insertion, output_ranges, ranges
from laconic.solvers.quantization.kernels import without_kernel
from laconic.solvers.quantization.ranges import Grid
from laconic.solvers.quantization.weight_sites import (
    WeightSite,
    choose_sites,
    weight_sites,
)
from laconic.solvers.setting import Setting
from laconic.statistics.batches import Batches

RESOLVED = 1e-3
"""Share of the weights that have to differ from zero on a grid that is of any use."""


class GridOptions(BaseModel):
    """Options of a method that rounds weights, the same in all of them.

    Attributes:
        bits: of a weight's code, 2 to 16.
        group: weights of an output channel that share a scale; None: all of them.
        symmetric: the grid lies around zero and has an odd number of points; otherwise it has a
            zero point and all of them, which counts at 2 and 3 bits.
        weight_range: how the scale is chosen: "minmax" clips nothing, "mse" for the least squared
            error of the weights, "output" for that of the layer's outputs on calibration data.
        first_last: bits of the first and the last layer; None: like the others.
        freeze: store the weights as integers; the Program then does not train on.
    """

    bits: int = Field(default=4, ge=2, le=16)
    group: int | None = Field(default=None, ge=1)
    symmetric: bool = False
    weight_range: ranges.OutputRule = "mse"
    first_last: int | None = Field(default=8, ge=2, le=16)
    freeze: bool = False


@dataclass
class Rounding:
    """One program whose weights are being rounded.

    Attributes:
        program: a copy; batch norm is folded where it can be.
        sites: the chosen weights, in graph order.
        bits: weight → bits of its codes.
        options: those of the method.
        notes: sentences for the outcome.
        grids: of the weights that have been settled.
        moments: weight → second moments of its inputs, if the weights' ranges need them.
        runtime: whose kernels count.
    """

    program: Program
    sites: list[WeightSite]
    bits: dict[str, int]
    options: GridOptions
    notes: list[str]
    grids: dict[str, Grid] = field(default_factory=dict[str, Grid])
    moments: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    runtime: str = "openvino"

    def grid(self, site: WeightSite, weight: Tensor) -> Grid:
        """The grid for a site whose weight is `weight`."""
        return ranges.weight_grid(
            weight,
            site.axis,
            self.options.weight_range,
            self.bits[site.name],
            group=self._group(site, weight),
            symmetric=self.options.symmetric,
            moments=self.moments.get(site.name),
        )

    def settle(self, site: WeightSite, weight: Tensor, grid: Grid) -> None:
        """Give a site its values, which lie on `grid`; the node is put in by `close`."""
        old = self.program.tensor(site.name)
        self.program.set_tensor(site.name, weight.detach().to(old))
        self.grids[site.name] = grid

    def widen(self, name: str, factor: Tensor) -> None:
        """Multiply the scales of a settled weight, whose values have been, by one for a channel."""
        scale = self.grids[name].scale
        wide = factor.reshape(-1, *[1] * (scale.ndim - 1))
        self.grids[name] = with_scale(self.grids[name], scale * wide)

    def open_sites(self) -> list[WeightSite]:
        """The chosen weights that have not been settled."""
        return [site for site in self.sites if site.name not in self.grids]

    def settle_rest(self) -> None:
        """Round to nearest what has not been settled."""
        for site in self.open_sites():
            weight = self.program.tensor(site.name).detach()
            grid = self.grid(site, weight)
            self.settle(site, ranges.on_grid(weight, site.axis, grid), grid)

    def close(self) -> Program:
        """Round to nearest what is left, put the nodes in; the finished program."""
        self.settle_rest()
        for site in self.sites:
            insertion.quantize_weight(self.program, site, site.axis, self.grids[site.name])
        made = self.program
        made.drop_unused()
        made.recompile()
        self.notes += without_kernel(made, self.runtime)
        return freeze(made) if self.options.freeze else made

    def figures(self) -> dict[str, Any]:
        """Bits of each weight as stored: codes, scales and zero points."""
        found = {
            site.name: stored_bits(self.program.tensor(site.name), site.axis, self.grids[site.name])
            for site in self.sites
        }
        total = sum(self.program.tensor(name).numel() for name in found)
        return {"effective_bits": sum(found.values()) / max(total, 1), "weights": len(found)}

    def _group(self, site: WeightSite, weight: Tensor) -> int | None:
        """The group that a site can have; one that does not divide is noted."""
        wanted = self.options.group
        if wanted is None or site.axis is None:
            return None
        size = weight.numel() // weight.shape[site.axis]
        if wanted < size and size % wanted == 0:
            return wanted
        note = f"{site.name}: one scale a channel, {size} weights are no multiple of {wanted}"
        if size % wanted and note not in self.notes:
            self.notes.append(note)
        return None


def opened(program: Program, sites: Sites, options: GridOptions, setting: Setting) -> Rounding:
    """A copy of `program` with its weights chosen; sites are names of weights.

    Raises:
        RecipeError: sites that match nothing.
        DataError: a parameter holds NaN or infinite values; for ranges by outputs, calibration data
            that are missing or unfit.
    """
    refuse_broken(program)
    copied = program.clone().to(setting.device)
    folded = folding.fold_batch_norms(copied, forwards=False)
    copied.propagate()
    found, notes = weight_sites(copied)
    names = set(choose_sites(copied, sites, [site.name for site in found]))
    bits = _bits(copied, found, options)
    work = Rounding(copied, [], bits, options, [*folded.notes, *notes], runtime=setting.runtime)
    if options.weight_range == "output":
        batches = list(calibration(copied, setting, output_ranges.SAMPLES))
        work.moments = output_ranges.moments(copied, names, batches, setting.progress)
    for site in found:
        if site.name in names and _can(work, site):
            work.sites.append(site)
    if not work.sites:
        work.notes.append("nothing to quantise: no float weight of a known operator is left")
    return work


def _can(work: Rounding, site: WeightSite) -> bool:
    """Whether a grid of the weight would be of any use; otherwise it is noted why not."""
    weight = work.program.tensor(site.name).detach()
    there = int(weight.count_nonzero())
    grid = work.grid(site, weight)
    left = int(ranges.on_grid(weight, site.axis, grid).count_nonzero())
    if left < RESOLVED * there:
        work.notes.append(
            f"{site.name}: stays float, outliers of {float(weight.abs().max()):.3g} stretch its "
            f"grid until {left} of {there} weights differ from zero"
        )
        return False
    return True


def _bits(program: Program, found: Sequence[WeightSite], options: GridOptions) -> dict[str, int]:
    """Bits of each weight; the first and the last are those of all operators of the graph."""
    bits = {site.name: options.bits for site in found}
    if options.first_last is None:
        return bits
    place: dict[fx.Node, int] = {node: i for i, node in enumerate(program.graph.nodes)}
    ordered = [(place[node], site.name) for site in found for node in site.operators]
    for _, name in (min(ordered), max(ordered)) if ordered else ():
        bits[name] = options.first_last
    return bits


def stored_bits(weight: Tensor, axis: int | None, grid: Grid) -> int:
    """Bits of a weight on a grid as stored before entropy coding: codes, scales, zero points.

    `weight` may hold values or, frozen, codes.
    """
    parts = (grid.scale, grid.zero_point, axis, grid.qmin, grid.qmax)
    codes = weight if not weight.is_floating_point() else affine.encode(weight.detach(), *parts)
    return 8 * affine.Affine(codes, *parts).nbytes()


def steps(grid: Grid, axis: int | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every weight, float32 in the weight's own shape."""
    ones = torch.ones_like(weight, dtype=torch.int32)
    zero = torch.zeros_like(grid.zero_point)
    scale = affine.decode(ones, grid.scale, zero, axis)
    return scale, affine.decode(ones, torch.ones_like(grid.scale), 1 - grid.zero_point, axis)


def with_scale(grid: Grid, scale: Tensor) -> Grid:
    """The grid with other scales, of the same shape, kept positive."""
    floor = torch.finfo(torch.float32).tiny
    return replace(grid, scale=scale.to(grid.scale).reshape(grid.scale.shape).clamp(min=floor))


def calibration(program: Program, setting: Setting, samples: int, size: int = 64) -> Batches:
    """Calibration inputs on the device."""
    return Batches(program, setting.task, samples, setting.device, size)
