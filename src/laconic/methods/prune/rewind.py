"""Iterative magnitude pruning with rewinding: a little goes, what is left is trained as before.

Idea: in every round `each` of the weights that are left goes, the smallest ones, and the others are
trained with the learning rate of the original training, not with a small one. `rewind: rate` goes
on from the weights as they are. `rewind: weights` puts those that are left back to what they were
early in training, which finds subnetworks that train well from there (winning tickets).

The early state is the one after `rewind_steps` steps. Where it comes from: with `initial`, from
that file, and the given Program is taken as the trained one. Without, the given Program is where
training begins: a first training of full length gives the state and the weights that are judged.
`rewind: rate` needs none; it takes the given Program as trained and begins with a cut. To find
tickets in a network that is handed over untrained, train on labels: `alpha: 0`.

Papers: lottery tickets, Frankle & Carbin 2019 (arXiv 1803.03635); rewinding to an early state
instead of the first, Frankle et al. 2020 (arXiv 1912.05671); learning-rate rewinding, Renda et al.
2020 (arXiv 2003.02389), which is simpler and at least as accurate, hence the default.

Helps: files, at high sparsity and where training time does not matter; research on tickets.
Does not: zeros make bytes, not milliseconds: dense runtimes multiply by them as by anything else.
Where time counts `prune.gradual` comes close in one training.

Cost: one training a round: at `each` 0.2, 4 rounds to 50 %, 8 to 80 %, 11 to 90 %; one more with
`rewind: weights` and no `initial`. `steps` and `epochs` are the length of one training, `minutes`
that of all together.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from laconic.core.errors import RecipeError
from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.teaching.learning import Course, Learned, Learning, trainable
from laconic.solvers.teaching.rewinding import Snapshot, Values, digest_of, early_state, levels, put
from laconic.solvers.weights.weight_masks import BYTES, Amount, Keep, Pruning, Scope
from laconic.solvers.weights.weight_scores import magnitudes


class Rewind(Learning, Method):
    """Options of `prune.rewind`; see `Learning` and `Plan` for those of each training.

    Sites are the weights that are pruned; all float parameters are trained.

    Attributes:
        ratio: part of the chosen weights that is zero in the end.
        each: part of the weights left that goes in a round; the last round takes less.
        scope: "tensor": both hold for every tensor; "global": for all of them together.
        rewind: "rate" keeps the weights and goes back in the learning-rate schedule only;
            "weights" goes back in both.
        rewind_steps: how many steps into the schedule it goes back to.
        initial: file of the weights after `rewind_steps` steps of the training that the given
            Program comes from: `.safetensors` with a state dict, or `.laconic`.
        initial_hash: resolved: SHA-256 of the file that was read.
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {"steps": 2, "ratio": 0.5, "each": 0.3}

    ratio: float = Field(default=0.8, ge=0, lt=1)
    each: float = Field(default=0.2, gt=0, lt=1)
    scope: Scope = "global"
    rewind: Literal["rate", "weights"] = "rate"
    rewind_steps: int = Field(default=0, ge=0)
    initial: str | None = None
    initial_hash: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.initial_hash is not None and self.initial is None:
            raise ValueError("initial_hash is that of initial, which is not given")
        if self.initial is not None and self.rewind == "rate":
            raise ValueError("initial is for rewind: weights; rate keeps the weights there are")
        if self.steps is not None and self.rewind_steps >= self.steps:
            raise ValueError(
                f"rewind_steps {self.rewind_steps} leaves none of the {self.steps} steps to train"
            )
        return self

    def files(self) -> Sequence[str]:
        """The teachers' files, and the early state, if it comes from one."""
        return (*super().files(), *(() if self.initial is None else (self.initial,)))

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Prune and train a copy, round by round.

        Raises:
            RecipeError: sites that match nothing; an early state that does not fit, or is not the
                one that the step was resolved with; rewinding to behind the end of the training.
            StorageError: `initial` cannot be read.
            DataError: no training data, or data that do not fit.
            TrainingError: the loss diverged at once.
        """
        work = Pruning(program, sites, context.device)
        goal = levels(_sparsity(work), self.ratio, self.each)
        if not work.names or not goal:
            if work.names:
                work.notes.append(f"nothing goes: {self.ratio:.1%} of the weights are zero already")
            resolved = self.model_dump(mode="json", exclude_defaults=True)
            made = work.finish()
            return Outcome(program=made, resolved=resolved, notes=work.notes, figures=work.figures)
        return _Rounds(self, work, context, goal).run()


class _Rounds:
    """One application: the rounds, and what they need from each other."""

    def __init__(
        self, method: Rewind, work: Pruning, context: Context, goal: Sequence[float]
    ) -> None:
        self.work, self.context, self.goal = work, context, goal
        self.notes: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self.state: Values | None = None
        self.given = method
        if method.initial is not None:
            digest = digest_of(method.initial, method.initial_hash)
            self.given = method.model_copy(update={"initial_hash": digest})
            self.state = early_state(method.initial, work.program)
        self.first = method.rewind == "weights" and method.initial is None
        trainings = len(goal) + self.first
        minutes = None if method.minutes is None else method.minutes / trainings
        self.method = method.model_copy(update={"minutes": minutes})

    def run(self) -> Outcome:
        """The first training if there is one, then a cut and a training for every level."""
        work, learned = self.work, None
        if self.first:
            work.program, learned = self._begin()
        for number, level in enumerate(self.goal, 1):
            said = f"round {number} of {len(self.goal)}: {level:.1%} of the weights are zero"
            self.context.progress.say(said)
            student = self._cut(level)
            learned = self._train(student, number, start=self.method.rewind_steps)
            work.program = student
            self.figures.append({"sparsity": level, **_brief(learned)})
        assert learned is not None
        made = work.finish()
        own = self.given.model_dump(mode="json", exclude_defaults=True)
        return Outcome(
            program=made,
            resolved={**own, **learned.resolved},
            notes=[*work.notes, *self.notes, BYTES],
            figures={
                **learned.figures,
                "seconds": sum(entry["seconds"] for entry in self.figures),
                "rounds": self.figures,
                **work.figures,
            },
        )

    def _begin(self) -> tuple[Program, Learned]:
        """Train the given Program, remembering its early state."""
        student = self.work.program.clone()
        early = Snapshot(self.method.rewind_steps)
        learned = self._train(student, 0, attendant=early)
        self.state = early.values
        self.figures.append({"sparsity": _sparsity(self.work), **_brief(learned)})
        return student, learned

    def _cut(self, level: float) -> Program:
        """The next round's beginning: the smallest weights zero, the others as the method says."""
        keep = self._kept(level)
        made = self.work.program.clone()
        if self.state is not None:
            put(made, self.state)
        for name, stays in keep.items():
            made.set_tensor(name, made.tensor(name).detach().masked_fill(~stays, 0.0))
        made.sparse |= set(keep)
        return made

    def _kept(self, level: float) -> Keep:
        """Which weights stay, by the magnitudes of the trained ones; what is zero stays zero."""
        weights = self.work.weights()
        keep = Amount(ratio=level, scope=self.method.scope).kept(magnitudes(weights, "l1"))
        pruned = self.work.program.sparse
        return {n: stays & (weights[n] != 0) if n in pruned else stays for n, stays in keep.items()}

    def _train(self, student: Program, number: int, **more: Any) -> Learned:
        course = Course.of(self.context, f"round {number}")
        begun, names = student.clone(), trainable(student, Sites())
        learned = self.method.learn(begun, student.train(), names, course, **more)
        steps = learned.trained.plan.steps or 0
        if steps <= self.method.rewind_steps:
            raise RecipeError(
                f"rewind_steps {self.method.rewind_steps} leaves none of the {steps} steps to "
                "train",
                where="prune.rewind",
                hint="rewind to an earlier step, or train longer",
            )
        self.method = self.method.model_copy(update=dict(learned.resolved))
        told = [note.partition(": ")[2] for note in self.notes]
        self.notes += [f"round {number}: {note}" for note in learned.notes if note not in told]
        return learned


def _sparsity(work: Pruning) -> float:
    """Part of the chosen weights that is pruned already."""
    weights = work.weights()
    zeros = sum(int((w == 0).sum()) for n, w in weights.items() if n in work.program.sparse)
    return zeros / max(1, sum(w.numel() for w in weights.values()))


def _brief(learned: Learned) -> dict[str, Any]:
    return {key: learned.figures[key] for key in ("score", "best_step", "seconds")}
