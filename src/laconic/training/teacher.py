"""What the original model says about a batch."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.training.precision import autocast, in_float32, set_layout, wants_channels_last
from laconic.training.taps import tapped

Teacher = Callable[[Sequence[Tensor], int], list[Tensor]]
"""Flat inputs and the number of the batch → flat outputs, then the values of the tapped nodes."""


class Original:
    """A Program as a teacher: in eval mode, without gradients, in the precision of the training."""

    def __init__(
        self, program: Program, names: Sequence[str], device: torch.device, precision: str
    ) -> None:
        self._program = program.clone().eval().to(device)
        self._device, self._precision = device, precision
        if wants_channels_last(self._program):
            set_layout(self._program, True)
        self._taps = ExitStack()
        self._taps.enter_context(tapped(self._program, names))

    @torch.no_grad()
    def __call__(self, flat: Sequence[Tensor], number: int) -> list[Tensor]:
        """Outputs, then tapped values."""
        del number
        with autocast(self._device, self._precision):
            return in_float32(self._program.run_flat(*flat))


class Remembered:
    """A teacher that is asked once about every batch of a list that is gone through many times."""

    def __init__(self, teacher: Teacher, batches: int, most_bytes: int = 2**29) -> None:
        self._teacher = teacher
        self._batches = batches
        self._left = most_bytes
        self._known: dict[int, list[Tensor]] = {}

    def __call__(self, flat: Sequence[Tensor], number: int) -> list[Tensor]:
        """Outputs, then tapped values."""
        place = number % self._batches
        if number < 0:  # not a batch of that list
            return self._teacher(flat, number)
        if place in self._known:
            return self._known[place]
        values = self._teacher(flat, number)
        size = sum(value.numel() * value.element_size() for value in values)
        if size <= self._left:
            self._left -= size
            self._known[place] = values
        return values
