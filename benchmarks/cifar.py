"""A trained CIFAR ResNet with its data, as several benchmarks use it.

Choices are made on the validation rows; calibration and recovery see augmented training images
without their labels.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.data import Augmented, Batch, batches, cifar10, data_folder
from benchmarks.harness import Bench
from benchmarks.stages import Said
from laconic.core.task import Task, classification
from laconic.methods.base import Context
from laconic.program.capture import capture
from laconic.program.program import Program


class Cifar:
    """One ResNet of `depth`; with `--quick` every split is a small slice."""

    def __init__(self, bench: Bench, depth: int, calibration: int, batch: int) -> None:
        """`calibration`: how many images; `batch`: of the recovery's steps."""
        self.bench, self.depth, self.quick = bench, depth, bool(bench.args.quick)
        self.samples, self.batch = (64 if self.quick else calibration), batch
        weights = data_folder() / "resnet_cifar10" / f"resnet{depth}.safetensors"
        self.model = models.cifar_resnet(depth, weights)

    @cached_property
    def program(self) -> Program:
        """The original, captured."""
        return capture(self.model, (torch.zeros(2, 3, 32, 32),))

    @cached_property
    def calibration(self) -> list[tuple[Tensor]]:
        """Augmented training images: the network knows the plain ones by heart."""
        images = Augmented(cifar10("train")[: self.samples], min(self.samples, 256), seed=1)
        return [(pixels,) for pixels, _ in images]

    @cached_property
    def task(self) -> Task:
        """For recovery all training images; validation is left out, so that nothing stops early."""
        train = cifar10("train")
        return classification(
            train=Augmented(train[:512] if self.quick else train, self.batch, seed=0),
            calibration=self.calibration,
        )

    @cached_property
    def _held(self) -> dict[str, list[Batch]]:
        return {}

    def score(self, model: Callable[[Tensor], Tensor], split: str) -> float:
        """Accuracy in percent on "validation", "test" or "all"."""
        if split not in self._held:
            images = cifar10(split)
            held = batches(images[:200] if self.quick else images, 100)
            last = torch.channels_last  # a third less time than channels first
            self._held[split] = [(x.contiguous(memory_format=last), y) for x, y in held]
        with torch.inference_mode():
            right = [(model(x).argmax(1) == y).float() for x, y in self._held[split]]
        return 100 * torch.cat(right).mean().item()

    def context(self, seed: int = 0) -> Context:
        """What the methods get."""
        return Context(task=self.task, original=self.program, seed=seed, progress=Said(self.bench))


def recover(steps: int) -> dict[str, Any]:
    """The recovery that every candidate of a comparison gets: so many steps of distillation."""
    return {"method": "distill.logits", "steps": steps}
