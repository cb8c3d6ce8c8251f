"""The objective of learning from a teacher: outputs, labels and features in one number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from laconic.core.errors import DataError, RecipeError, TrainingError
from laconic.core.task import Task, to_device
from laconic.program.program import Program
from laconic.statistics.batches import check_inputs, count, flat_inputs, padding_mask
from laconic.training import losses
from laconic.training.job import Forward, Loss
from laconic.training.precision import in_float32, laid_out, wants_channels_last
from laconic.training.teacher import Teacher, Voice

Kind = Literal["kl", "dkd", "mse", "cosine"]
Positions = Literal["all", "labelled"] | float
Compare = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None], Tensor]
"""Tapped values of student and teacher, and which positions count → a scalar."""
_KINDS: Mapping[str, Callable[..., Tensor]] = {
    "mse": losses.relative_error,
    "cosine": losses.cosine,
}


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How far a student is from its teacher on a batch.

    `alpha * soft + (1 - alpha) * hard + features * feature loss`, where soft is the loss of `kind`
    between the outputs and hard is the task's own loss on labels, or cross-entropy to the teacher's
    decisions.

    Attributes:
        student: the Program in training; its graph gives `taps` values behind its outputs.
        teacher: gives the original's outputs and as many values behind them.
        outputs: how many outputs the student's graph has without taps.
        weights: for kind "dkd", of the target class and of the others.
        positions: of outputs `[batch, tokens, classes]`, where soft targets count: everywhere (but
            for padding), where there is a label, or the share that differs most.
        ignore: the label of positions that have none.
        voices: how the teacher's values are read, if not as the student's: of several teachers the
            outputs of one stand behind those of another, tapped values last.
        compare: the feature loss.
        seen: is shown the inputs of every training batch.
    """

    task: Task
    student: Program
    teacher: Teacher
    outputs: int
    device: torch.device
    kind: Kind = "kl"
    temperature: float = 4.0
    weights: tuple[float, float] = (1.0, 1.0)
    alpha: float = 1.0
    hard: Literal["labels", "teacher"] = "labels"
    features: float = 0.0
    positions: Positions = "all"
    ignore: int = -100
    voices: Sequence[Voice] = ()
    compare: Compare = losses.features
    seen: Callable[[Sequence[Tensor]], None] | None = None

    @property
    def compares(self) -> bool:
        """Whether the teacher's outputs count; if not, they may be of another task's shape."""
        return self.alpha > 0 or self.hard == "teacher"

    def held_out(self) -> "Distillation":
        """How far the outputs alone are from the teacher's, for data that are not trained on."""
        kind: Kind = "kl" if self.kind == "dkd" else self.kind
        return replace(self, kind=kind, alpha=1.0, features=0.0, positions="all", seen=None)

    def __call__(self, forward: Forward, batch: Any, number: int) -> Loss:
        """The loss of batch `number`.

        Raises:
            DataError: inputs that do not fit or are not finite; no labels where they are needed.
            TrainingError: student and teacher give different shapes.
        """
        where = f"training batch {number}" if number >= 0 else f"validation batch {-1 - number}"
        inputs, targets = self.task.split(batch)
        flat = flat_inputs(self.student, inputs, where)
        check_inputs(self.student, flat, where)
        samples = count(self.student, flat)
        if self.seen is not None and number >= 0:
            self.seen(flat)
        flat = laid_out(flat, self.device, wants_channels_last(self.student))
        needed = self.compares or self.features
        taught = self.teacher(flat, number) if needed else []
        mask = padding_mask(self.student, flat)
        given = in_float32(forward(*flat))
        with torch.autocast(self.device.type, enabled=False):  # it would round products of losses
            value = self._outputs(given, taught, to_device(targets, self.device), mask, where)
            if self.features:
                spoken = sum(voice.outputs for voice in self._voices)
                pairs = given[self.outputs :], taught[spoken:]
                value = value + self.features * self.compare(*pairs, mask)
        return Loss(value, samples)

    @property
    def _voices(self) -> Sequence[Voice]:
        return self.voices or (Voice(self.student.signature.arrange, self.outputs),)

    def _outputs(
        self,
        given: Sequence[Tensor],
        taught: Sequence[Tensor],
        targets: Any,
        mask: Tensor | None,
        where: str,
    ) -> Tensor:
        outputs = self.student.signature.arrange(given[: self.outputs])
        value = torch.zeros((), device=self.device)
        if self.compares:
            student = self.task.logits(outputs)
            teacher = self._said(student, taught, where)
            value = value + self._taught(student, teacher, targets, mask, where)
        if self.alpha < 1 and self.hard == "labels":
            if targets is None:
                raise DataError(
                    "the batch has no targets",
                    where=where,
                    hint='take alpha: 1 (soft targets only) or hard: "teacher"',
                )
            value = value + (1 - self.alpha) * self.task.loss(outputs, targets)
        return value

    def _said(self, student: Tensor, taught: Sequence[Tensor], where: str) -> Tensor:
        """The teacher's logits, or those of all teachers together."""
        said: list[Tensor] = []
        start = 0
        for voice in self._voices:
            logits = self.task.logits(voice.arrange(taught[start : start + voice.outputs]))
            start += voice.outputs
            if student.shape != logits.shape:
                raise TrainingError(
                    f"the program gives {list(student.shape)}, its teacher {list(logits.shape)}",
                    where=where,
                    hint="distillation needs outputs of the original's shape: the same classes or "
                    "vocabulary, the same positions",
                )
            said.append(logits)
        return losses.mixture(said, self.kind, self.temperature)

    def _taught(
        self, student: Tensor, teacher: Tensor, targets: Any, mask: Tensor | None, where: str
    ) -> Tensor:
        """What is learned from the teacher's outputs."""
        value = torch.zeros((), device=self.device)
        if self.alpha > 0:
            counted = self._counted(student, teacher, targets, mask, where)
            value = value + self.alpha * self._soft(student, teacher, targets, counted)
        if self.alpha < 1 and self.hard == "teacher":
            value = value + (1 - self.alpha) * losses.hard_targets(student, teacher, mask)
        return value

    def _counted(
        self, student: Tensor, teacher: Tensor, targets: Any, mask: Tensor | None, where: str
    ) -> Tensor | None:
        """Which positions count for the soft targets."""
        if self.positions == "all":
            return mask
        if isinstance(self.positions, float):
            return losses.hardest(student, teacher, self.positions, mask)
        if not isinstance(targets, Tensor) or targets.shape != student.shape[:-1]:
            found = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise DataError(
                f"targets are {found}, outputs {list(student.shape)}: which positions have a label "
                "cannot be told",
                where=where,
                hint=f'positions: "labelled" needs targets of {list(student.shape[:-1])}',
            )
        labelled = targets != self.ignore
        return labelled if mask is None or mask.shape != labelled.shape else labelled & mask

    def _soft(self, student: Tensor, teacher: Tensor, targets: Any, mask: Tensor | None) -> Tensor:
        if self.kind == "dkd":
            classes = self._classes(teacher, targets)
            return losses.decoupled_targets(
                student, teacher, classes, self.temperature, self.weights, mask
            )
        return soft(self.kind, student, teacher, self.temperature, mask)

    def _classes(self, teacher: Tensor, targets: Any) -> Tensor:
        """The target class of each position: its label, or what the teacher takes it for."""
        chosen = teacher.argmax(-1)
        if not isinstance(targets, Tensor) or targets.shape != chosen.shape:
            return chosen
        if targets.is_floating_point():
            return chosen
        known = (targets != self.ignore) & (targets >= 0) & (targets < teacher.shape[-1])
        return torch.where(known, targets, chosen)


def soft(
    kind: Kind, student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """The loss of a kind between outputs, `[..., classes]` each; "dkd" is "kl" here. A scalar."""
    if kind in _KINDS:
        return _KINDS[kind](student, teacher, mask)
    return losses.soft_targets(student, teacher, temperature, mask)


def kind_for(task: Task, logits: Tensor | None = None) -> Kind:
    """The loss between outputs that suits a task, by its metric.

    Where `logits` are one number a sample, "mse": a softmax over one number is 1 whatever it is.
    """
    known: dict[str, Kind] = {"cosine": "cosine", "squared error": "mse"}
    kind = known.get(task.metric_name, "kl")
    return "mse" if kind == "kl" and logits is not None and _single(logits) else kind


def kind_of(
    wish: Kind | Literal["auto"], program: Program, task: Task, alpha: float, device: torch.device
) -> Kind:
    """The loss that is wished for between a program's outputs; `alpha`: its weight.

    Raises:
        RecipeError: a divergence of distributions between single numbers.
    """
    logits = _on_example(program, task, device)
    if wish == "auto":
        return kind_for(task, logits)
    if wish in ("kl", "dkd") and alpha > 0 and _single(logits):
        raise RecipeError(
            f"{wish} compares distributions, and outputs {list(logits.shape)} are one number a "
            "sample: nothing would be learned",
            where="loss",
            hint='take loss: "mse"',
        )
    return wish


def _single(logits: Tensor) -> bool:
    """Whether outputs are one number a sample, which is no distribution."""
    return logits.ndim < 2 or logits.shape[-1] == 1


def _on_example(program: Program, task: Task, device: torch.device) -> Tensor:
    """Zeros in the shape of what is compared on the example; they take no memory."""
    flat: Any = program.output_node.args[0]
    if any("shape" not in node.meta for node in flat):
        program = program.clone()
        program.propagate()
        flat = program.output_node.args[0]
    shapes = [(node.meta["shape"], node.meta["dtype"]) for node in flat]
    zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype in shapes]
    return task.logits(program.signature.arrange(zeros))
