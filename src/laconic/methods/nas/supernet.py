"""One training for many sizes: a network whose sub-networks are good as they are.

Idea: all sub-networks share one set of weights. In every step the largest or the smallest, in turn,
and a few random ones learn from the original. With `inplace` the largest learns from it in every
step, and the smallest and the random ones learn what the largest says about the same images (the
sandwich rule): for an original that is itself to be trained further. The space opens little by
little: kernels, then depth, then width. Before, the channels of every group are sorted by
importance, so that a sub-network keeps the leading ones, the best; of a stage's residual branches
it keeps the first. Sub-networks are cut graphs, so a small one costs little time in training too.

The result is the whole network with the trained weights. `nas.search` finds its best member for a
budget (`importance: leading`, and the space that stands in the figures); nothing is trained any
more after that, only the batch norms' statistics are measured anew.

Papers: Cai et al. 2020, "Once-for-all" (arXiv 1908.09791) for progressive shrinking; Yu & Huang
2019, "Universally slimmable networks" (1903.05134) for the sandwich rule; Yu et al. 2020, "BigNAS"
(2003.11142) for one training without a second stage. A cropped kernel has no transformation matrix
of its own, as it has in once-for-all; it trains as it stands.

Helps: several devices or budgets to serve from one training; sizes that are chosen later.
Does not: one known size, for which the same time spent on that network alone gives more; networks
without batch normalisation that are cut far are harder to train together.

Cost: a step costs half one of the whole network, half one of the smallest, and `members` of about
half; in place twice the ends.
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
from laconic.solvers.search.sandwich import Sandwich
from laconic.solvers.search.search_space import DEFAULT, Space
from laconic.solvers.teaching.learning import Course, Learning, trainable

_ALL = Sites()


class Supernet(Learning, Method):
    """Train a network together with its sub-networks; see `Learning` and `Plan` for the rest.

    Sites are what varies: groups, stages of branches, weights (kernels), inputs.

    Attributes:
        space: "kind:glob" → choices. Kinds are width (of a group; heads are groups too), depth (of
            a stage of residual branches), kernel, resolution. A float is a part of the whole, an
            integer a size; the whole network is always a member.
        members: random sub-networks in each step, besides the whole or the smallest one.
        inplace: sub-networks learn from the whole one, which is trained in every step, and not from
            the original.
        shrink: share of the steps in which the space opens.
        importance: what the channels are sorted by; any score that `prune.channels` knows, or
            "leading" to leave them as they are.
        samples: calibration samples that the score sees, at most.
        order: group → its indices, best first, in place of scoring (a replay has it).
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {
        "space": {"width:*": [1.0, 0.5], "depth:*": [1.0, 0.5]}, "members": 1, "samples": 8,
        "importance": "l2", "steps": 2, "evaluations": 1, "teacher": "torch", "precision": "fp32",
    }  # fmt: skip

    space: dict[str, list[int | float]] = Field(default_factory=lambda: _plain(DEFAULT))
    members: int = Field(default=2, ge=0)
    inplace: bool = False
    shrink: float = Field(default=0.3, ge=0, le=1)
    importance: str = "l2"
    samples: int = Field(default=512, ge=1)
    order: dict[str, list[int]] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        search_space.check_wishes(self.space)
        if any(pattern.startswith("bits") for pattern in self.space):
            raise ValueError("bits are searched after training: they go into nas.search's space")
        if self.importance != "leading":
            selection.check(0.0, self.importance)
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Sort, then train a copy; the input stays as it was.

        Raises:
            RecipeError: sites or patterns that match nothing, or a resolution it does not take.
            DataError: no training data, or data that do not fit.
            TrainingError: the loss diverged before there was anything worth keeping.
        """
        student = thaw(program) if is_frozen(program) else program.clone()
        elastic = Elastic(student)
        space, notes = declare(elastic, self.space, sites)
        if not space.knobs:
            own = self.model_dump(mode="json", exclude_defaults=True)
            notes.append("nothing of this program is elastic")
            return Outcome(program=program.clone(), resolved=own, notes=notes)
        done = self._sort(student, elastic, space, context, notes)
        together = Sandwich(
            elastic,
            space,
            members=self.members,
            shrink=self.shrink,
            seed=context.seed,
            inplace=self.inplace,
        )
        # a score of the whole network says nothing about the others: the last state is kept
        unjudged = replace(context, task=replace(context.task, validation=None))
        learned = self.learn(
            program, student.train(), trainable(student, _ALL), Course.of(unjudged),
            around=together.around, attendant=together,
        )  # fmt: skip
        prices = Prices(elastic)
        ends = [prices(member) for member in (space.full(), space.least())]
        own = self.model_dump(mode="json", exclude_defaults=True)
        return Outcome(
            program=freeze(student) if is_frozen(program) else student,
            resolved={**own, **learned.resolved, "space": space.plain(), "order": done},
            notes=[*notes, *learned.notes],
            figures={
                **learned.figures,
                "space": space.plain(),
                "members": space.members(),
                "macs": [price.macs for price in ends],
                "parameters": [price.parameters for price in ends],
            },
        )

    def _sort(
        self,
        student: Program,
        elastic: Elastic,
        space: Space,
        context: Context,
        notes: list[str],
    ) -> dict[str, list[int]]:
        """Sort the groups; which ones, and how."""
        order = self.order
        if order is None:
            widths = Space(tuple(knob for knob in space.knobs if knob.kind == "width"))
            order = {}
            if self.importance != "leading":
                ranked = ranking.rank(
                    elastic, widths, self.importance, self.samples, context, notes
                )
                order = {name.removeprefix("width:"): held for name, held in ranked.items()}
        return ranking.sort(student, elastic, order, notes)


def _plain(space: search_space.Wishes) -> dict[str, list[int | float]]:
    return {pattern: list(choices) for pattern, choices in space.items()}
