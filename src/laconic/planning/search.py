"""The budget loop: candidates from mild to strong, judged on the file that would ship."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from laconic.core.budget import Budget
from laconic.core.errors import BudgetError, LaconicError
from laconic.core.measurement import Measurement
from laconic.core.recipe import Recipe
from laconic.core.task import Task
from laconic.engine.deploy import Deployed, Yard, least
from laconic.engine.result import Candidate
from laconic.engine.run import Bench, Ran, run
from laconic.planning import guard
from laconic.planning.candidates import Chain, finer, paying
from laconic.planning.objective import Objective

_TIE = 0.03  # two files whose latencies differ by less are equally fast here


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate that was run.

    Attributes:
        asked: the recipe as it was asked for.
        ran: what it made.
        way: runtime and precision it was judged in.
        drop: on validation.
        objective: what is minimised, as measured.
        accepted: within the budget and better than the original.
        reason: why (not).
        seconds: wall time.
    """

    asked: Recipe
    ran: Ran
    way: Deployed
    drop: Measurement
    objective: Measurement
    accepted: bool
    reason: str
    seconds: float

    @property
    def name(self) -> str:
        """For a person."""
        return self.asked.name


@dataclass
class Search:
    """The loop's state: what it measures with, and what it has tried."""

    task: Task
    budget: Budget
    bench: Bench
    yard: Yard
    objective: Objective
    tried: list[Tried] = field(default_factory=list[Tried])
    refused: list[str] = field(default_factory=list[str])
    began: float = field(default_factory=time.monotonic)

    def run(self, basics: Sequence[Chain], stronger: Callable[[str], Chain]) -> Tried:
        """Try the basics, then stronger ones of the better kind; the other kind if none will do.

        Args:
            basics: one recipe each.
            stronger: gives the chain that goes on from a basic of that name.

        Returns:
            The strongest candidate that was accepted.

        Raises:
            BudgetError: none was; says what came closest and what would help.
        """
        for chain in basics:
            self._walk(chain)
        for chain in self._by_promise(basics):
            known = len(self.tried)
            self._walk(stronger(chain.name))
            if any(each.accepted for each in self.tried[known:]):
                break
        if self._accepted():  # fewer bits for the one that would be kept, timed beside the others
            self._walk(finer(self._strongest().asked))
        best = self._strongest().asked if self._accepted() else basics[-1].recipes[0]
        self._walk(paying(best, self.budget))
        return self._strongest()

    def _walk(self, chain: Chain) -> None:
        with self.bench.context.progress.task(chain.name, len(chain.recipes)) as bar:
            for recipe in chain.recipes:
                bar.advance(0, recipe.name)
                if not self._time_left(recipe.name) or not self._try(recipe):
                    break
                bar.advance(1, recipe.name)

    def _by_promise(self, basics: Sequence[Chain]) -> list[Chain]:
        """Those within the budget first, then by what is minimised, ties by the file's size."""
        names = {chain.recipes[0].name: chain for chain in basics}
        tried = [each for each in self.tried if each.name in names]
        least_value = min((self._promise(each)[1] for each in tried), default=0.0)

        def rank(each: Tried) -> tuple[bool, bool, int]:
            beyond, value = self._promise(each)
            return beyond, value > least_value * (1 + _TIE), self.objective.file_bytes(each.way)

        return [names[each.name] for each in sorted(tried, key=rank)]

    def _promise(self, each: Tried) -> tuple[bool, float]:
        """Whether it is beyond the budget, and its value as a share of the original's."""
        return not guard.within(each.drop, self.budget), self.objective.relative(each.objective)

    def _accepted(self) -> list[Tried]:
        return [each for each in self.tried if each.accepted]

    def _try(self, recipe: Recipe) -> bool:
        """Run and judge one candidate; False where the chain should end."""
        progress = self.bench.context.progress
        began = time.monotonic()
        try:
            ran = run(self.bench.context.original, recipe, self.bench)
        except LaconicError as error:
            self.refused.append(f"{recipe.name}: {error}")
            progress.say(f"{recipe.name}: {error}")
            return False
        found: Tried | None = None
        for way in self.objective.ways(ran.program):
            found = self._judge(recipe, ran, way, began)
            progress.say(f"{recipe.name} ({way}): {found.objective}, {found.reason}")
            if found.accepted or not self.objective.better(found.objective):
                break
        if found is None:
            self.refused.append(f"{recipe.name}: {self.objective.runtime} cannot run it")
            return False
        self.tried.append(found)
        return guard.within(found.drop, self.budget)

    def _judge(self, asked: Recipe, ran: Ran, way: Deployed, began: float) -> Tried:
        original = self.yard.program_scores(self.bench.context.original, self.task, "validation")
        scores = self.yard.scores(way, self.task, "validation")
        drop = guard.drop(original, scores, self.task, self.budget)
        objective = self.objective.measure(way)
        reason = guard.reason(drop, self.task, self.budget)
        gains = self.objective.better(objective)
        if guard.within(drop, self.budget) and not gains:
            reason = f"{reason}, but no gain over the original's {self.objective.baseline}"
        return Tried(
            asked=asked,
            ran=ran,
            way=way,
            drop=drop,
            objective=objective,
            accepted=gains and guard.within(drop, self.budget),
            reason=reason,
            seconds=time.monotonic() - began,
        )

    def _time_left(self, name: str) -> bool:
        if self.budget.minutes is None or not self.tried:
            return True
        left = 60 * self.budget.minutes - (time.monotonic() - self.began)
        longest = max(each.seconds for each in self.tried)
        if left >= longest:
            return True
        self.refused.append(f"{name} was not tried: {max(left, 0):.0f} s of the time were left")
        return False

    def _strongest(self) -> Tried:
        accepted = self._accepted()
        if not accepted:
            raise BudgetError(_nothing(self), where="budget", hint=_way_out(self))
        again = self.objective.together([each.way for each in accepted])
        settled = [
            replace(each, objective=measured)
            for each, measured in zip(accepted, again, strict=True)
        ]
        self.tried = [next((s for s in settled if s.ran is each.ran), each) for each in self.tried]
        strongest = min((each.objective for each in settled), key=least)
        # on a disturbed machine turns differ by more than the tie: what cannot be told apart ties
        limit = max(least(strongest) * (1 + _TIE), strongest.value)
        best = [each for each in settled if least(each.objective) <= limit]
        return min(best, key=lambda each: self.objective.file_bytes(each.way))

    def candidates(self, chosen: Tried) -> list[Candidate]:
        """What was tried, for the report."""
        return [
            Candidate(
                name=each.name,
                recipe=each.ran.recipe,
                drop=each.drop,
                objective=each.objective,
                accepted=each.accepted,
                chosen=each.ran is chosen.ran,
                reason=each.reason,
                seconds=each.seconds,
                points={"bytes": float(self.objective.file_bytes(each.way))},
            )
            for each in self.tried
        ]


def _nothing(search: Search) -> str:
    unit = "points" if search.task.unit == "%" else search.task.unit
    wanted = f"lose at most {search.budget.max_drop:g} {unit}".strip()
    if not search.tried:
        return f"no recipe could be run under '{wanted}': {'; '.join(search.refused)}"
    gaining = [each for each in search.tried if search.objective.better(each.objective)]
    closest = min(gaining or search.tried, key=lambda each: each.drop.high or 0.0)
    if not gaining:
        return (
            f"nothing is gained: no recipe beats the original's {search.objective.baseline} "
            f"({search.objective.name}); closest was {closest.name!r} with {closest.objective}"
        )
    return f"no recipe can be shown to {wanted}; closest was {closest.name!r}: {closest.reason}"


def _way_out(search: Search) -> str:
    enough = guard.needed(search.task, search.budget)
    count = search.tried[0].drop.repeats if search.tried else 0
    if enough is not None and count < enough:
        return f"give at least {enough} validation samples, or raise --max-drop"
    if search.tried and not any(search.objective.better(each.objective) for each in search.tried):
        return "try another --minimize, --runtime or --batch"
    return "raise --max-drop, or give more validation and training data"
