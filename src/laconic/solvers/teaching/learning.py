"""Learning from the original: the options, the objective and the run that methods share."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic import storage
from laconic.core.errors import RecipeError
from laconic.core.progress import SILENT, Progress
from laconic.core.task import Loader, Task
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.setting import Setting
from laconic.solvers.teaching import teacher as teachers
from laconic.solvers.teaching.held_out import Measure, divergence, figures_of, score_of, turned
from laconic.statistics.batches import check_inputs, told_nothing
from laconic.training import losses
from laconic.training.checkpoint import identity_of
from laconic.training.distillation import Compare, Distillation, kind_of
from laconic.training.job import Job, Objective, Trained
from laconic.training.loop import train
from laconic.training.plan import Plan
from laconic.training.processes import Processes
from laconic.training.taps import matched, tapped
from laconic.training.teacher import Voice


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


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What is compared inside student and teacher, and what is trained for that beside the student.

    Attributes:
        ours: nodes of the student's graph, as it is while it trains.
        theirs: as many nodes of the teacher's.
        nodes: the pairs that were chosen, as an option.
        compare: the loss of their values.
        beside: names of tensors that are trained with the student and thrown away.
        resolved: further options that were decided.
    """

    ours: Sequence[str] = ()
    theirs: Sequence[str] = ()
    nodes: Mapping[str, str] = field(default_factory=dict[str, str])
    compare: Compare = losses.features
    beside: Sequence[str] = ()
    resolved: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Learning(Plan):
    """How to train towards the original Program's outputs; training methods inherit these fields.

    Attributes:
        loss: between outputs: "kl" of softened distributions over the last dimension, "dkd" (the
            same, with the divergence among the classes that are not the target weighed by itself),
            "mse" (relative to the original's mean square), "cosine"; "auto": cosine for embeddings,
            mse for regression and where there is one number a sample, kl elsewhere.
        temperature: of the softened distributions.
        dkd_alpha: for dkd, weight of the target class. The target is the label, and without labels
            what the teacher decides on.
        dkd_beta: for dkd, weight of the other classes.
        alpha: share of the soft targets; the rest goes to hard ones. 1 needs no labels.
        hard: where hard targets come from: the labels with the task's loss, or the original's own
            decisions.
        positions: of outputs with many positions (tokens), where soft targets count: "all" (padding
            never does), "labelled" (where the target is not `ignore`), or a share such as 0.3: that
            part of a batch where student and teacher differ most.
        ignore: the target of positions without a label.
        features: weight of the feature loss; 0 compares outputs only.
        nodes: what it compares: names or globs of graph nodes that both have in equal shape, or
            pairs {node: the original's node}; None takes up to eight sums (ends of blocks).
        teachers: `.laconic` files of Programs to learn from in place of the original; what several
            say is averaged, as probabilities. They take the program's inputs and give outputs of
            its shape. Features are the first one's.
        teacher: what runs the original: "torch", or a runtime, which is several times faster on a
            CPU; "auto" takes OpenVINO on a CPU where it pays and nothing stands in its way.
        watch: what chooses the best state on validation data and ends training (`patience`):
            "score" (without labels the loss), or "divergence" from the teacher, which is measured
            in any case and shows when the training data are being learned by heart.
    """

    loss: Literal["auto", "kl", "dkd", "mse", "cosine"] = "auto"
    temperature: float = Field(default=4.0, gt=0)
    dkd_alpha: float = Field(default=1.0, ge=0)
    dkd_beta: float = Field(default=2.0, ge=0)
    alpha: float = Field(default=1.0, ge=0, le=1)
    hard: Literal["labels", "teacher"] = "labels"
    positions: Literal["all", "labelled"] | Annotated[float, Field(gt=0, le=1)] = "all"
    ignore: int = -100
    features: float = Field(default=0.0, ge=0)
    nodes: tuple[str, ...] | dict[str, str] | None = None
    teachers: tuple[str, ...] = ()
    teacher: Literal["auto", "torch", "openvino", "onnxruntime"] = "auto"
    watch: Literal["score", "divergence"] = "score"

    def files(self) -> Sequence[str]:
        """The teachers' files."""
        return self.teachers

    def learn(
        self,
        program: Program,
        student: Program,
        names: Sequence[str],
        course: Course,
        around: Callable[[Objective], Objective] | None = None,
        **more: Any,
    ) -> Learned:
        """Train `student` in place towards `course.original`, or towards `teachers`.

        Args:
            program: what the step was given; only identifies the run.
            student: in training mode, a Program that nobody else uses.
            names: the tensors that are trained.
            course: what is learned from.
            around: makes the objective that is minimised of that of distillation.
            more: further fields of `Job`.

        Raises:
            DataError: no training data, or data that do not fit.
            RecipeError: teachers that take other inputs; nodes that cannot be matched.
            StorageError: a teacher's file cannot be read.
            TrainingError: the loss diverged at once, or outputs differ in shape.
        """
        plan = self.plan().settled(student, course.device, Processes.current().count)
        wise = self.wise(student, course)
        told = [self.model_dump(mode="json"), list(names), course.seed]
        own = identity_of(told, [program, *wise]) if course.folder else ""
        looking = _Looking()
        with ExitStack() as stack:
            outputs = _outputs(student)
            inside = self.inside(stack, student, wise[0], course) if self.features else Inside()
            objective, runs_in, notes = self._objective(
                stack, student, outputs, wise, course, plan, inside, looking
            )
            trained_too = [*names, *inside.beside]
            stack.enter_context(only(student, trained_too))
            stack.enter_context(tapped(student, inside.ours))
            apart = divergence(objective)
            seen = self._seen(apart)
            job = Job(
                program=student,
                names=trained_too,
                objective=around(objective) if around else objective,
                loader=course.loader,
                plan=plan,
                score=score_of(course.task, objective, course.device, seen),
                watch=apart if seen is None else None,
                seed=course.seed,
                device=course.device,
                progress=course.progress,
                folder=course.folder,
                identity=own,
                **more,
            )
            trained = train(job)
        decided = trained.plan.model_dump(mode="json", exclude={"save_every"})
        resolved = {**decided, "loss": objective.kind, "teacher": runs_in, **inside.resolved}
        if inside.nodes:
            resolved["nodes"] = dict(inside.nodes)
        figures = figures_of(trained, course.task, self.watch)
        return Learned(
            trained=trained,
            resolved=resolved,
            notes=[*notes, *trained.notes, *looking.notes(), *turned(figures)],
            figures=figures,
        )

    def _seen(self, apart: Measure | None) -> Measure | None:
        """What judges states in place of the score."""
        if self.watch == "divergence" and apart is None:
            raise RecipeError(
                "watch: divergence, but there are no validation data, or nothing is learned from "
                "a teacher's outputs",
                where="watch",
                hint='take watch: "score"',
            )
        return apart if self.watch == "divergence" else None

    def inside(
        self, stack: ExitStack, student: Program, teacher: Program, course: Course
    ) -> Inside:
        """What is compared inside; a method with losses of its own says what in its place.

        Args:
            stack: undoes, when training is over, what was done to the student's graph.
            student: the program in training.
            teacher: the first teacher; not to be changed.
            course: what is learned from.
        """
        del stack, course
        pairs = matched(student, teacher.clone(), self.nodes)
        return Inside(ours=list(pairs), theirs=list(pairs.values()), nodes=pairs)

    def _objective(
        self,
        stack: ExitStack,
        student: Program,
        outputs: int,
        wise: Sequence[Program],
        course: Course,
        plan: Plan,
        inside: Inside,
        looking: "_Looking",
    ) -> tuple[Distillation, str, list[str]]:
        """What is minimised, what runs the teachers, and what to know about that."""
        lesson = teachers.Lesson(
            programs=wise,
            plan=plan,
            taps=inside.theirs,
            loader=course.loader,
            device=course.device,
            seed=course.seed,
            validation=course.task.validation,
        )
        taught, runs_in, notes = teachers.make(stack, self.teacher, lesson)
        kind = kind_of(self.loss, student, course.task, self.alpha, course.device)
        objective = Distillation(
            task=course.task,
            student=student,
            teacher=taught,
            outputs=outputs,
            device=course.device,
            kind=kind,
            temperature=self.temperature,
            weights=(self.dkd_alpha, self.dkd_beta),
            alpha=self.alpha,
            hard=self.hard,
            features=self.features if inside.ours else 0.0,
            positions=self.positions,
            ignore=self.ignore,
            voices=[Voice(one.signature.arrange, _outputs(one)) for one in wise],
            compare=inside.compare,
            seen=looking,
        )
        return objective, runs_in, notes

    def plan(self) -> Plan:
        """The fields of the plan alone."""
        return Plan.model_validate({key: getattr(self, key) for key in Plan.model_fields})

    def wise(self, student: Program, course: Course) -> list[Program]:
        """The Programs that are learned from.

        Raises:
            RecipeError: a teacher that takes other inputs.
            StorageError: a file that cannot be read.
        """
        found = [storage.load(Path(path)) for path in self.teachers]
        for path, one in zip(self.teachers, found, strict=True):
            _check_teacher(one, student, Path(path).name)
        return found or [course.original]


def _check_teacher(teacher: Program, student: Program, name: str) -> None:
    theirs, ours = len(teacher.placeholders), len(student.placeholders)
    if theirs != ours:
        raise RecipeError(
            f"takes {theirs} inputs, the program {ours}",
            where=f"teacher {name}",
            hint="a teacher is given the program's own inputs",
        )
    check_inputs(teacher, student.example, f"teacher {name}, the program's example inputs")


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


def _outputs(program: Program) -> int:
    flat: Any = program.output_node.args[0]
    return len(flat)


@contextmanager
def only(program: Program, names: Sequence[str]) -> Generator[None, None, None]:
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
