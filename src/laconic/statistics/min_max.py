"""Smallest and largest value, of a tensor or of each of its channels."""

from typing import Self

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.statistics.base import Statistic, finite, same_settings


class MinMax(Statistic):
    """Extremes of a stream: scalars, or `[channels]` along `axis`.

    Attributes:
        axis: dimension whose indices are kept apart; None takes all values together.
        minimum: float tensor `[]` or `[channels]`; +inf before the first update.
        maximum: the same, -inf before the first update.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.minimum = torch.tensor(torch.inf)
        self.maximum = torch.tensor(-torch.inf)

    def update(self, tensor: Tensor) -> None:
        """Take one tensor of any shape in; an empty one changes nothing."""
        if tensor.numel() == 0:
            return
        tensor = finite(tensor)
        if self.axis is None:
            low, high = torch.aminmax(tensor)
        else:
            low, high = torch.aminmax(tensor.movedim(self.axis, 0).flatten(1), dim=1)
        self._take(low.float().cpu(), high.float().cpu())

    def merge(self, other: Self) -> None:
        """Take in what another one has seen."""
        same_settings(self.axis, other.axis, "axis")
        self._take(other.minimum, other.maximum)

    def _take(self, low: Tensor, high: Tensor) -> None:
        if self.minimum.ndim and low.ndim and self.minimum.shape != low.shape:
            raise DataError(f"{low.numel()} channels after {self.minimum.numel()}")
        self.minimum = torch.minimum(self.minimum, low)
        self.maximum = torch.maximum(self.maximum, high)
