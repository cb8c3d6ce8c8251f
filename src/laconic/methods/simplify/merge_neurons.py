"""Equivalent networks: neurons that compute the same become one, dead ones become a bias.

Idea: two channels whose incoming weights are the same, up to a positive factor where everything up
to the readers is positively homogeneous (ReLU, pooling, sums), are one channel; the outgoing
weights of the second, times the factor, are added to those of the first. A channel that is constant
whatever the input is leaves for the next layer's bias. Channels are followed through the groups, so
that a batch norm counts with the layer before it, a residual stream is merged only where every
layer that writes it has the same duplicates, and convolutions and linear layers are one case.

Papers: Srinivas & Babu 2015, "Data-free parameter pruning" (arXiv 1507.06149); Kim et al. 2020,
"Neuron Merging" (2010.13160); Serra et al. 2020, "Lossless compression of deep neural networks"
(2001.00218) for dead units by bounds.

Helps: networks much wider than their task, grown by duplication (Net2Net), trained with strong
weight decay or L1 (dead units), and after quantisation or clustering made rows equal.
Does not: ordinary trained networks with `tolerance` 0 have no exact duplicates, the notes say so;
channels behind a layer norm over them, attention heads, grouped (not depthwise) convolutions. A
constant cannot leave into a convolution that pads with zeros, unless it is zero: at the border the
bias would be wrong.
Cost: the product of all rows of a layer with one another, no data; with `data` or `refit` a
pass over the calibration data.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from laconic.core.errors import RecipeError
from laconic.methods.base import Changes, Context, Method, Outcome
from laconic.program import surgery
from laconic.program.cost import cost
from laconic.program.groups import Groups
from laconic.program.groups import groups as find_groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import duplicates, selection
from laconic.solvers.channels.channel_region import Region, Regions
from laconic.solvers.channels.compensate import compensate
from laconic.solvers.channels.duplicates import Constants, Plan
from laconic.statistics.batches import Batches, Flat, count, told_nothing

_BATCH = 128
_MOST_NOTES = 20


class MergeNeurons(Method):
    """Options of `simplify.merge_neurons`. Sites are names of groups (see `laconic inspect`).

    Attributes:
        duplicates: merge channels that compute the same.
        dead: "provable" removes channels that are constant for every input; "data" also those that
            are constant on the calibration data (a promise about these data only); "none" keeps
            them.
        input_range: range of the model's inputs, if it is known: lets bounds prove more.
        tolerance: 0 merges what is equal up to rounding; above, a channel whose incoming weights
            are within this part of their norm of a multiple of another one's.
        refit: with a tolerance, fit the outgoing weights of the channels that stay by least squares
            on calibration data, starting from those that merging gives.
        samples: calibration samples used by `dead: data`, `refit`, and to measure the change.
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 16}

    duplicates: bool = True
    dead: Literal["provable", "data", "none"] = "provable"
    input_range: tuple[float, float] | None = None
    tolerance: float = Field(default=0.0, ge=0, lt=1)
    refit: bool = False
    samples: int = Field(default=256, ge=1)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Merge, remove, and repeat until nothing more is equal or constant.

        Raises:
            RecipeError: sites match nothing or only groups that cannot shrink; `refit` without
                a tolerance; an empty input range.
            DataError: calibration data that are needed and missing, or do not fit.
        """
        if self.refit and not self.tolerance:
            raise RecipeError("refit needs a tolerance: exact merges leave nothing to fit")
        if self.input_range is not None and self.input_range[0] > self.input_range[1]:
            raise RecipeError(f"input_range {list(self.input_range)} is empty")
        return _Job(self, program, sites, context).run()


class _Job:
    """One application."""

    def __init__(
        self, method: MergeNeurons, program: Program, sites: Sites, context: Context
    ) -> None:
        self.method, self.program, self.sites, self.context = method, program, sites, context
        self.dense = program.clone()
        self.dense.propagate()
        self.before = cost(self.dense)
        self.work = self.dense.clone()
        self.work.propagate()
        self.notes: list[str] = []
        self.changes: Changes = {}
        self.figures: dict[str, dict[str, Any]] = {
            "kept": {}, "dead": {}, "merged": {}, "bound": {}
        }  # fmt: skip
        self._batches: list[Flat] | None = None

    def run(self) -> Outcome:
        """Passes over all groups until one changes nothing."""
        found = find_groups(self.work)
        chosen = selection.chosen(found, self.sites)
        if not chosen:
            self.notes.append("no group of this program can shrink")
        while chosen and self._one_pass(found, chosen):
            found = find_groups(self.work)
        errors = self._refit() if self.changes and self.method.refit else {}
        if chosen and not self.changes:
            self.notes.append("nothing to merge: no channels are equal or constant")
        before, after = self.before, cost(self.work)
        figures = {
            **self.figures,
            "macs": [before.macs, after.macs],
            "parameters": [before.params, after.params],
            "refit_error": errors,
            "output_change": self._change(),
        }
        return Outcome(
            program=self.work,
            resolved=self.method.model_dump(mode="json", exclude_defaults=True),
            changes=self.changes,
            notes=_short(self.notes),
            figures=figures,
        )

    def _one_pass(self, found: Groups, chosen: Sequence[str]) -> bool:
        """Plan every group on the program as it is, then change all at once."""
        regions = self._regions(found, chosen)
        constants = self._constants([region for region in regions.values()])
        plans: dict[str, Plan] = {}
        for name, region in regions.items():
            dead = constants.get(name)
            plan = duplicates.plan(
                self.work, region, dead, self.method.duplicates, self.method.tolerance
            )
            self.notes += plan.notes
            if len(plan.keep) < region.group.size:
                plans[name] = plan
        if not plans:
            return False
        self._write(found, regions, plans)
        return True

    def _regions(self, found: Groups, chosen: Sequence[str]) -> dict[str, Region]:
        finder = Regions(self.work, found)
        held: dict[str, Region] = {}
        for group in found:
            if group.name not in chosen or group.size < 2:
                continue
            region = finder.of(group)
            if isinstance(region, str):
                self.notes.append(f"{group.name} is left alone: {region}")
            else:
                held[group.name] = region
        return held

    def _constants(self, regions: list[Region]) -> dict[str, Constants]:
        method = self.method
        if method.dead == "none":
            return {}
        found = duplicates.provable(self.work, regions, method.input_range)
        if method.dead == "provable":
            return found
        batches = self._data()
        if told_nothing(batches):
            self.notes.append("what is dead on these data: only provably dead channels went")
            return found
        rows = sum(count(self.work, batch) for batch in batches)
        widest = max((region.group.size for region in regions), default=0)
        if rows < widest:
            self.notes.append(
                f"{rows} calibration samples for up to {widest} channels: what is dead on them "
                "may live on others; more samples would help"
            )
        seen = duplicates.observed(self.work, regions, batches)
        return {name: duplicates.either(found[name], seen[name]) for name in found}

    def _write(
        self, found: Groups, regions: Mapping[str, Region], plans: Mapping[str, Plan]
    ) -> None:
        """Give biases where constants need them, change the readers, cut."""
        lacking = [w for n, p in plans.items() for w in duplicates.missing_biases(regions[n], p)]
        given: dict[str, str] = {}
        if lacking:
            duplicates.add_biases(self.dense, lacking)
            given = duplicates.add_biases(self.work, lacking)
            self.work.propagate()
            found = find_groups(self.work)
            finder = Regions(self.work, found)
            fresh = {name: finder.of(found.find(name)) for name in plans}
            regions = {name: r for name, r in fresh.items() if isinstance(r, Region)}
        for name, plan in plans.items():
            duplicates.move(self.work, regions[name], plan, given)
            self._count(name, regions[name], plan)
        keep = {name: torch.tensor(plan.keep) for name, plan in plans.items()}
        self.work, changes = surgery.cut(self.work, keep, found)
        present = {name for name, _ in self.program.tensors()}
        for tensor, dims in changes.items():
            for dim, kept in dims.items() if tensor in present else ():
                held = self.changes.setdefault(tensor, {})
                held[dim] = held[dim][kept] if dim in held else kept

    def _count(self, name: str, region: Region, plan: Plan) -> None:
        figures = self.figures
        first = figures["kept"].get(name, [region.group.size])[0]
        figures["kept"][name] = [first, len(plan.keep)]
        figures["dead"][name] = figures["dead"].get(name, 0) + len(plan.dead)
        figures["merged"][name] = figures["merged"].get(name, 0) + len(plan.into)
        if self.method.tolerance:
            figures["bound"][name] = figures["bound"].get(name, 0.0) + plan.bound

    def _refit(self) -> dict[str, float]:
        report = compensate(
            self.dense, self.work, self.changes, self._data(), consumers_only=True,
            recalibrate=False, seed=self.context.seed, progress=self.context.progress,
        )  # fmt: skip
        self.notes += report.notes
        return report.errors

    def _change(self) -> float:
        """Largest change of an output, relative to the largest output."""
        batches: Sequence[Flat] = [self.program.example]
        if self.method.tolerance or self.method.dead == "data":
            batches = self._data()
        worst = largest = 0.0
        device = next((t.device for _, t in self.program.tensors()), None)
        with torch.no_grad():
            for batch in batches:
                batch = [tensor.to(device) for tensor in batch]
                pairs = zip(self.program.run_flat(*batch), self.work.run_flat(*batch), strict=True)
                for old, new in pairs:
                    if old.is_floating_point() and old.numel():
                        worst = max(worst, float((old - new).abs().max()))
                        largest = max(largest, float(old.abs().max()))
        return worst / max(largest, 1e-30)

    def _data(self) -> list[Flat]:
        if self._batches is None:
            device = next((t.device for _, t in self.program.tensors()), None)
            self._batches = list(
                Batches(self.program, self.context.task, samples=self.method.samples,
                        device=device, size=_BATCH)
            )  # fmt: skip
            self.notes += told_nothing(self._batches)
        return self._batches


def _short(notes: Sequence[str]) -> list[str]:
    once = list(dict.fromkeys(notes))
    more = len(once) - _MOST_NOTES
    return [*once[:_MOST_NOTES], f"and {more} more of this kind"] if more > 0 else once
