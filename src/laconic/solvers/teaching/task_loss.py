"""The task's loss over calibration data; without labels the distance to what the original gives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.core.task import Task
from laconic.program.program import Program
from laconic.statistics.batches import check_inputs, count, cut, flat_inputs
from laconic.training import losses
from laconic.training.distillation import kind_for


class TaskLoss:
    """The mean loss of any Program of a task, over the same samples each time.

    Args:
        task: its calibration data are used, or its training data where there are none.
        original: gives the targets of batches without labels: KL divergence from its distribution
            for classification, else the loss that `distill.logits` takes.
        samples: at most so many.
        device: where Programs without tensors run; others run where they are.
    """

    def __init__(self, task: Task, original: Program, samples: int, device: torch.device) -> None:
        self._task, self._original = task, original
        self._samples, self._device = samples, device
        self._wanted: dict[int, Any] = {}  # of unlabelled batches, by their number

    @torch.no_grad()
    def __call__(self, program: Program) -> float:
        """Mean loss of `program`.

        Raises:
            DataError: no data, or data that do not fit.
        """
        task, total, seen = self._task, 0.0, 0
        for number, batch in enumerate(task.batches("calibration", "train")):
            inputs, targets = task.split(batch)
            where = f"calibration batch {number}"
            flat = flat_inputs(program, inputs, where)
            check_inputs(program, flat, where)
            size = count(program, flat)
            taken = min(size, self._samples - seen)
            whole = not isinstance(targets, Tensor) or len(targets) != size
            if taken < size and (targets is None or not whole):
                flat, size = cut(program, flat, 0, taken), taken
                targets = None if targets is None else targets[:taken]
            total += self._loss(program, flat, targets, number) * size
            seen += size
            if seen >= self._samples:
                break
        if not seen:
            raise DataError("the calibration data are empty", where=task.name)
        return total / seen

    def _loss(self, program: Program, flat: Sequence[Tensor], targets: Any, number: int) -> float:
        outputs = self._run(program, flat)
        if targets is not None:
            there = next((t.device for _, t in program.tensors()), self._device)
            goal = targets.to(there) if isinstance(targets, Tensor) else targets
            return float(self._task.loss(outputs, goal))
        if number not in self._wanted:
            self._wanted[number] = self._task.logits(self._run(self._original, flat))
        given, wanted = self._task.logits(outputs), self._wanted[number]
        wanted = wanted.to(given.device)
        kind = kind_for(self._task, given)
        if kind == "kl":
            return float(losses.soft_targets(given, wanted, 1.0))
        apart = losses.cosine if kind == "cosine" else losses.relative_error
        return float(apart(given, wanted))

    def _run(self, program: Program, flat: Sequence[Tensor]) -> Any:
        there = next((t.device for _, t in program.tensors()), self._device)
        return program.signature.arrange(program.run_flat(*(t.to(there) for t in flat)))
