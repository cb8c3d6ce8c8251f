"""Dynamic pruning: the least active channels leave while training goes on.

Idea: what a channel does is best seen while the network works. Training towards the original runs
as always; in the steps before each of several small cuts the activity of every channel is measured
where the next layers read it, and the least active ones leave the network in training. The
optimizer's moments and the running mean shrink with the tensors; data and learning rate go on as if
nothing had happened; every later step is cheaper. What remains adapts before the next cut, and the
next cut is chosen by what it does then.

Papers: activity as share of zeros: Hu et al. 2016 ("Network trimming", arXiv 1607.03250); entropy:
Luo & Wu 2017 (arXiv 1706.05791); pruning spread over training: Zhu & Gupta 2017 (arXiv 1710.01878);
magnitude of activations times weights: Sun et al. 2023 ("Wanda", arXiv 2306.11695).

Helps: where training data are there and time for some hundred steps or more: one run prunes and
recovers, and it is shorter than training the whole network. Does not: with few steps, where
`prune.channels` with its least-squares refit and training afterwards is better (a LeNet-300-100
without 80 % of its neurons, 200 steps: 84.7 % here, 86.0 % there); activity is a rougher guide than
curvature, and `mean`, `apoz` and `entropy` do not ask whether anybody listens (84.6, 83.2, 83.9 %).

Cost: training steps, of an ever smaller network; in `window` steps before each cut one more pass
over the activations; surgery takes about a second per cut for a network of fifty layers.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from laconic.methods.base import Context, Method, Outcome
from laconic.program.cost import CostModel
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import group_choice, selection
from laconic.solvers.channels.activity import Kind
from laconic.solvers.channels.shedding import Shedding, Timetable, Wanted
from laconic.solvers.teaching.learning import Course, Learning, trainable

_ALL = Sites()


class Dynamic(Learning, Method):
    """Cut the least active channels during training; see `Learning` and `Plan` for the rest.

    Attributes:
        ratio: part of the cost that is to go, from 0 to below 1.
        of: the cost: multiply-adds or parameters of the program, or channels of the groups.
        activity: "flow": mean magnitude of a channel times the norm of the weights that read it;
            "mean": mean magnitude; "apoz": share of its values that are not zero; "entropy": bits
            of its values.
        scope: "global": where least is lost; "layer": the same part of every group.
        cuts: in so many cuts; each takes the same part of what is left.
        begin: share of the steps before anything is cut.
        end: share of the steps after which the last cut comes.
        window: activity is measured in so many steps before each cut, at most.
        block: kept channels are multiples of it; "auto" measures what the runtime likes.
        limit: largest part of one group that may go; two indices always stay.
        replay: step → group → kept indices of that cut, in place of measuring (a replay has it).
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {
        "ratio": 0.3, "block": 1, "cuts": 2, "steps": 6, "evaluations": 2, "teacher": "torch",
        "precision": "fp32",
    }  # fmt: skip

    ratio: float = Field(default=0.5, ge=0, lt=1)
    of: group_choice.Of = "macs"
    activity: Kind = "flow"
    scope: Literal["global", "layer"] = "global"
    cuts: int = Field(default=8, ge=1)
    begin: float = Field(default=0.0, ge=0, lt=1)
    end: float = Field(default=0.5, gt=0, lt=1)
    window: int = Field(default=16, ge=1)
    block: Literal["auto"] | int = "auto"
    limit: float = Field(default=0.9, ge=0, lt=1)
    replay: dict[int, dict[str, list[int]]] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin} is not before end {self.end}")
        selection.check_block(self.block)
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Train a copy that gets smaller; the input stays as it was.

        Raises:
            RecipeError: sites match nothing, or only groups that cannot shrink.
            BudgetError: the ratio cannot be reached; says how far it can go and what is in the way.
            DataError: no training data, or data that do not fit.
            TrainingError: the loss diverged.
        """
        student = thaw(program) if is_frozen(program) else program.clone()
        found = groups(student)
        if self.replay is None:
            names = selection.chosen(found, sites)
        else:
            names = [group.name for group in found]
        if not names or (self.replay is None and not self.ratio):
            said = [f"{group.name}: {group.frozen}" for group in found.frozen]
            return Outcome(
                program=program.clone(),
                resolved=self.model_dump(mode="json", exclude_defaults=True),
                notes=[*said, "nothing is to go"],
            )
        whole = CostModel(student, found)
        shedding = self._shedding(names, context)
        course = Course.of(context)
        student.train()
        learned = self.learn(
            program, student, trainable(student, _ALL), course, shedding.around, attendant=shedding
        )
        small = CostModel(student, groups(student))
        figures = {
            **learned.figures,
            "macs": [whole.macs({}), small.macs({})],
            "parameters": [whole.params({}), small.params({})],
            "macs_by_step": [list(pair) for pair in shedding.costs],
        }
        own = self.model_dump(mode="json", exclude_defaults=True)
        made = {"replay": shedding.made, "block": shedding.block}
        return Outcome(
            program=freeze(student) if is_frozen(program) else student,
            resolved={**own, **learned.resolved, **made},
            changes=shedding.whole,
            notes=[*dict.fromkeys([*shedding.notes, *learned.notes])],
            figures=figures,
        )

    def _shedding(self, names: list[str], context: Context) -> Shedding:
        wanted = Wanted(
            names=names,
            ratio=self.ratio,
            of=self.of,
            scope=self.scope,
            block=group_choice.block_of(self.block, context.runtime, context.threads),
            adapt=self.block == "auto",
            limit=self.limit,
        )
        times = Timetable(cuts=self.cuts, begin=self.begin, end=self.end, window=self.window)
        return Shedding(wanted, times, self.activity, self.replay)
