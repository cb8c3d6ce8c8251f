"""Choosing which indices of groups go, cutting them, and refitting what is left.

What the structured pruning methods share: which data they see, the order of scoring, allocating,
cutting and compensating, and the numbers that they report. A method says which groups and how much.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from laconic.program.cost import CostModel, cost
from laconic.program.groups import Groups, groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.program.surgery import Changes, cut
from laconic.solvers.channels import channel_block, selection
from laconic.solvers.channels.allocate import Of, Scope
from laconic.solvers.channels.compensate import Report, compensate
from laconic.solvers.channels.selection import Keep, Wish
from laconic.solvers.finite import refuse_broken
from laconic.solvers.importance.base import Scene
from laconic.solvers.recalibrate import norms
from laconic.solvers.search.latency_budget import Goal
from laconic.solvers.search.stopwatch import Stopwatch, Timer
from laconic.solvers.setting import Setting
from laconic.statistics.batches import Batches, Flat, told_nothing
from laconic.statistics.convoy import affordable
from laconic.statistics.gradients import sampled_loss

Against = Literal["input", "original"]

_BATCH = 128  # samples that go through the network side by side


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How groups are shrunk.

    Attributes:
        ratios: glob → part of the cost that is to go from the groups it matches.
        of: the cost.
        against: what a ratio is a part of: the cost of the program given, or of the run's original.
        importance: name of a score.
        scope: "global" or "layer".
        block: kept indices are multiples of it; "auto" measures which one the runtime likes.
        limit: largest part of one group that may go.
        compensate: refit what is left by least squares.
        refit: which layers.
        recalibrate: measure batch norms anew that no refit rewrote.
        rounds: cut in so many steps.
        samples: calibration samples at most.
        temperature: of the predictions that labels are drawn from.
    """

    ratios: Mapping[str, float]
    of: Of = "macs"
    against: Against = "input"
    importance: str = "obs"
    scope: Scope = "global"
    block: Literal["auto"] | int = 1
    limit: float = 0.9
    compensate: bool = True
    refit: Literal["all", "consumers"] = "all"
    recalibrate: bool = True
    rounds: int = 1
    samples: int = 1024
    temperature: float = 4.0


@dataclass(frozen=True)
class Shrunk:
    """What came of it, in the terms of an `Outcome`."""

    program: Program
    changes: Changes
    notes: list[str] = field(default_factory=list[str])
    figures: dict[str, Any] = field(default_factory=dict[str, Any])


class Shrinking:
    """One application: the dense program on its device, its groups, its data.

    Attributes:
        dense: the program, in eval mode on the context's device.
        found: its groups.
        notes: sentences so far.
    """

    def __init__(
        self, plan: Plan, program: Program, context: Setting, timer: Timer | None = None
    ) -> None:
        """`timer` measures milliseconds; None is a stopwatch in the context's runtime.

        Raises:
            DataError: a parameter holds NaN or infinite values.
        """
        refuse_broken(program)
        self.plan, self.context = plan, context
        self.dense = _ready(program, context.device)
        self.found: Groups = groups(self.dense)
        self.notes: list[str] = []
        self._device = _device(program)
        self._batches: list[Flat] | None = None
        timer = timer or Stopwatch(context.runtime, context.threads)
        self._latency = Goal(self._whole(), timer, self.notes)

    def _whole(self) -> Program:
        """The program that ratios are parts of."""
        if self.plan.against == "input":
            return self.dense
        return _ready(self.context.original, self.context.device)

    def choose(self, names: Sequence[str]) -> tuple[Keep, int | str]:
        """Score and allocate among groups: the kept indices and the block that was used.

        Raises:
            BudgetError: the ratio cannot be reached; says how far it can go, what is in the way.
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        plan = self.plan
        if not names:
            self.notes += [f"{group.name}: {group.frozen}" for group in self.found.frozen]
            self.notes.append("no group of this program can shrink")
            return {}, plan.block
        if not any(plan.ratios.values()):
            self.notes.append("ratio is 0: nothing is cut")
            return {}, plan.block
        block = plan.block
        if isinstance(block, str):
            block = channel_block.block_for(self.context.runtime, self.context.threads)
        score = selection.load(plan.importance)
        scene = Scene(
            self.dense,
            (),
            self.batches() if score.needs_data else (),
            sampled_loss(self.context.task, self.context.generator(), plan.temperature),
            self.context.seed,
            self.context.progress,
            self.notes,
        )
        wishes = self._wishes(names, block)
        keep = selection.select(scene, self.found, wishes, plan.rounds, self._shrink, self._latency)
        return keep, block

    def _wishes(self, names: Sequence[str], block: int) -> list[Wish]:
        """One wish for every pattern of the ratios."""
        plan = self.plan
        wishes: list[Wish] = []
        left = list(names)
        for pattern, ratio in plan.ratios.items():
            chosen = Sites.of(pattern).choose(left)
            left = [name for name in left if name not in chosen]
            wishes.append(
                Wish(
                    tuple(chosen),
                    self._part(ratio),
                    plan.of,
                    plan.importance,
                    plan.scope,
                    block,
                    plan.block == "auto",
                    plan.limit,
                )
            )
        return wishes

    def _part(self, ratio: float) -> float:
        """A ratio as a part of what the program given costs; latencies are measured."""
        plan = self.plan
        if plan.against == "input" or plan.of == "ms":
            return ratio
        whole, now = cost(self._whole()), cost(self.dense)
        larger = whole.macs / now.macs if plan.of == "macs" else whole.params / now.params
        return max(0.0, 1 - (1 - ratio) * larger)

    def _shrink(self, keep: Keep) -> tuple[Program, Groups]:
        small = self._cut(keep)[0]
        return small, groups(small)

    def _cut(self, keep: Keep) -> tuple[Program, Changes, Report]:
        """Cut and compensate."""
        plan = self.plan
        small, changes = cut(self.dense, keep, self.found)
        wanted = plan.compensate or (plan.recalibrate and bool(norms(small)))
        if not changes or not wanted:
            return small, changes, Report()
        report = compensate(
            self.dense,
            small,
            changes,
            self.batches(),
            refit=plan.compensate,
            consumers_only=plan.refit == "consumers",
            recalibrate=plan.recalibrate,
            seed=self.context.seed,
            progress=self.context.progress,
        )
        return small, changes, report

    def batches(self) -> list[Flat]:
        """The calibration data, as many samples as fit into memory in both programs."""
        if self._batches is None:
            afford = affordable(self.dense, walks=2)
            if afford < self.plan.samples:
                self.notes.append(
                    f"calibration was held to {afford} samples, more do not fit into memory"
                )
            samples = min(self.plan.samples, afford)
            held = Batches(
                self.dense, self.context.task, samples=samples, device=self.context.device,
                size=_BATCH,
            )  # fmt: skip
            self._batches = list(held)
            self.notes += told_nothing(self._batches)
        return self._batches

    def finish(self, keep: Keep) -> Shrunk:
        """Cut and compensate; the program on the device that it came from."""
        small, changes, report = self._cut(keep)
        if _device(small) != self._device:
            small = small.to(self._device)
        model = CostModel(self.dense, self.found)
        sizes = {name: len(kept) for name, kept in keep.items()}
        figures: dict[str, Any] = {
            "macs": [model.macs({}), model.macs(sizes)],
            "parameters": [model.params({}), model.params(sizes)],
            "kept": {name: [self.found.find(name).size, size] for name, size in sizes.items()},
            "refit_error": report.errors,
            "recalibrated": len(report.recalibrated),
        }
        latency = self._latency.figures()
        if latency:
            asked = {"runtime": self.context.runtime, "threads": self.context.threads}
            figures["latency"] = {**asked, "precision": "fp32", "batch": 1, **latency}
        notes = [*dict.fromkeys([*self.notes, *report.notes])]
        return Shrunk(small, changes, notes, figures)


def _ready(program: Program, device: torch.device) -> Program:
    """The program in eval mode on `device`; the input is left as it is."""
    if not program.training and _device(program) == device:
        return program
    work = program.clone()
    return work if _device(work) == device else work.to(device)


def _device(program: Program) -> torch.device:
    return next((tensor.device for _, tensor in program.tensors()), torch.device("cpu"))
