"""Find the best sub-network of a network for a budget.

Idea: a network is the largest of many that its weights hold already: narrower, shallower, of
smaller kernels or inputs, of fewer bits. A member is cut out, its batch norms are measured anew,
and it is scored as it is; a strategy proposes the next one. Multiply-adds, bytes and foretold
milliseconds cost nothing to evaluate, so only members within the budget are looked at. After
`nas.supernet` (say `importance: leading`, and its space) the scores are those of trained networks;
of any other network they rank what a cut leaves, and training has to follow.

Architecture, pruning and bits share one budget: `{"width:*": [1.0, 0.5], "bits:*": [8, 4]}` under
`size: 0.2`.

Strategies: random; regularised evolution (Real et al. 2019, arXiv 1802.01548); TPE and NSGA-II
through Optuna (extra `search`). Scores: inherited weights (Bender et al. 2018; Yu et al. 2020,
"BigNAS", 2003.11142); a ridge regression fitted to a part of the trials that foretells the others;
zero-cost proxies (synflow, jacobian, zico) for networks that are not trained. `rungs` above 1 looks
at many members on few validation samples and at the best of them on more (successive halving).

Helps: one trained supernet and several budgets; choices that differ between layers.
Does not: without trained sub-networks at strong budgets, where what a cut leaves says little about
what training would make of it; there `prune.channels` compensates and `nas.supernet` trains.

Cost: one forward pass over `samples` and `validation` for each trial; latency needs a table of
layers, measured once. What was evaluated is kept in the working folder, so that a search that was
stopped, or another budget, goes on from there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from laconic.core.errors import BudgetError, DataError
from laconic.methods.base import Changes, Context, Method, Outcome
from laconic.program.freezing import freeze, is_frozen
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import ranking, selection
from laconic.solvers.search import member_search, search_space
from laconic.solvers.search.elastic import FLOAT_BITS, Cut, Elastic, declare
from laconic.solvers.search.member_costs import Prices
from laconic.solvers.search.member_latency import Milliseconds
from laconic.solvers.search.member_scores import Judge, Kept
from laconic.solvers.search.member_search import ETA, Costs, Score, Trial
from laconic.solvers.search.proxies import PROXIES
from laconic.solvers.search.score_model import ScoreModel
from laconic.solvers.search.search_space import DEFAULT, Member, Space
from laconic.solvers.search.stopwatch import Stopwatch
from laconic.solvers.search.strategies import Evolution, Random, Strategy, Within
from laconic.statistics.batches import Batches
from laconic.statistics.gradients import sampled_loss
from laconic.training.checkpoint import identity_of
from laconic.training.feed import beginnings

By = Literal["inherited", "predictor", "synflow", "jacobian", "zico"]
_MODEL_TRIALS = 10  # proposals that the predictor judges, for each trial that is run
_PROXY_BATCH = 32
_PROXY_BATCHES = 4
_TRIES = 4  # whole networks that are timed until one is as fast as it was foretold


class Search(Method):
    """Find the best member of a space within a budget. Sites are what varies, as in `nas.supernet`.

    Attributes:
        space: "kind:glob" → choices, as in `nas.supernet`; kind bits (2 to 16) rounds weights.
        macs, size, latency: parts of the program's multiply-adds, bytes and measured milliseconds
            that may stay.
        strategy: "random", "evolution", or, through Optuna, "tpe" and "nsga2".
        trials: members that are looked at.
        by: what scores them.
        objectives: of nsga2: the score and the costs that are traded against it.
        rungs: of successive halving; each has 4 times the validation samples of the one before.
        samples: calibration samples that batch norms are measured on.
        validation: validation samples of the last rung, evenly spread over a list of batches or
            the data set of a `DataLoader`.
        importance: what tells the good channels: a score of `prune.channels`, or "leading" where
            `nas.supernet` has sorted them.
        order: knob → its indices, best first, in place of scoring (a replay has it).
        member: the member, in place of searching (a replay has it).
    """

    quick: ClassVar[Mapping[str, Any]] = {
        "space": {"width:*": [1.0, 0.5], "depth:*": [1.0, 0.5]}, "macs": 0.99, "trials": 2,
        "strategy": "random", "samples": 8, "validation": 8, "importance": "l2",
    }  # fmt: skip

    space: dict[str, list[int | float]] = Field(
        default_factory=lambda: {pattern: list(choices) for pattern, choices in DEFAULT.items()}
    )
    macs: float | None = Field(default=None, gt=0, le=1)
    size: float | None = Field(default=None, gt=0, le=1)
    latency: float | None = Field(default=None, gt=0, le=1)
    strategy: Literal["random", "evolution", "tpe", "nsga2"] = "evolution"
    trials: int = Field(default=64, ge=1)
    by: By = "inherited"
    objectives: tuple[Literal["score", "macs", "size", "latency"], ...] = ("score",)
    rungs: int = Field(default=1, ge=1, le=4)
    samples: int = Field(default=256, ge=1)
    validation: int = Field(default=1024, ge=1)
    importance: str = "l2"
    order: dict[str, list[int]] | None = None
    member: dict[str, int] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        search_space.check_wishes(self.space)
        if self.importance != "leading":
            selection.check(0.0, self.importance)
        if self.objectives[:1] != ("score",) or len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives begin with score, and name nothing twice")
        if len(self.objectives) > 1 and self.strategy in ("evolution", "tpe"):
            raise ValueError(f"{self.strategy} takes the score alone; nsga2 trades several")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Search, cut the best member out and measure its batch norms; the input stays as it was.

        Raises:
            RecipeError: sites or patterns that match nothing, a resolution it does not take.
            BudgetError: the space has no member within the budget.
            DataError: data that are missing or do not fit, scores that are all NaN.
            MissingExtra: Optuna is needed and not installed.
        """
        elastic = Elastic(program)
        space, notes = declare(elastic, self.space, sites)
        own = self.model_dump(mode="json", exclude_defaults=True)
        if not space.knobs:
            notes.append("nothing of this program is elastic")
            return Outcome(program=program.clone(), resolved=own, notes=notes)
        order = self.order
        if order is None:
            order = {}
            if self.importance != "leading":
                order = ranking.rank(elastic, space, self.importance, self.samples, context, notes)
        identity = ""
        if context.workdir is not None:
            task = context.task
            seen = beginnings([task.validation, task.calibration or task.train])
            told = [space.plain(), order, self.samples, context.seed, *seen]
            identity = identity_of(told, [program, context.original])
        kept = Kept(context.workdir, identity)
        judge = Judge(
            elastic, order, context, kept, samples=self.samples, validation=self.validation
        )
        hunt = _Hunt(self, elastic, space, order, context, kept, judge, notes)
        if self.member is None:
            member, figures = hunt.run()
        else:
            member, figures = space.checked(self.member), {}
        cut = elastic.cut(member, order)
        judge.recalibrate(cut.program)
        rounded = any(bits < FLOAT_BITS for _, bits in search_space.named(member, "bits"))
        held = {name: list(indices) for name, indices in order.items()}
        return Outcome(
            program=freeze(cut.program) if rounded or is_frozen(program) else cut.program,
            resolved={**own, "space": space.plain(), "order": held, "member": member},
            changes=_changes(program, cut),
            notes=notes,
            figures={**figures, **hunt.price(member), "space": space.plain()},
        )


@dataclass
class _Hunt:
    """One search."""

    method: Search
    elastic: Elastic
    space: Space
    order: Mapping[str, Sequence[int]]
    context: Context
    kept: Kept
    judge: Judge
    notes: list[str]

    def __post_init__(self) -> None:
        self.prices = Prices(self.elastic, self.order)
        self.clock: Milliseconds | None = None

    def price(self, member: Member) -> dict[str, Any]:
        """What the whole network and a member cost."""
        before, after = self.prices(self.space.full()), self.prices(member)
        return {
            "macs": [before.macs, after.macs],
            "parameters": [before.parameters, after.parameters],
            "bytes": [before.bytes, after.bytes],
        }

    def run(self) -> tuple[Member, dict[str, Any]]:
        """The best member and what the search found."""
        costs = self._costs()
        limits = {name: getattr(self.method, name) for name in costs}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        if not limits and len(self.method.objectives) == 1:
            self.notes.append("no budget was given: the whole network will score best")
        found, correlation = self._found(costs, self._within(costs, limits))
        best = self._best(found)
        measured: tuple[float, float] | None = None
        if self.clock is not None and "latency" in limits:
            best, measured, more = self._fast(best, found, costs, limits)
            found += more
        shown = self.judge.shown if self.method.by in ("inherited", "predictor") else float
        cost = next(iter(limits), "macs")
        figures: dict[str, Any] = {
            "score": shown(best.score),
            "front": [t.plain(self.space, shown) for t in member_search.front(found, cost)],
            "history": [trial.plain(self.space, shown) for trial in found],
            "members": self.space.members(),
            "evaluated": self.judge.evaluated,
        }
        if measured is not None:
            figures["milliseconds"] = [round(value, 6) for value in measured]
        if correlation is not None:
            figures["predictor_correlation"] = correlation
        return best.member, figures

    def _costs(self) -> Costs:
        """Parts of the whole network's costs: multiply-adds always, others where they are asked."""
        whole = self.prices(self.space.full())
        wanted = {"macs", *self.method.objectives[1:]}
        wanted |= {name for name in ("size", "latency") if getattr(self.method, name) is not None}
        costs: dict[str, Any] = {
            "macs": lambda member: self.prices.macs(member) / max(whole.macs, 1),
            "size": lambda member: self.prices(member).bytes / max(whole.bytes, 1),
        }
        if "latency" in wanted:
            self.clock = self._clock()
            costs["latency"] = self.clock.part
        return {name: costs[name] for name in costs if name in wanted}

    def _clock(self) -> Milliseconds:
        context = self.context
        timer = Stopwatch(context.runtime, context.threads)
        key = f"latency {context.runtime} {context.threads}"
        held = self.kept.get(key)
        clock = Milliseconds(
            self.elastic, self.order, self.space, timer, held=held, progress=context.progress
        )
        if held is None:
            self.kept.put(key, clock.plain())
        self.notes += clock.notes
        return clock

    def _within(self, costs: Costs, limits: Mapping[str, float]) -> Within:
        def excess(member: Member) -> float:
            return max((costs[n](member) / limit - 1 for n, limit in limits.items()), default=-1.0)

        return Within(self.space, excess)

    # exploring ----------------------------------------------------------------------------

    def _found(self, costs: Costs, within: Within) -> tuple[list[Trial], float | None]:
        """All trials, those on most data last, and how well the predictor did, if there is one."""
        method, progress = self.method, self.context.progress
        share = float(ETA) ** (1 - method.rungs)
        strategy = self._strategy(within)
        if method.by in PROXIES:
            score, share = self._proxy(method.by), 1.0
            return member_search.explore(
                strategy, score, costs, method.trials, method.objectives, 1.0, progress
            ), None
        if method.by == "inherited":
            found = member_search.explore(
                strategy, self.judge, costs, method.trials, method.objectives, share, progress
            )
            return found + self._better(found), None
        found = member_search.explore(
            Random(within, self.context.generator()), self.judge, costs,
            max(method.trials // 2, 2), ("score",), share, progress,
        )  # fmt: skip
        known = [trial for trial in found if not isnan(trial.score)]
        if len(known) < 2:
            self._best(found)
            known = found
        model = ScoreModel(self.space, [t.member for t in known], [t.score for t in known])
        foretold = member_search.explore(
            strategy, lambda member, _: model(member), costs, _MODEL_TRIALS * method.trials,
            method.objectives, share,
        )  # fmt: skip
        ranked = sorted(foretold, key=lambda trial: -trial.score)
        unique = {self.space.genes(trial.member): trial for trial in ranked}
        for trial in list(unique.values())[: max(method.trials // 2, 1)]:
            score = self.judge(trial.member, share)
            found.append(Trial(trial.member, score, share, trial.costs))
        return found + self._better(found), model.correlation

    def _better(self, found: list[Trial]) -> list[Trial]:
        """The best trials on all validation samples, if they were not."""
        if self.method.rungs == 1:
            return []
        return member_search.promoted(found, self.judge, self.method.rungs, self.context.progress)

    def _strategy(self, within: Within) -> Strategy:
        method, generator = self.method, self.context.generator()
        if method.strategy == "random":
            return Random(within, generator)
        if method.strategy == "evolution":
            return Evolution(within, generator)
        from laconic.solvers.search.optuna_search import Optuna  # noqa: PLC0415 - an extra

        return Optuna(within, method.strategy, len(method.objectives), self.context.seed)

    def _proxy(self, name: str) -> Score:
        """A proxy on a few calibration batches."""
        context = self.context
        device = next((t.device for _, t in self.elastic.program.tensors()), context.device)
        batches = list(
            Batches(
                self.elastic.program, context.task, _PROXY_BATCH * _PROXY_BATCHES, device,
                _PROXY_BATCH,
            )
        )  # fmt: skip

        def score(member: Member, share: float) -> float:
            del share
            summed = sampled_loss(context.task, context.generator())
            cut = self.elastic.cut(member, self.order, checked=False)
            return PROXIES[name](cut.program, batches, summed)

        return score

    @staticmethod
    def _best(found: Sequence[Trial]) -> Trial:
        most = max(trial.share for trial in found)
        best = max((t for t in found if t.share == most), key=member_search.worth)
        if isnan(best.score):
            raise DataError(
                f"none of {len(found)} members has a score: their outputs or the metric are NaN",
                where="nas.search",
                hint="check the program and the metric on validation data",
            )
        return best

    # the clock ----------------------------------------------------------------------------

    def _fast(
        self, best: Trial, found: Sequence[Trial], costs: Costs, limits: Mapping[str, float]
    ) -> tuple[Trial, tuple[float, float], list[Trial]]:
        """The best member that is as fast as asked for by the clock.

        The table foretells; where the clock disagrees the limit is moved by as much, and the best
        member within it is timed instead.

        Raises:
            BudgetError: none was fast enough.
        """
        assert self.clock is not None
        more: list[Trial] = []
        limit = aim = limits["latency"]
        part = 0.0
        for number in range(_TRIES):
            measured = self.clock.measured(best.member)
            part = measured[1] / measured[0]
            if part <= limit:
                return best, measured, more
            aim = min(aim, costs["latency"](best.member)) * limit / part
            within = self._within(costs, {**limits, "latency": aim})
            generator = torch.Generator().manual_seed(self.context.seed + number)
            there = [t for t in [*found, *more] if within.excess(t.member) <= 0]
            member = within.repaired(best.member, generator)
            priced = {name: cost(member) for name, cost in costs.items()}
            more.append(Trial(member, self._full(member), 1.0, priced))
            best = self._best([*there, more[-1]])
        raise BudgetError(
            f"the fastest member that was timed takes {part:.3g} of the latency, {limit:.3g} was "
            "asked for",
            where="nas.search latency",
            hint="time on a quiet machine, or ask for less",
        )

    def _full(self, member: Member) -> float:
        """The score of a member as the best ones are scored."""
        if self.method.by in PROXIES:
            return self._proxy(self.method.by)(member, 1.0)
        return self.judge(member)


def _changes(program: Program, cut: Cut) -> Changes:
    """What was cut, kernels too."""
    changes: Changes = {name: dict(dims) for name, dims in cut.changes.items()}
    for name, side in cut.crops.items():
        shape = program.tensor(name).shape
        lost = (shape[-1] - side) // 2
        for dim in range(2, len(shape)):
            changes.setdefault(name, {})[dim] = torch.arange(lost, lost + side)
    return changes
