"""Channels that leave while training goes on: the least active ones, in several small cuts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laconic.program.cost import CostModel
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.program.surgery import Changes, cut_
from laconic.solvers.channels.activity import Activity, Kind
from laconic.solvers.channels.group_choice import Choosing, Of
from laconic.solvers.channels.selection import Keep
from laconic.solvers.weights.elimination import by_score
from laconic.training.attendant import Attendant
from laconic.training.job import Forward, Loss, Objective
from laconic.training.plan import Plan

Cuts = Mapping[int, Mapping[str, Sequence[int]]]


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """When and how much is cut.

    Attributes:
        cuts: how many there are.
        begin, end: shares of the steps: the first cut comes after `begin`, the last one at `end`.
        window: steps before a cut in which activity is measured, at most.
    """

    cuts: int
    begin: float
    end: float
    window: int

    def marks(self, steps: int) -> list[int]:
        """The steps after which something is cut, ascending, each once.

        >>> Timetable(cuts=3, begin=0.1, end=0.7, window=9).marks(100)
        [30, 50, 70]
        """
        span = (self.end - self.begin) / self.cuts
        found = {round((self.begin + span * i) * steps) for i in range(1, self.cuts + 1)}
        return sorted({min(max(mark, 1), steps) for mark in found})


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to go: `ratio` of the cost `of` from groups `names`; the rest as in `Choosing`."""

    names: Sequence[str]
    ratio: float
    of: Of
    scope: Any
    block: int
    adapt: bool
    limit: float


class Shedding(Attendant):
    """Measures activity before every cut and cuts the Program in training.

    Attributes:
        made: step → group → indices that were kept, of the group as it was by then.
        whole: changes from the first Program to the last: tensor → dimension → kept positions.
        notes: sentences for the outcome.
        costs: (step, multiply-adds) at the beginning and after every cut.
        block: kept indices are multiples of it.
    """

    def __init__(
        self, wanted: Wanted, times: Timetable, kind: Kind, replay: Cuts | None = None
    ) -> None:
        """`replay`: cuts that were made before, in place of measuring."""
        self._wanted, self._times, self._replay = wanted, times, replay
        self.block = wanted.block
        self._activity = Activity(kind)
        self._marks: list[int] = []
        self._each = 1
        self.made: dict[int, dict[str, list[int]]] = {}
        self.whole: Changes = {}
        self.notes: list[str] = []
        self.costs: list[tuple[int, int]] = []

    def around(self, objective: Objective) -> Objective:
        """The objective, watched in the steps before a cut."""
        watched = self._activity.watching(objective)

        def either(forward: Forward, batch: Any, number: int) -> Loss:
            step = number // self._each + 1
            seen = self._replay is None and any(
                mark - self._times.window < step <= mark for mark in self._marks
            )
            return (watched if seen else objective)(forward, batch, number)

        return either

    def begin(self, program: Program, plan: Plan) -> None:
        """Find the groups, and what the cost is at first.

        Raises:
            BudgetError: the ratio cannot be reached; says how far it can go and what is in the way.
        """
        self.program = program
        self._each = plan.accumulate or 1
        self._marks = self._times.marks(plan.steps or 1)
        choosing = self._choosing()
        chosen = [choosing.found.find(name) for name in self._wanted.names]
        said = "left whole, features are compared along it"
        self.notes += [f"{group.name}: {said}" for group in chosen if group.frozen is not None]
        self._names = [group.name for group in chosen if group.frozen is None]
        self._aim(choosing)
        self._sizes = {name: choosing.found.find(name).size for name in self._names}
        self._full = choosing.full_cost(self._names)
        self.costs = [(0, CostModel(program, choosing.found).macs({}))]
        if self._replay is None:  # a ratio out of reach is refused before a step is taken
            even = {name: by_score(torch.ones(size)) for name, size in self._sizes.items()}
            choosing.by_removals(even, self._sizes, self._full * (1 - self._wanted.ratio))

    def _choosing(self) -> Choosing:
        wanted = self._wanted
        return Choosing(
            program=self.program, found=groups(self.program), ratio=wanted.ratio, of=wanted.of,
            scope=wanted.scope, block=wanted.block, adapt=wanted.adapt, limit=wanted.limit,
        )  # fmt: skip

    def _aim(self, choosing: Choosing) -> None:
        if self._replay is None:
            chosen = [choosing.found.find(name) for name in self._names]
            blind = self._activity.aim(self.program, chosen)
            self._names = [name for name in self._names if name not in blind]
            self.notes += [f"{name}: left whole, no layer reads or writes it" for name in blind]

    def cut(self, step: int) -> Changes:
        """The cut that is due after a step."""
        if step not in self._marks:
            return {}
        choosing = self._choosing()
        if self._replay is not None:
            held = self._replay.get(step, {})
            keep = {name: torch.tensor(kept) for name, kept in held.items()}
        else:
            keep = self._least(choosing, step)
        return self._cut(choosing, step, keep)

    def _least(self, choosing: Choosing, step: int) -> Keep:
        """What stays: cost falls by the same factor at every cut, to `1 - ratio` at the last."""
        number = self._marks.index(step) + 1
        part = (1 - self._wanted.ratio) ** (number / len(self._marks))
        scores = self._activity.scores()
        removals = {name: by_score(torch.nan_to_num(score)) for name, score in scores.items()}
        return choosing.by_removals(removals, self._sizes, self._full * part)

    def _cut(self, choosing: Choosing, step: int, keep: Keep) -> Changes:
        changes: Changes = {}
        if keep:
            self.made[step] = {name: kept.tolist() for name, kept in sorted(keep.items())}
            changes = cut_(self.program, keep, choosing.found)
            self._remember(changes)
            choosing = self._choosing()
            self.costs.append((step, CostModel(self.program, choosing.found).macs({})))
        self._aim(choosing)
        return changes

    def _remember(self, changes: Changes) -> None:
        for name, dims in changes.items():
            for dim, kept in dims.items():
                before = self.whole.setdefault(name, {})
                before[dim] = before[dim][kept] if dim in before else kept

    def judged(self, step: int) -> bool:
        """Only states after the last cut count."""
        return step >= self._marks[-1]

    def tensors(self) -> Mapping[str, Tensor]:
        """The cuts so far and what was seen since."""
        cuts = {
            f"cut/{step}/{name}": torch.tensor(kept)
            for step, kept_by in self.made.items()
            for name, kept in kept_by.items()
        }
        return {**cuts, **{f"seen/{k}": v for k, v in self._activity.tensors().items()}}

    def reshape(self, tensors: Mapping[str, Tensor]) -> Changes:
        """Make the cuts again that were made before `tensors` were taken."""
        made: dict[int, Keep] = {}
        for key, kept in tensors.items():
            if key.startswith("cut/"):
                _, step, name = key.split("/", 2)
                made.setdefault(int(step), {})[name] = kept
        for step in sorted(made):
            self._cut(self._choosing(), step, made[step])
        return self.whole

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        seen = {k.removeprefix("seen/"): v for k, v in tensors.items() if k.startswith("seen/")}
        self._activity.restore(seen)
