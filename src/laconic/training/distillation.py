"""The objective of learning from a teacher: outputs, labels and features in one number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from laconic.core.errors import DataError, TrainingError
from laconic.core.task import Task, to_device
from laconic.program.program import Program
from laconic.statistics.batches import check_inputs, count, flat_inputs, padding_mask
from laconic.training import losses
from laconic.training.loop import Forward, Loss
from laconic.training.precision import in_float32, laid_out, wants_channels_last
from laconic.training.teacher import Teacher

Kind = Literal["kl", "mse", "cosine"]
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
        seen: is shown the inputs of every training batch.
    """

    task: Task
    student: Program
    teacher: Teacher
    outputs: int
    device: torch.device
    kind: Kind = "kl"
    temperature: float = 4.0
    alpha: float = 1.0
    hard: Literal["labels", "teacher"] = "labels"
    features: float = 0.0
    seen: Callable[[Sequence[Tensor]], None] | None = None

    def __call__(self, forward: Forward, batch: Any, number: int) -> Loss:
        """The loss of batch `number`.

        Raises:
            DataError: inputs that do not fit or are not finite; no labels where they are needed.
            TrainingError: student and teacher give different shapes.
        """
        where = f"training batch {number}"
        inputs, targets = self.task.split(batch)
        flat = flat_inputs(self.student, inputs, where)
        check_inputs(self.student, flat, where)
        samples = count(self.student, flat)
        if self.seen is not None and number >= 0:
            self.seen(flat)
        flat = laid_out(flat, self.device, wants_channels_last(self.student))
        taught = self.teacher(flat, number)
        mask = padding_mask(self.student, flat)
        given = in_float32(forward(*flat))
        value = self._outputs(given, taught, targets, mask, where)
        if self.features:
            pairs = given[self.outputs :], taught[self.outputs :]
            value = value + self.features * losses.features(*pairs, mask)
        return Loss(value, samples)

    def _outputs(
        self,
        given: Sequence[Tensor],
        taught: Sequence[Tensor],
        targets: Any,
        mask: Tensor | None,
        where: str,
    ) -> Tensor:
        arrange = self.student.signature.arrange
        outputs = arrange(given[: self.outputs])
        student = self.task.logits(outputs)
        teacher = self.task.logits(arrange(taught[: self.outputs]))
        if student.shape != teacher.shape:
            raise TrainingError(
                f"the program gives {list(student.shape)}, its teacher {list(teacher.shape)}",
                where=where,
                hint="distillation needs outputs of the original's shape",
            )
        value = torch.zeros((), device=self.device)
        if self.alpha > 0:
            value = value + self.alpha * self._soft(student, teacher, mask)
        if self.alpha < 1 and self.hard == "teacher":
            value = value + (1 - self.alpha) * losses.hard_targets(student, teacher, mask)
        elif self.alpha < 1:
            if targets is None:
                raise DataError(
                    "the batch has no targets",
                    where=where,
                    hint='take alpha: 1 (soft targets only) or hard: "teacher"',
                )
            value = value + (1 - self.alpha) * self.task.loss(
                outputs, to_device(targets, self.device)
            )
        return value

    def _soft(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if self.kind == "kl":
            return losses.soft_targets(student, teacher, self.temperature, mask)
        return _KINDS[self.kind](student, teacher, mask)


def kind_for(task: Task) -> Kind:
    """The loss between outputs that suits a task, by its metric."""
    known: dict[str, Kind] = {"cosine": "cosine", "squared error": "mse"}
    return known.get(task.metric_name, "kl")
