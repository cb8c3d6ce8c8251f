"""Bits for each weight: few where they do no harm, more where they do, under one budget of bytes.

Every weight is put on grids of several widths, one at a time, and what that does to the network is
measured (`harm`); a knapsack then picks a width for each weight, so that together they do least
harm at `mean_bits` a weight, scales counted.

Papers: Dong et al. 2019, "HAWQ" (arXiv 1905.03696) for sensitivities; Shoham & Gersho 1988 for the
allocation. `harm: output` is a measurement, not an estimate; harms of several weights are added.

Helps: files: at equal bytes a mixed network loses less than a uniform one, most of all below 5
bits. Run a rounding method on the same weights afterwards, or train, to gain some of it back.
Does not: speed; no CPU runtime is faster with 3-bit than with 8-bit weights. Networks whose layers
are all alike gain little.
Cost: `harm: output`: half a pass over `samples` samples for every weight and width, `loss`: a whole
one; `fisher`: one backward pass over them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import fx

from laconic.core.errors import BudgetError, RecipeError
from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization import insertion, ranges, weight_rounding
from laconic.solvers.quantization.weight_rounding import GridOptions, Rounding
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.solvers.search import knapsack
from laconic.solvers.sensitivity import output_errors
from laconic.solvers.teaching.task_loss import TaskLoss
from laconic.solvers.weights.curvature import Weighted

Harms = dict[str, dict[int, float]]
_BATCH = 64


class QuantizeMixed(Method):
    """Options of `quantize.mixed`. Sites are names of weights.

    Attributes:
        mean_bits: budget: bits a weight on average, scales and zero points counted.
        widths: what a weight may have, each 2 to 8.
        harm: how harm is told: "output" measures how far the outputs move, "loss" how much the
            task's loss rises (without labels: the divergence from the original), "fisher" adds up
            squared errors of weights times their mean squared gradients.
        samples: calibration samples.
        group: weights of an output channel that share a scale; None: all of them.
        symmetric: the grid lies around zero; otherwise it has a zero point.
        weight_range: "minmax" clips nothing, "mse" for the least squared error of the weights,
            "output" for that of the layer's outputs.
        freeze: store the weights as integers; the Program then does not train on.
        bits: resolved: weight → its width, instead of measuring.
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8, "widths": (3, 8), "mean_bits": 32.0}

    mean_bits: float = Field(default=4.0, gt=1, le=32)
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    harm: Literal["output", "loss", "fisher"] = "output"
    samples: int = Field(default=128, ge=1)
    group: int | None = Field(default=None, ge=1)
    symmetric: bool = False
    weight_range: ranges.OutputRule = "mse"
    freeze: bool = False
    bits: dict[str, int] | None = None

    @field_validator("widths")
    @classmethod
    def _widths_are_bits(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        bad = [width for width in widths if not 2 <= width <= 8]
        if bad or not widths:
            raise ValueError(f"widths {list(widths)}: expected some of 2 to 8 bits")
        return tuple(sorted(set(widths)))

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Choose and set the widths; what is chosen stands in the resolved option `bits`.

        Raises:
            RecipeError: sites that match nothing; resolved bits that do not fit the program.
            BudgetError: not even the narrowest widths keep the budget; says how low it can go.
            DataError: no calibration data, or NaN or infinite values; names the node.
        """
        options = GridOptions(
            bits=max(self.widths), group=self.group, symmetric=self.symmetric,
            weight_range=self.weight_range, first_last=None, freeze=self.freeze,
        )  # fmt: skip
        work = weight_rounding.opened(program, sites, options, context)
        if not work.sites:
            return Outcome(program=work.program, notes=work.notes)
        harms: Harms = {}
        if self.bits is None:
            harms = self._harms(work, context)
            chosen = self._choose(work, harms)
        else:
            chosen = self._resolved_bits(work)
        work.bits |= chosen
        made = work.close()
        return Outcome(
            program=made,
            resolved={**self.model_dump(mode="json", exclude_defaults=True), "bits": chosen},
            notes=work.notes,
            figures={**work.figures(), "bits": chosen, "harm": harms},
        )

    def _harms(self, work: Rounding, context: Context) -> Harms:
        """What every width of every weight does to the network."""
        if self.harm == "fisher":
            return self._curvature(work, context)
        if self.harm == "loss":
            return self._losses(work, context)
        probe = work.program.clone()
        names = {site.name for site in work.sites}
        held = {site.name: site for site in weight_sites(probe)[0] if site.name in names}
        nodes: dict[str, list[fx.Node]] = {}
        for name, site in held.items():
            for width in self.widths:
                grid = self._grid(work, name, width)
                nodes[f"{width} {name}"] = [insertion.quantize_weight(probe, site, site.axis, grid)]
        probe.recompile()
        batches = list(weight_rounding.calibration(probe, context, self.samples, _BATCH))
        errors = output_errors(probe, nodes, batches, context.progress)
        return {name: {w: errors[f"{w} {name}"] for w in self.widths} for name in held}

    def _losses(self, work: Rounding, context: Context) -> Harms:
        loss = TaskLoss(context.task, context.original, self.samples, context.device)
        probe = work.program.clone()
        found, start = Harms(), loss(probe)
        for site in context.progress.track(work.sites, "measuring losses", len(work.sites)):
            weight, found[site.name] = work.program.tensor(site.name), {}
            for width in self.widths:
                grid = self._grid(work, site.name, width)
                probe.set_tensor(site.name, ranges.on_grid(weight.detach(), site.axis, grid))
                found[site.name][width] = max(loss(probe) - start, 0.0)
            probe.set_tensor(site.name, weight)
        return found

    def _curvature(self, work: Rounding, context: Context) -> Harms:
        names = [site.name for site in work.sites]
        told = Weighted(weighted="fisher", samples=self.samples)
        counted = told.counted(work.program, names, context)
        found: Harms = {}
        for site in work.sites:
            weight = work.program.tensor(site.name).detach()
            if site.name not in counted:
                work.notes.append(f"{site.name}: the data say nothing of it, all errors count 0")
            importance = counted.get(site.name, torch.zeros_like(weight))
            found[site.name] = {}
            for width in self.widths:
                on = ranges.on_grid(weight, site.axis, self._grid(work, site.name, width))
                off = (on.double() - weight.double()).square() * importance.double()
                found[site.name][width] = float(off.sum())
        return found

    def _grid(self, work: Rounding, name: str, width: int) -> ranges.Grid:
        site = next(site for site in work.sites if site.name == name)
        work.bits[name] = width
        return work.grid(site, work.program.tensor(name).detach())

    def _choose(self, work: Rounding, harms: Harms) -> dict[str, int]:
        """The widths with the least sum of harms within the budget."""
        items: list[Sequence[knapsack.Option]] = []
        count = 0
        for site in work.sites:
            weight = work.program.tensor(site.name)
            count += weight.numel()
            options: list[knapsack.Option] = []
            for width in self.widths:
                grid = self._grid(work, site.name, width)
                stored = weight_rounding.stored_bits(weight.detach(), site.axis, grid)
                options.append((stored, harms[site.name][width]))
            items.append(options)
        places = knapsack.choose(items, self.mean_bits * count)
        if places is None:
            least = sum(min(cost for cost, _ in options) for options in items) / count
            raise BudgetError(
                f"{self.mean_bits:g} bits a weight cannot be kept",
                where="quantize.mixed mean_bits",
                hint=f"with widths {list(self.widths)} and their scales it goes down to "
                f"{least:.3g}; allow narrower ones",
            )
        names = [site.name for site in work.sites]
        return {name: self.widths[place] for name, place in zip(names, places, strict=True)}

    def _resolved_bits(self, work: Rounding) -> dict[str, int]:
        assert self.bits is not None
        missing = [site.name for site in work.sites if site.name not in self.bits]
        if missing:
            raise RecipeError(
                f"no bits for {missing[0]}",
                where="quantize.mixed bits",
                hint="resolved bits belong to the very program they were measured on; "
                "leave 'bits' out to measure again",
            )
        return {site.name: self.bits[site.name] for site in work.sites}
