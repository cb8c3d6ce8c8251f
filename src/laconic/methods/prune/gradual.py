"""Gradual pruning: weights become zero step by step while the others learn to do without them.

Idea: sparsity rises along a curve during training, fast at first. Every few steps the masks are
chosen anew, by the weights' magnitude or by where training moves them, so that a choice which turns
out wrong can be taken back: a masked weight goes on learning unseen, or rests, or grows again where
the gradient is large. Once the sparsity is reached the masks stay, and the rest of the training
belongs to what is left. The training is that of `distill.logits`: towards the original, or labels.

Papers: cubic schedule, Zhu & Gupta 2017 (arXiv 1710.01878): `masked: rest`; hidden weights that
learn, Lin et al. 2020 (arXiv 2006.07253): `masked: learn`; movement, Sanh et al. 2020 (arXiv
2005.07683): `score: movement, masked: rest`; growing by gradient, Evci et al. 2020 (arXiv
1911.11134), on a schedule as in Liu et al. 2021 (arXiv 2106.10404): `masked: gone, regrow: 0.3`.

Helps: files, at high sparsity (90 % and more), where one cut of all weights costs more than the
same training brings back. What is left needs its part of the steps: a short training wants a small
`end`.
Does not: zeros make bytes, not milliseconds: dense runtimes multiply by them as by anything else.
At moderate sparsity `prune.obs` without training, or a cut and `distill.logits` behind it, do as
well. Movement is for fine-tuning on a task other than the one the weights come from; on their own
task it is behind magnitude. Few samples.

Cost: that of the training; masks add a selection over the weights each time they change.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.teaching.learning import Course, Learning, trainable
from laconic.solvers.weights.moving_masks import Choose, MovingMasks, Rule
from laconic.solvers.weights.patterns import Patterns
from laconic.solvers.weights.weight_masks import BYTES, Amount, Pruning, Scope


class Gradual(Learning, Method):
    """Options of `prune.gradual`; see `Learning` and `Plan` for those of the training.

    Sites are the weights that are pruned; all float parameters are trained.

    Attributes:
        ratio: part of the chosen weights that is zero in the end.
        n: with `m`: a pattern in place of `ratio`; so many of every `m` neighbouring inputs of an
            output stay, at first more; weights with fewer inputs stay whole.
        m: neighbours that share a pattern.
        scope: "tensor": `ratio` holds for every tensor; "global": for all of them together.
        score: what stays: the largest "magnitude", or "movement", the weights that training moves
            away from zero.
        masked: what becomes of masked weights until the masks are final: they "learn" unseen and
            come back when they have outgrown others, "rest" and come back when others fall below
            them, or are "gone".
        regrow: with `masked: gone`: part of the weights that changes places each time, from the
            lowest scores to the largest gradients; falls to 0 towards the end.
        begin: part of the steps after which sparsity begins to rise.
        end: part of the steps after which it has risen.
        every: steps between two changes of the masks; None makes about a hundred changes.
        curve: how it rises: "cubic" (fast, then slow) or "linear".
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {"steps": 4}

    ratio: float = Field(default=0.8, ge=0, lt=1)
    n: int | None = Field(default=None, ge=1)
    m: int | None = Field(default=None, ge=2)
    scope: Scope = "global"
    score: Literal["magnitude", "movement"] = "magnitude"
    masked: Literal["learn", "rest", "gone"] = "learn"
    regrow: float = Field(default=0.0, ge=0, lt=1)
    begin: float = Field(default=0.0, ge=0, lt=1)
    end: float = Field(default=0.4, gt=0, le=1)
    every: int | None = Field(default=None, ge=1)
    curve: Literal["cubic", "linear"] = "cubic"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.regrow and self.masked != "gone":
            raise ValueError(f"regrow {self.regrow} is for masked: gone, not {self.masked}")
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin} is not before end {self.end}")
        if (self.n is None) != (self.m is None):
            raise ValueError("a pattern needs both n and m: n of every m stay")
        if self.n is not None and self.m is not None:
            if "ratio" in self.model_fields_set:
                raise ValueError("n and m take the place of ratio: give one of them")
            if self.n > self.m:
                raise ValueError(f"n {self.n} of every m {self.m} cannot stay: n is at most m")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Train a copy while its weights become zero.

        Raises:
            RecipeError: sites that match nothing.
            DataError: no training data, or data that do not fit.
            TrainingError: the loss diverged before the sparsity was reached.
        """
        work = Pruning(program, sites, context.device)
        choose = self._choice(work)
        own = self.model_dump(mode="json", exclude_defaults=True)
        if not work.names:
            made = work.finish()
            return Outcome(program=made, resolved=own, notes=work.notes, figures=work.figures)
        student, pruned = work.program, [n for n in work.names if n in work.program.sparse]
        student.sparse -= set(work.names)  # the masks say what is held while they move
        course = Course.of(context)
        masks = MovingMasks(work.names, self._rule(), choose, pruned)
        names = trainable(student, Sites())
        learned = self.learn(program, student.train(), names, course, attendant=masks)
        student.sparse |= set(work.names)
        made = work.finish()
        return Outcome(
            program=made,
            resolved={**own, **learned.resolved},
            notes=[*work.notes, *learned.notes, BYTES],
            figures={**learned.figures, **work.figures},
        )

    def _choice(self, work: Pruning) -> Choose:
        """How weights are chosen; weights that have no room for the pattern leave the names."""
        m = self.m
        if m is None:
            return lambda scores, ratio: Amount(ratio=ratio, scope=self.scope).kept(scores)
        found = Patterns(work, m)
        return lambda scores, ratio: found.kept(scores, m - int(ratio * m + 1e-9))

    def _rule(self) -> Rule:
        ratio = self.ratio
        if self.n is not None and self.m is not None:
            ratio = 1 - self.n / self.m
        return Rule(
            ratio=ratio,
            score=self.score,
            masked=self.masked,
            regrow=self.regrow,
            begin=self.begin,
            end=self.end,
            every=self.every,
            curve=self.curve,
        )
