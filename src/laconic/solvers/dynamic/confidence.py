"""When to trust an early answer: doubt from logits, and limits to it that keep a promise.

Doubt is a number >= 0 per sample, 0 where the answer is certain: "max", minus the logarithm of the
largest probability; "entropy", of the distribution, in nats; "margin", the second largest
probability over the largest. All three are computed so that they keep their digits where doubt is
small, in 16 bits too. A sample stays where its doubt is at most the limit of that stage.

Limits are chosen and tested on different samples. On one part of the held-out data that combination
is sought which costs least for the drop that is allowed; it gives a direction. On the other part,
limits are loosened along it from next to nothing, and each step is tested by the exact bound of the
paired drop (`measuring.intervals.drop_bound`) until the first one fails: fixed-sequence testing, as
in "Learn then Test" (Angelopoulos, Bates, Candès, Jordan & Lei, arXiv 2110.01052). The limits that
are kept are those of the last step that held: with the stated confidence over the draw of the held-
out samples the drop is at most what was allowed, however the direction was found.
"""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from laconic.core.errors import DataError
from laconic.core.task import Task
from laconic.measuring import accuracy, intervals
from laconic.program.choices import CHOOSE
from laconic.program.program import Program

Measure = Literal["max", "entropy", "margin"]
Floats = NDArray[np.float64]
NEVER = -1.0
_FEWEST = 2
_CHOOSING = 1 / 3  # part of the samples on which the direction is sought
_COMBINATIONS = 8000
_FIRST, _FACTOR = 1 / 32, 2 ** (1 / 6)  # of the direction: where testing begins, how it goes on
_aten = torch.ops.aten


# in the graph -------------------------------------------------------------------------------


def add_doubt(program: Program, logits: fx.Node, measure: Measure) -> fx.Node:
    """Doubt `[batch]` of a node `[batch, classes]`, put in before the output."""

    def call(target: Any, *arguments: Any) -> fx.Node:
        return program.graph.call_function(target, arguments)

    with program.graph.inserting_before(program.output_node):
        if measure == "margin":
            two = call(operator.getitem, call(_aten.topk.default, logits, 2, -1), 0)
            best, second = (call(_aten.select.int, two, -1, place) for place in (0, 1))
            return call(_aten.exp.default, call(_aten.sub.Tensor, second, best))
        logs = call(_aten.log_softmax.int, logits, -1)
        if measure == "max":
            return call(_aten.neg.default, call(_aten.amax.default, logs, [-1]))
        parts = call(_aten.mul.Tensor, call(_aten.exp.default, logs), logs)
        return call(_aten.neg.default, call(_aten.sum.dim_IntList, parts, [-1]))


def add_choice(
    program: Program,
    early: Sequence[fx.Node],
    later: Sequence[fx.Node],
    measure: Measure,
    limit: float,
    name: str,
    place: int = 0,
) -> list[fx.Node]:
    """Outputs `early` where the doubt of one of them is at most a limit, else those of `later`.

    The program is changed; recompile and propagate it afterwards.

    Args:
        program: of which both are nodes.
        early: `[batch, ...]` each.
        later: of the same shapes.
        measure: of doubt.
        limit: stored as a tensor.
        name: of that.
        place: which of them holds class scores.
    """
    doubt = add_doubt(program, early[place], measure)
    stored = program.add_tensor(name, torch.tensor(limit, dtype=torch.float32))
    with program.graph.inserting_before(program.output_node):
        held = program.graph.get_attr(stored)
        unsure = program.graph.call_function(_aten.gt.Tensor, (doubt, held))
        pairs = zip(later, early, strict=True)
        return [program.graph.call_function(CHOOSE, (unsure, *pair)) for pair in pairs]


def doubts(logits: Tensor, measure: Measure) -> Tensor:
    """The same, of a tensor `[..., classes]` → `[...]`."""
    if measure == "margin":
        best, second = logits.topk(2, -1)[0].unbind(-1)
        return (second - best).exp()
    logs = logits.log_softmax(-1)
    return -logs.amax(-1) if measure == "max" else -(logs.exp() * logs).sum(-1)


# limits -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What every stage says about held-out samples.

    Attributes:
        doubt: `[samples, stages]`, of all stages but the last, which nobody leaves unanswered.
        scores: `[samples, stages + 1]` in the task's direction.
        reference: `[samples]`, of the network whose accuracy is promised.
        costs: `[stages + 1]`: what a sample that stays at each stage costs, as a share of the
            reference's cost.
    """

    doubt: Floats
    scores: Floats
    reference: Floats
    costs: Floats

    def part(self, rows: NDArray[Any]) -> "Answers":
        """Some of the samples."""
        return Answers(self.doubt[rows], self.scores[rows], self.reference[rows], self.costs)

    def stages(self, limits: Sequence[float]) -> NDArray[np.int64]:
        """Where each sample stays."""
        sure = self.doubt <= np.asarray(limits)
        last = np.ones((len(sure), 1), bool)
        return np.concatenate([sure, last], axis=1).argmax(1)

    def scored(self, limits: Sequence[float]) -> Floats:
        """Scores `[samples]` with these limits."""
        return np.take_along_axis(self.scores, self.stages(limits)[:, None], 1)[:, 0]

    def cost(self, limits: Sequence[float]) -> float:
        """Mean cost with these limits."""
        return float(self.costs[self.stages(limits)].mean())


@dataclass(frozen=True)
class Limits:
    """Limits and what was found about them on samples that did not choose them.

    Attributes:
        values: the largest doubt with which a sample stays, by stage; `NEVER` for none.
        drop: the drop on the testing samples, in the task's unit, its bound and its counts.
        leaving: share of the samples that stays at each stage.
        cost: mean cost, as a share of the reference's.
        tested: how many steps of the sequence held.
        samples: how many samples tested.
    """

    values: tuple[float, ...]
    drop: accuracy.Drop
    leaving: tuple[float, ...]
    cost: float
    tested: int
    samples: int

    @property
    def none(self) -> bool:
        """Whether nobody may leave early."""
        return all(value < 0 for value in self.values)


def solve(
    answers: Answers, task: Task, max_drop: float, confidence: float, generator: torch.Generator
) -> Limits:
    """The loosest limits, along the best direction, whose drop is certified.

    Args:
        answers: of two samples at the least.
        task: its unit and direction.
        max_drop: in the task's unit (points for accuracy).
        confidence: that the drop is within it.
        generator: says which samples choose and which test.

    Raises:
        DataError: fewer samples than that.
    """
    if len(answers.reference) < _FEWEST:
        raise DataError(
            f"{len(answers.reference)} validation samples; limits are chosen on some and tested on "
            f"others, which takes {_FEWEST} at the least, and thousands for a promise",
            where="validation",
        )
    order = torch.randperm(len(answers.reference), generator=generator).numpy()
    cut = max(1, round(_CHOOSING * len(order)))
    choosing, testing = answers.part(order[:cut]), answers.part(order[cut:])
    direction = _direction(choosing, task, max_drop, confidence, len(order) - cut)
    held, limits = 0, [NEVER] * len(direction)
    ends = np.where(np.array(direction) > 0, testing.doubt.max(0), direction)  # all who can leave
    while any(limit < end for limit, end in zip(limits, ends, strict=True)):
        step = _FIRST * _FACTOR**held
        further = [float(step * value) if value >= 0 else NEVER for value in direction]
        if not _certified(testing, further, task, max_drop, confidence):
            break
        held, limits = held + 1, further
    return tested(testing, task, limits, confidence, held)


def _certified(
    answers: Answers, limits: Sequence[float], task: Task, max_drop: float, confidence: float
) -> bool:
    """Whether the bound of the drop is within what is allowed."""
    if not task.binary:
        return tested(answers, task, limits, confidence, 0).drop.certifies(max_drop)
    right, was = answers.scored(limits) > 0, answers.reference > 0
    lost, gained = int((was & ~right).sum()), int((right & ~was).sum())
    if (lost - gained) * task.scale > max_drop * len(was):
        return False  # the bound is never below the drop itself
    bound = intervals.drop_bound(lost, gained, len(was), confidence)
    return bound * task.scale <= max_drop


def tested(
    answers: Answers, task: Task, limits: Sequence[float], confidence: float, steps: int
) -> Limits:
    """What limits come to on samples."""
    before, after = (torch.from_numpy(s) for s in (answers.reference, answers.scored(limits)))
    drop = accuracy.drop(before, after, task, confidence=confidence)
    counts = np.bincount(answers.stages(limits), minlength=len(answers.costs))
    return Limits(
        values=tuple(limits),
        drop=drop,
        leaving=tuple(float(count) / len(answers.reference) for count in counts),
        cost=answers.cost(limits),
        tested=steps,
        samples=len(answers.reference),
    )


def _direction(
    answers: Answers, task: Task, max_drop: float, confidence: float, testing: int
) -> tuple[float, ...]:
    """The cheapest limits that would probably pass the test, by trying a grid of combinations."""
    stages = answers.doubt.shape[1]
    each = max(3, min(64, int(_COMBINATIONS ** (1 / max(stages, 1)))))
    sign = task.scale if task.higher_is_better else -task.scale
    losses = sign * (answers.reference[:, None] - answers.scores)
    z = float(torch.special.ndtri(torch.tensor(confidence)))
    grids = [_grid(answers.doubt[:, stage], each) for stage in range(stages)]
    best, chosen = float(answers.costs[-1]), (NEVER,) * stages
    mildest = (np.inf, chosen)
    for limits in itertools.product(*grids):
        taken = answers.stages(limits)
        lost = np.take_along_axis(losses, taken[:, None], 1)[:, 0]
        cost = float(answers.costs[taken].mean())
        bound = float(lost.mean() + z * lost.std() / np.sqrt(testing))
        if bound <= max_drop and cost < best:
            best, chosen = cost, limits
        if max(limits) >= 0 and bound < mildest[0]:
            mildest = (bound, limits)
    return chosen if max(chosen) >= 0 else mildest[1]


def _grid(doubt: Floats, size: int) -> list[float]:
    """Never, and limits under which ever more samples stay."""
    shares = np.linspace(0, 1, size)[1:]
    return [NEVER, *np.unique(np.quantile(doubt, shares)).tolist()]
