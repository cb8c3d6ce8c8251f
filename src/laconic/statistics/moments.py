"""Count, mean and variance, of a tensor or of each of its channels (Chan et al. 1979)."""

from typing import Self

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.statistics.base import Statistic, finite, same_settings


class Moments(Statistic):
    """Mean and variance of a stream in float64: scalars, or `[channels]` along `axis`.

    Attributes:
        axis: dimension whose indices are kept apart; None takes all values together.
        count: values seen, of each channel.
        mean: float64 `[]` or `[channels]`.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    @property
    def variance(self) -> Tensor:
        """Mean squared distance from the mean (biased, as batch norm uses it)."""
        return self._squares / max(self.count, 1)

    def update(self, tensor: Tensor) -> None:
        """Take one tensor of any shape in; an empty one changes nothing."""
        if tensor.numel() == 0:
            return
        tensor = finite(tensor)
        rows = tensor.flatten()[None] if self.axis is None else tensor.movedim(self.axis, 0)
        rows = rows.flatten(1)
        wide = rows.double()
        mean = wide.mean(1)
        squares = (wide - mean[:, None]).square_().sum(1)
        if self.axis is None:
            mean, squares = mean[0], squares[0]
        self._take(rows.shape[1], mean.cpu(), squares.cpu())

    def merge(self, other: Self) -> None:
        """Take in what another one has seen."""
        same_settings(self.axis, other.axis, "axis")
        self._take(other.count, other.mean, other._squares)

    def _take(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if not count:
            return
        if self.mean.ndim and self.mean.shape != mean.shape:
            raise DataError(f"{mean.numel()} channels after {self.mean.numel()}")
        total = self.count + count
        away = mean - self.mean
        self.mean = self.mean + away * (count / total)
        self._squares = self._squares + squares + away.square() * (self.count * count / total)
        self.count = total
