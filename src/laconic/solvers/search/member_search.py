"""The search itself: explore a space, promote the best to more data, keep the front."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

from laconic.core.progress import SILENT, Progress
from laconic.solvers.search.search_space import Member, Space
from laconic.solvers.search.strategies import Strategy

_WORST = -1e30  # finite: samplers reckon with it
ETA = 4
"""Each rung has so many times the data of the one before, and takes that part of its members."""
Score = Callable[[Member, float], float]
"""Member and share of the validation data → score, higher is better."""
Costs = Mapping[str, Callable[[Member], float]]
"""By name, the part of the whole network's cost that a member has."""


@dataclass(frozen=True)
class Trial:
    """A member, its score, the share of the data it was scored on, and its costs."""

    member: Member
    score: float
    share: float
    costs: Mapping[str, float]

    def plain(self, space: Space, shown: Callable[[float], float]) -> dict[str, Any]:
        """As JSON; the member by its places among the choices."""
        costs = {name: round(value, 5) for name, value in self.costs.items()}
        score = None if isnan(self.score) else shown(self.score)
        return {"genes": list(space.genes(self.member)), "score": score,
                "share": round(self.share, 4), **costs}  # fmt: skip


def explore(
    strategy: Strategy,
    score: Score,
    costs: Costs,
    trials: int,
    objectives: Sequence[str],
    share: float = 1.0,
    progress: Progress = SILENT,
) -> list[Trial]:
    """So many trials of a strategy, in order; `objectives` are told, costs with a minus."""
    found: list[Trial] = []
    with progress.task("searching", trials) as bar:
        for _ in range(trials):
            member = strategy.ask()
            priced = {name: cost(member) for name, cost in costs.items()}
            trial = Trial(member, score(member, share), share, priced)
            strategy.tell(
                member, [worth(trial) if name == "score" else -priced[name] for name in objectives]
            )
            found.append(trial)
            bar.advance(1, f"best {max(found, key=worth).score:.4g}")
    return found


def promoted(
    found: Sequence[Trial], score: Score, rungs: int, progress: Progress = SILENT
) -> list[Trial]:
    """Successive halving from the first rung on: the best trials, scored on all data.

    Members with the best scores go on to a rung with more data, until all of it is used (Jamieson &
    Talwalkar 2016, arXiv 1502.07943).
    """
    best = _unique(found)
    for rung in range(1, rungs):
        share = float(ETA) ** (rung + 1 - rungs)
        best = sorted(best, key=worth, reverse=True)[: max(len(best) // ETA, 1)]
        best = [
            replace(trial, score=score(trial.member, share), share=share)
            for trial in progress.track(best, f"rung {rung + 1} of {rungs}", len(best))
        ]
    return sorted(best, key=worth, reverse=True)


def front(found: Sequence[Trial], cost: str) -> list[Trial]:
    """The trials that no other one of as much data beats in both score and a cost, cheapest first.

    Those on most data count; where they are few, the front is short.
    """
    most = max((trial.share for trial in found), default=1.0)
    ranked = sorted(
        (t for t in _unique(found) if t.share == most and not isnan(t.score)),
        key=lambda trial: (trial.costs[cost], -trial.score),
    )
    kept: list[Trial] = []
    for trial in ranked:
        if not kept or trial.score > kept[-1].score:
            kept.append(trial)
    return kept


def worth(trial: Trial) -> float:
    """The score; of a member whose outputs are not numbers less than any other."""
    return _WORST if isnan(trial.score) else trial.score


def _unique(found: Sequence[Trial]) -> list[Trial]:
    """Each member once, with the trial on most data."""
    best: dict[tuple[tuple[str, int], ...], Trial] = {}
    for trial in found:
        key = tuple(sorted(trial.member.items()))
        if key not in best or trial.share > best[key].share:
            best[key] = trial
    return list(best.values())
