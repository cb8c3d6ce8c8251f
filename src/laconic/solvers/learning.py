"""Learning from the original: the options, the objective and the run that methods share."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.core.progress import SILENT, Progress
from laconic.core.task import Loader, Task
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers import teacher as teachers
from laconic.solvers.setting import Setting
from laconic.statistics.batches import told_nothing
from laconic.training.checkpoint import identity_of
from laconic.training.distillation import Distillation, Kind, kind_for
from laconic.training.evaluation import labelled, mean_loss, mean_score
from laconic.training.loop import Job, Objective, Trained, train
from laconic.training.plan import Plan
from laconic.training.processes import Processes
from laconic.training.taps import matched, tapped


@dataclass(frozen=True, kw_only=True)
class Course:
    """What is learned from, and where.

    Attributes:
        task: data, loss and metric.
        original: the teacher.
        seed: of the order of the data and of every random choice.
        device: where training runs.
        progress: where it shows that it goes on.
        folder: where the state is kept, so that it can be resumed; None keeps none.
    """

    task: Task
    original: Program
    seed: int = 0
    device: torch.device = torch.device("cpu")
    progress: Progress = SILENT
    folder: Path | None = None

    @classmethod
    def of(cls, context: Setting, part: str = "") -> "Course":
        """That of a method's context; `part` names a folder of its own in the working folder."""
        return cls(
            task=context.task,
            original=context.original,
            seed=context.seed,
            device=context.device,
            progress=context.progress,
            folder=None if context.workdir is None else context.workdir / part,
        )

    @property
    def loader(self) -> Loader:
        """The training batches.

        Raises:
            DataError: there are neither training nor calibration data.
        """
        return self.task.batches("train", "calibration")


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a run came to.

    Attributes:
        trained: what the loop says.
        resolved: the options of `Learning` that replay the run.
        notes: what a person should know, one sentence each.
        figures: steps, best step, score, history, seconds.
    """

    trained: Trained
    resolved: Mapping[str, Any]
    notes: Sequence[str]
    figures: Mapping[str, Any]


class Learning(Plan):
    """How to train towards the original Program's outputs; training methods inherit these fields.

    Attributes:
        loss: between outputs: "kl" of softened distributions over the last dimension, "mse"
            (relative to the original's mean square), "cosine"; "auto": cosine for embeddings, mse
            for regression, kl elsewhere.
        temperature: of the softened distributions.
        alpha: share of the soft targets; the rest goes to hard ones. 1 needs no labels.
        hard: where hard targets come from: the labels with the task's loss, or the original's own
            decisions.
        features: weight of the feature loss; 0 compares outputs only.
        nodes: what it compares: names or globs of graph nodes that both have in equal shape, or
            pairs {node: the original's node}; None takes up to eight sums (ends of blocks).
        teacher: what runs the original: "torch", or a runtime, which is several times faster on a
            CPU; "auto" takes OpenVINO on a CPU where it pays and nothing stands in its way.
    """

    loss: Literal["auto", "kl", "mse", "cosine"] = "auto"
    temperature: float = Field(default=4.0, gt=0)
    alpha: float = Field(default=1.0, ge=0, le=1)
    hard: Literal["labels", "teacher"] = "labels"
    features: float = Field(default=0.0, ge=0)
    nodes: tuple[str, ...] | dict[str, str] | None = None
    teacher: Literal["auto", "torch", "openvino", "onnxruntime"] = "auto"

    def learn(
        self,
        program: Program,
        student: Program,
        names: Sequence[str],
        course: Course,
        around: Callable[[Objective], Objective] | None = None,
        **more: Any,
    ) -> Learned:
        """Train `student` in place towards `course.original`.

        Args:
            program: what the step was given; only identifies the run.
            student: in training mode, a Program that nobody else uses.
            names: the tensors that are trained.
            course: what is learned from.
            around: makes the objective that is minimised of that of distillation.
            more: further fields of `Job`.

        Raises:
            DataError: no training data, or data that do not fit.
            TrainingError: the loss diverged at once, or outputs differ in shape.
        """
        plan = self.plan().settled(student, course.device, Processes.current().count)
        pairs = self._pairs(student, course)
        told = [self.model_dump(mode="json"), list(names), course.seed]
        own = identity_of(told, [program, course.original]) if course.folder else ""
        looking = _Looking()
        with ExitStack() as stack:
            objective, runs_in, notes = self._objective(
                stack, student, course, plan, pairs, looking
            )
            stack.enter_context(_only(student, names))
            stack.enter_context(tapped(student, list(pairs)))
            job = Job(
                program=student,
                names=names,
                objective=around(objective) if around else objective,
                loader=course.loader,
                plan=plan,
                score=_score(objective, course.device),
                seed=course.seed,
                device=course.device,
                progress=course.progress,
                folder=course.folder,
                identity=own,
                **more,
            )
            trained = train(job)
        decided = trained.plan.model_dump(mode="json", exclude={"save_every"})
        resolved = {**decided, "loss": objective.kind, "teacher": runs_in}
        if pairs:
            resolved["nodes"] = pairs
        return Learned(
            trained=trained,
            resolved=resolved,
            notes=[*notes, *trained.notes, *looking.notes()],
            figures=_figures(trained, course.task),
        )

    def _objective(
        self,
        stack: ExitStack,
        student: Program,
        course: Course,
        plan: Plan,
        pairs: Mapping[str, str],
        looking: "_Looking",
    ) -> tuple[Distillation, str, list[str]]:
        """What is minimised, what runs the original, and what to know about that."""
        lesson = teachers.Lesson(
            original=course.original,
            plan=plan,
            taps=list(pairs.values()),
            loader=course.loader,
            device=course.device,
            seed=course.seed,
        )
        taught, runs_in, notes = teachers.make(stack, self.teacher, lesson)
        kind: Kind = kind_for(course.task) if self.loss == "auto" else self.loss
        objective = Distillation(
            task=course.task,
            student=student,
            teacher=taught,
            outputs=_outputs(student),
            device=course.device,
            kind=kind,
            temperature=self.temperature,
            alpha=self.alpha,
            hard=self.hard,
            features=self.features if pairs else 0.0,
            seen=looking,
        )
        return objective, runs_in, notes

    def plan(self) -> Plan:
        """The fields of the plan alone."""
        return Plan.model_validate({key: getattr(self, key) for key in Plan.model_fields})

    def _pairs(self, student: Program, course: Course) -> dict[str, str]:
        if self.features == 0:
            return {}
        return matched(student, course.original.clone(), self.nodes)


class _Looking:
    """Looks at training inputs until some vary."""

    def __init__(self) -> None:
        self._varied: bool | None = None

    def __call__(self, flat: Sequence[Tensor]) -> None:
        """Look at a batch."""
        if not self._varied:
            self._varied = not told_nothing([tuple(flat)])

    def notes(self) -> list[str]:
        """A sentence if there were inputs and none varied."""
        if self._varied is not False:
            return []
        return ["every training sample is the same constant: what was learned means nothing"]


def trainable(program: Program, sites: Sites) -> list[str]:
    """Float parameters of the chosen sites, under their canonical names.

    Raises:
        RecipeError: sites that match nothing.
    """
    floats = [
        name
        for name, tensor in program.tensors()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    ]
    return sites.choose(floats)


def _figures(trained: Trained, task: Task) -> dict[str, Any]:
    sign = 1.0 if task.higher_is_better else -1.0
    unit = sign * task.scale if labelled(task) else -1.0

    def shown(score: float | None) -> float | None:
        return None if score is None else unit * score

    history = [
        {"step": step, "loss": loss, "score": shown(score)}
        for step, loss, score in trained.evaluations
    ]
    return {
        "steps": trained.plan.steps,
        "best_step": trained.best_step,
        "score": shown(trained.score),
        "history": history,
        "seconds": trained.seconds,
    }


def _score(objective: Distillation, device: torch.device) -> Callable[[Program, str], float] | None:
    """The validation metric, higher is better; without labels the loss; None without data."""
    task = objective.task
    validation = task.validation
    if validation is None:
        return None
    measured = labelled(task)

    def score(program: Program, precision: str) -> float:
        shared = Processes.current()
        if not measured:
            return -mean_loss(program, objective, validation, device, precision, shared)
        mean = mean_score(program, task, validation, device, precision, shared)
        return mean if task.higher_is_better else -mean

    return score


def _outputs(program: Program) -> int:
    flat: Any = program.output_node.args[0]
    return len(flat)


@contextmanager
def _only(program: Program, names: Sequence[str]) -> Generator[None, None, None]:
    """For the length of a `with` block, gradients go to `names` only."""
    held = {name: tensor.requires_grad for name, tensor in program.named_parameters()}
    for parameter in program.parameters():
        parameter.requires_grad_(False)
    for name in names:
        program.tensor(name).requires_grad_(True)
    try:
        yield
    finally:
        for name, wanted in held.items():
            program.tensor(name).requires_grad_(wanted)
