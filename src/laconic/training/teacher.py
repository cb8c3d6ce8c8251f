"""What the original model, or any other teacher, says about a batch."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.training.precision import autocast, in_float32, set_layout, wants_channels_last
from laconic.training.taps import tapped

Teacher = Callable[[Sequence[Tensor], int], list[Tensor]]
"""Flat inputs and the number of the batch → flat outputs, then the values of the tapped nodes."""


@dataclass(frozen=True)
class Voice:
    """How one teacher's flat outputs are read.

    Attributes:
        arrange: nests its flat outputs as its model gave them.
        outputs: how many there are.
    """

    arrange: Callable[[Sequence[Tensor]], Any]
    outputs: int


class Several:
    """Several teachers as one: the outputs of each, then the tapped values of the first."""

    def __init__(self, teachers: Sequence[Teacher], outputs: int) -> None:
        """`outputs`: how many the first one has."""
        self._teachers = teachers
        self._outputs = outputs

    def __call__(self, flat: Sequence[Tensor], number: int) -> list[Tensor]:
        """Outputs of all, then tapped values."""
        first, *others = (teacher(flat, number) for teacher in self._teachers)
        further = [value for values in others for value in values]
        return [*first[: self._outputs], *further, *first[self._outputs :]]


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
    """A teacher that is asked once about every batch of a list that is gone through many times.

    Args:
        teacher: who is asked.
        batches: how many batches come again and again; 0 if they do not.
        held_out: whether those of negative numbers, which are not trained on, come again too.
        most_bytes: how much is remembered.
    """

    def __init__(
        self, teacher: Teacher, batches: int, held_out: bool = False, most_bytes: int = 2**29
    ) -> None:
        self._teacher = teacher
        self._batches = batches
        self._held_out = held_out
        self._left = most_bytes
        self._known: dict[int, list[Tensor]] = {}

    def __call__(self, flat: Sequence[Tensor], number: int) -> list[Tensor]:
        """Outputs, then tapped values."""
        if not (self._held_out if number < 0 else self._batches):
            return self._teacher(flat, number)
        place = number if number < 0 else number % self._batches
        if place in self._known:
            return self._known[place]
        values = self._teacher(flat, number)
        size = sum(value.numel() * value.element_size() for value in values)
        if size <= self._left:
            self._left -= size
            self._known[place] = values
        return values
