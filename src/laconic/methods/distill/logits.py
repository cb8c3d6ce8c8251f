"""Recovery training: the Program learns to give what the original gives.

Idea: after pruning or quantising, the original model itself is the best source of targets. Its
outputs, softened by a temperature, say more about a sample than a label does, so unlabelled data
are enough (Hinton, Vinyals & Dean, arXiv 1503.02531). Inner values may be compared too, where both
graphs have them in the same shape (Romero et al., "FitNets", arXiv 1412.6550); they steady deep
networks and embeddings, whose outputs alone say little.

When it helps: after any step that cost accuracy; a few passes over the training data bring most of
it back. When it does not: with a handful of samples (it overfits them; least squares on calibration
data is better there), or where nothing was lost.

Cost: for every sample a training step of the Program plus one run of the original. Networks with
batch normalisation want batches of 64 or more. `minutes` bounds it.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from laconic.core.task import Loader, Task
from laconic.methods.base import Context, Method, Outcome
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers import teacher as teachers
from laconic.training.distillation import Distillation, Kind, kind_for
from laconic.training.evaluation import labelled, mean_loss, mean_score
from laconic.training.loop import Job, Trained, train
from laconic.training.plan import Plan
from laconic.training.processes import Processes
from laconic.training.taps import matched, tapped


class Logits(Plan, Method):
    """Train towards the original Program's outputs; see `Plan` for the fields of the training.

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

    trains: ClassVar[bool] = True

    loss: Literal["auto", "kl", "mse", "cosine"] = "auto"
    temperature: float = Field(default=4.0, gt=0)
    alpha: float = Field(default=1.0, ge=0, le=1)
    hard: Literal["labels", "teacher"] = "labels"
    features: float = Field(default=0.0, ge=0)
    nodes: tuple[str, ...] | dict[str, str] | None = None
    teacher: Literal["auto", "torch", "openvino", "onnxruntime"] = "auto"

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Train a copy; the input stays as it was.

        Raises:
            DataError: no training data, or data that do not fit.
            TrainingError: the loss diverged at once, or outputs differ in shape.
        """
        student = (thaw(program) if is_frozen(program) else program.clone()).train()
        names = _trainable(student, sites)
        if not names:
            return Outcome(program=program.clone(), notes=["there is no float parameter to train"])
        plan = self._plan().settled(student, context.device, Processes.current().count)
        pairs = self._pairs(student, context)
        kind: Kind = kind_for(context.task) if self.loss == "auto" else self.loss
        with ExitStack() as stack:
            lesson = teachers.Lesson(
                original=context.original,
                plan=plan,
                taps=list(pairs.values()),
                loader=self._loader(context),
                device=context.device,
                seed=context.seed,
            )
            taught, runs_in, notes = teachers.make(stack, self.teacher, lesson)
            objective = Distillation(
                task=context.task,
                student=student,
                teacher=taught,
                outputs=_outputs(student),
                device=context.device,
                kind=kind,
                temperature=self.temperature,
                alpha=self.alpha,
                hard=self.hard,
                features=self.features if pairs else 0.0,
            )
            stack.enter_context(_only(student, names))
            stack.enter_context(tapped(student, list(pairs)))
            trained = train(self._job(program, names, objective, plan, context))
        made = freeze(student) if is_frozen(program) else student
        own = self.model_dump(mode="json", exclude_defaults=True)
        resolved = {**own, **_decided(trained.plan), "loss": kind, "teacher": runs_in}
        if pairs:
            resolved["nodes"] = pairs
        return _outcome(made, trained, context.task, resolved, [*notes, *trained.notes])

    @staticmethod
    def _loader(context: Context) -> Loader:
        return context.task.batches("train", "calibration")

    def _job(
        self,
        program: Program,
        names: Sequence[str],
        objective: Distillation,
        plan: Plan,
        context: Context,
    ) -> Job:
        return Job(
            program=objective.student,
            names=names,
            objective=objective,
            loader=self._loader(context),
            plan=plan,
            score=_score(objective, context.device),
            seed=context.seed,
            device=context.device,
            progress=context.progress,
            folder=context.workdir,
            identity=self._identity(program, names, context),
        )

    def _plan(self) -> Plan:
        return Plan.model_validate({key: getattr(self, key) for key in Plan.model_fields})

    def _pairs(self, student: Program, context: Context) -> dict[str, str]:
        if self.features == 0:
            return {}
        return matched(student, context.original.clone(), self.nodes)

    def _identity(self, program: Program, names: Sequence[str], context: Context) -> str:
        digest = hashlib.sha256(program.graph.python_code("self").src.encode())
        digest.update(
            json.dumps([self.model_dump(mode="json"), list(names), context.seed]).encode()
        )
        for name, tensor in program.tensors():
            digest.update(name.encode())
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()


def _outcome(
    made: Program,
    trained: Trained,
    task: Task,
    resolved: Mapping[str, Any],
    notes: Sequence[str],
) -> Outcome:
    sign = 1.0 if task.higher_is_better else -1.0
    unit = sign * task.scale if labelled(task) else -1.0

    def shown(score: float | None) -> float | None:
        return None if score is None else unit * score

    history = [
        {"step": step, "loss": loss, "score": shown(score)}
        for step, loss, score in trained.evaluations
    ]
    figures = {
        "steps": trained.plan.steps,
        "best_step": trained.best_step,
        "score": shown(trained.score),
        "history": history,
        "seconds": trained.seconds,
    }
    return Outcome(program=made, resolved=resolved, notes=notes, figures=figures)


def _decided(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(mode="json", exclude={"save_every"})


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


def _trainable(program: Program, sites: Sites) -> list[str]:
    """Float parameters of the chosen sites, under their canonical names."""
    floats = [
        name
        for name, tensor in program.tensors()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    ]
    return sites.choose(floats)


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
