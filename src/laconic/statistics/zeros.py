"""How many values are exactly zero, of a tensor or of each of its channels."""

from typing import Self

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.statistics.base import Statistic, finite, same_settings


class Zeros(Statistic):
    """Counts of zeros of a stream: scalars, or `[channels]` along `axis`.

    Attributes:
        axis: dimension whose indices are kept apart; None takes all values together.
        count: values seen, of each channel.
        zeros: int64 `[]` or `[channels]`, how many of them were zero.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.count = 0
        self.zeros = torch.zeros((), dtype=torch.int64)

    @property
    def share(self) -> Tensor:
        """Part of the values that is zero, float64 `[]` or `[channels]`; 0 before any came."""
        return self.zeros.double() / max(self.count, 1)

    def update(self, tensor: Tensor) -> None:
        """Take one tensor of any shape in; an empty one changes nothing."""
        if tensor.numel() == 0:
            return
        zero = finite(tensor) == 0
        if self.axis is None:
            self._take(zero.numel(), zero.sum().cpu())
        else:
            rows = zero.movedim(self.axis, 0).flatten(1)
            self._take(rows.shape[1], rows.sum(1).cpu())

    def merge(self, other: Self) -> None:
        """Take in what another one has seen."""
        same_settings(self.axis, other.axis, "axis")
        if other.count:
            self._take(other.count, other.zeros)

    def _take(self, count: int, zeros: Tensor) -> None:
        if self.count and self.zeros.shape != zeros.shape:
            raise DataError(f"{zeros.numel()} channels after {self.zeros.numel()}")
        self.zeros = self.zeros + zeros
        self.count += count
