"""Let training choose widths and depths, under a penalty on what they would cost.

Idea: every group has a few widths to choose from, every stage a few depths, each with a logit. In a
training step a choice is drawn for all of them at once (Gumbel softmax, straight-through), the
network that is drawn learns from the original, and the gradient moves weights and logits alike. A
penalty on the expected multiply-adds grows until they are what was asked for. Then the likeliest
member within the budget is cut out and trained for the rest of the time.

Papers: Jang et al. 2017, "Categorical reparameterization with Gumbel-softmax" (arXiv 1611.01144);
Wu et al. 2019, "FBNet" (1812.03443); Dong & Yang 2019, "TAS" (1905.09717), which searches widths
and depths as here.

Helps: one known budget and training time to spend: choosing and training are one run.
Does not: several budgets (`nas.supernet` trains once for all of them); short trainings, where
logits hardly move and the choice is that of the penalty alone; kernels, resolutions and bits.

Cost: `explore` of the steps cost what the whole network costs, because masks save nothing; the
others cost what the small one does.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from laconic.methods.base import Context, Method, Outcome
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import ranking, selection
from laconic.solvers.search import search_space
from laconic.solvers.search.elastic import Elastic, declare
from laconic.solvers.search.member_costs import Prices
from laconic.solvers.search.relaxation import Relaxation
from laconic.solvers.search.search_space import DEFAULT
from laconic.solvers.search.strategies import Within
from laconic.solvers.teaching.learning import Course, Learned, Learning, trainable
from laconic.training.plan import DEFAULT_EPOCHS

_ALL = Sites()
_KINDS = ("width", "depth")


class Differentiable(Learning, Method):
    """Choose widths and depths by gradient while training; see `Learning` and `Plan` for the rest.

    Sites are groups and stages of branches. `steps`, `epochs` and `minutes` are those of choosing
    and training together.

    Attributes:
        macs: part of the multiply-adds that may stay.
        space: "kind:glob" → choices, as in `nas.supernet`; kinds width and depth.
        explore: share of the time in which choices are open.
        strength: of the penalty at the end, in units of the loss for a cost e times the target's.
        hot, cold: temperature of the softmax at the beginning and at the end.
        importance: what tells the good channels; any score that `prune.channels` knows.
        samples: calibration samples that the score sees, at most.
        order: knob → its indices, best first, in place of scoring (a replay has it).
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {
        "space": {"width:*": [1.0, 0.5], "depth:*": [1.0, 0.5]}, "macs": 0.9, "samples": 8,
        "importance": "l2", "steps": 3, "evaluations": 1, "teacher": "torch", "precision": "fp32",
    }  # fmt: skip

    macs: float = Field(default=0.5, gt=0, le=1)
    space: dict[str, list[int | float]] = Field(
        default_factory=lambda: {pattern: list(choices) for pattern, choices in DEFAULT.items()}
    )
    explore: float = Field(default=0.5, gt=0, lt=1)
    strength: float = Field(default=2.0, ge=0)
    hot: float = Field(default=2.0, gt=0)
    cold: float = Field(default=0.5, gt=0)
    importance: str = "l2"
    samples: int = Field(default=512, ge=1)
    order: dict[str, list[int]] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        search_space.check_wishes(self.space)
        for pattern in self.space:
            if pattern.partition(":")[0] not in _KINDS:
                raise ValueError(f"{pattern!r}: only width and depth have gradients")
        selection.check(0.0, self.importance)
        if self.steps == 1:
            raise ValueError("steps = 1: choosing and training need one each")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Choose, cut, train what is left; the input stays as it was.

        Raises:
            RecipeError: sites or patterns that match nothing.
            BudgetError: the space has no member within the budget.
            DataError: no training data, or data that do not fit.
            TrainingError: the loss diverged.
        """
        student = thaw(program) if is_frozen(program) else program.clone()
        elastic = Elastic(student)
        space, notes = declare(elastic, self.space, sites)
        own = self.model_dump(mode="json", exclude_defaults=True)
        if not space.knobs:
            notes.append("nothing of this program is elastic")
            return Outcome(program=program.clone(), resolved=own, notes=notes)
        prices = Prices(elastic)
        whole = prices.macs(space.full())
        within = Within(space, lambda member: prices.macs(member) / (whole * self.macs) - 1)
        order = self.order
        if order is None:
            order = ranking.rank(elastic, space, self.importance, self.samples, context, notes)
        relaxed = Relaxation(
            elastic, space, order, student, target=self.macs, strength=self.strength,
            temperature=(self.hot, self.cold), seed=context.seed,
        )  # fmt: skip
        searched = self._search(program, student, relaxed, context)
        member = relaxed.best(within.excess)
        relaxed.remove()
        made = Elastic(student).cut(member, order)
        rest = self._part(searched.trained.plan.steps or 1)
        learned = rest.learn(
            program, made.program.train(), trainable(made.program, _ALL),
            Course.of(context, "train"),
        )  # fmt: skip
        steps = [part.trained.plan.steps or 1 for part in (searched, learned)]
        resolved = {**own, **learned.resolved, "space": space.plain(), "order": order}
        resolved |= {"steps": sum(steps), "explore": steps[0] / sum(steps)}
        return Outcome(
            program=freeze(made.program) if is_frozen(program) else made.program,
            resolved=resolved,
            changes=made.changes,
            notes=[*dict.fromkeys([*notes, *searched.notes, *learned.notes])],
            figures={
                **learned.figures,
                "member": member,
                "macs": [whole, prices.macs(member)],
                "expected": relaxed.expected,
                "exploring": searched.figures,
            },
        )

    def _search(
        self, program: Program, student: Program, relaxed: Relaxation, context: Context
    ) -> Learned:
        """Train weights and logits of `student`; its last state counts."""
        unjudged = replace(context, task=replace(context.task, validation=None))
        return self._part(None).learn(
            program, student.train(), trainable(student, _ALL), Course.of(unjudged, "explore"),
            around=relaxed.around, attendant=relaxed,
        )  # fmt: skip

    def _part(self, explored: int | None) -> "Differentiable":
        """These options for choosing, or for training after so many steps of choosing."""
        share = self.explore if explored is None else 1 - self.explore
        if self.steps is not None:
            first = min(max(round(self.steps * self.explore), 1), self.steps - 1)
            wanted = first if explored is None else self.steps - first
            return self.model_copy(update={"steps": wanted})
        if self.minutes is not None:
            return self.model_copy(update={"minutes": share * self.minutes})
        return self.model_copy(update={"epochs": share * (self.epochs or DEFAULT_EPOCHS)})
