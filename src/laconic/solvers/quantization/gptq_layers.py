"""Round a whole network to grids, each layer behind those already rounded.

Plain layers go through `compensate`, front to back: moments of the inputs from the network as it is
by then. With `refit`, a layer is first fitted by least squares to what it gave in the network
before, so that it repairs the drift of the layers in front of it, and its scales and its bias are
fitted to the codes it gets; without, its own weights are rounded and nothing else changes (GPTQ as
published). Grouped convolutions and weights that several layers read have no single fit; they are
rounded before, from the moments of their own inputs. Only one layer's moments are held at a time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.solvers.channels.compensate import compensate
from laconic.solvers.least_squares import Fit
from laconic.solvers.portions import MOMENTS, portions
from laconic.solvers.quantization import gptq, weight_rounding
from laconic.solvers.quantization.gptq import Steps
from laconic.solvers.quantization.ranges import Grid
from laconic.solvers.quantization.weight_rounding import Rounding
from laconic.solvers.quantization.weight_sites import WeightSite
from laconic.solvers.setting import Setting
from laconic.solvers.weights import obs_weights
from laconic.solvers.weights.obs_layers import GroupGrams
from laconic.solvers.weights.obs_weights import Rows
from laconic.solvers.weights.weight_scores import INPUT_BATCH, input_place
from laconic.statistics.batches import Flat, told_nothing
from laconic.statistics.collect import collect
from laconic.statistics.convoy import affordable
from laconic.statistics.gram import Gram
from laconic.statistics.layers import Layer, layers


@dataclass(frozen=True)
class Plan:
    """How layers are rounded.

    Attributes:
        samples: calibration samples at most.
        damping: added to the moments, in units of their mean.
        act_order: columns with large moments first.
        passes: of descent behind the sweep.
        refit: fit weights, scales and biases as well.
    """

    samples: int = 512
    damping: float = 0.01
    act_order: bool = True
    passes: int = 4
    refit: bool = True


class Rounder:
    """What rounds the layers of one opened program."""

    def __init__(self, work: Rounding, plan: Plan, setting: Setting) -> None:
        self.work, self.plan, self.setting = work, plan, setting
        self.before = work.program.clone()
        self.sites = {site.name: site for site in work.sites}
        self.readers: dict[str, list[Layer]] = {}
        for layer in layers(work.program):
            if layer.weight in self.sites:
                self.readers.setdefault(layer.weight, []).append(layer)
        self.errors: dict[str, float] = {}

    @torch.no_grad()
    def round(self) -> None:
        """Settle all weights that a layer with known rows reads; the others are noted.

        Raises:
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        if not self.sites:
            return
        batches = self._batches()
        self.work.notes += told_nothing(batches)
        self._apart([n for n, r in self.readers.items() if _is_odd(r)], batches)
        plain = [name for name, found in self.readers.items() if not _is_odd(found)]
        report = compensate(
            self.before,
            self.work.program,
            {},
            batches,
            consumers_only=True,
            seed=self.setting.seed,
            progress=self.setting.progress,
            holds={name: partial(self._hold, name) for name in plain},
        )
        self.work.notes += [n for n in report.notes if "keeps its weights" not in n]
        for site in self.work.open_sites():
            self.work.notes.append(
                f"{site.name}: rounded to nearest, its inputs do not vary, are too large to be "
                "multiplied, or are no rows of columns"
            )

    def _batches(self) -> list[Flat]:
        room = affordable(self.before, walks=2)
        if room < self.plan.samples:
            self.work.notes.append(f"calibration was held to {room} samples: no more fit")
        samples = min(room, self.plan.samples)
        return list(weight_rounding.calibration(self.before, self.setting, samples, INPUT_BATCH))

    # plain layers -----------------------------------------------------------------------------

    def _hold(self, name: str, fit: Fit, gram: Gram, bias: bool, scale: Tensor) -> Fit:
        """What a layer on its grid can hold of a fit."""
        layer, old = self.readers[name][0], self.before.tensor(name).detach()
        bias = bias and self.plan.refit
        seen = gram if bias else gram.raw()
        weight = fit.weight if self.plan.refit else layer.matrix(old).double()
        held = self._zeros(layer, name)
        moments = obs_weights.damped(seen.covariance, max(fit.ridge, self.plan.damping))
        rows = Rows(weight, moments, torch.ones_like(weight[:, 0]), held)
        made = self._settle(layer, layer.weight_from(weight, old), rows)
        if self.plan.refit:
            return obs_weights.refitted(fit, gram, bias, made)
        del scale
        offset = torch.zeros_like(fit.bias)
        if layer.bias is not None:
            offset = self.before.tensor(layer.bias).detach().to(fit.bias)
        return Fit(made, offset, fit.ridge, fit.error)

    def _settle(self, layer: Layer, weight: Tensor, rows: Rows) -> Tensor:
        """Round one weight and settle it; its rows on the grid."""
        site, plan = self.sites[layer.weight], self.plan
        grid = self.work.grid(site, weight)
        steps = _steps(layer, grid, site, weight)
        made = gptq.rounded(rows, steps, act_order=plan.act_order, passes=plan.passes)
        if plan.refit and grid.scale.ndim == 1 and site.axis == layer.out_dim:
            steps, made = gptq.rescaled(rows, steps, made, max(plan.passes, 1))
            grid = weight_rounding.with_scale(grid, steps.scale[:, 0])
        self.work.settle(site, layer.weight_from(made, weight), grid)
        self.errors[layer.weight] = _relative(rows, made)
        return made

    def _zeros(self, layer: Layer, name: str) -> Tensor:
        """The zeros of a pruned weight, which stay zero."""
        weight = layer.matrix(self.before.tensor(name).detach())
        sparse = name in self.work.program.sparse
        return (weight == 0) if sparse else torch.zeros_like(weight, dtype=torch.bool)

    # grouped convolutions, weights that several layers read -----------------------------------

    def _apart(self, names: Sequence[str], batches: Sequence[Flat]) -> None:
        def needed(name: str) -> int:
            columns = self.readers[name][0].matrix(self.before.tensor(name)).shape[1]
            return 8 * sum(layer.groups * columns**2 for layer in self.readers[name])

        for some in portions(names, needed, MOMENTS):
            held = {
                layer.node.name: GroupGrams(layer, len(batches), self.setting.seed)
                for name in some
                for layer in self.readers[name]
            }
            requests = {
                layer.node.name: (layer.node.name, input_place(layer), held[layer.node.name])
                for name in some
                for layer in self.readers[name]
            }
            collect(self.before, batches, requests, self.setting.progress, total=len(batches))
            for name in some:
                self._settle_groups(name, held)

    def _settle_groups(self, name: str, held: Mapping[str, GroupGrams]) -> None:
        first, *others = self.readers[name]
        seen = held[first.node.name]
        if any(other.in_dim != first.in_dim for other in others):
            return  # read transposed as well: no one set of columns
        for other in others:
            seen.merge(held[other.node.name])
        grams = [gram.raw() for gram in seen.grams]
        energy = sum(float(gram.scatter.sum()) for gram in grams)
        if not math.isfinite(energy) or not any(bool(gram.scatter.any()) for gram in grams):
            return
        site, old = self.sites[name], self.before.tensor(name).detach()
        matrix = first.matrix(old).double()
        grid = self.work.grid(site, old)
        steps, zeros = _steps(first, grid, site, old), self._zeros(first, name)
        solved: list[Tensor] = []
        for number, gram in enumerate(grams):
            size = len(matrix) // len(grams)
            part = slice(number * size, (number + 1) * size)
            moments = obs_weights.damped(gram.covariance, self.plan.damping)
            own = Steps(steps.scale[part], steps.zero[part], steps.qmin, steps.qmax)
            rows = Rows(matrix[part], moments, torch.ones_like(matrix[part, 0]), zeros[part])
            plan = self.plan
            solved.append(gptq.rounded(rows, own, act_order=plan.act_order, passes=plan.passes))
        self.work.settle(site, first.weight_from(torch.cat(solved), old), grid)


def _is_odd(readers: Sequence[Layer]) -> bool:
    return len(readers) > 1 or readers[0].groups != 1 or readers[0].shared


def _steps(layer: Layer, grid: Grid, site: WeightSite, weight: Tensor) -> Steps:
    """The grid of a weight as that of the rows of its layer."""
    scale, zero = weight_rounding.steps(grid, site.axis, weight)
    return Steps(layer.matrix(scale).double(), layer.matrix(zero).double(), grid.qmin, grid.qmax)


def _relative(rows: Rows, values: Tensor) -> float:
    """What rounding costs, relative to the energy of the outputs."""
    energy = float(((rows.weight @ rows.moments) * rows.weight).sum())
    return float(gptq.costs(rows, values).sum()) / max(energy, 1e-300)
