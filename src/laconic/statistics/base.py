"""What every statistic is: something that takes tensors in one at a time, and that merges."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from laconic.core.errors import DataError


class Statistic(ABC):
    """A summary of a stream of tensors.

    `merge` is exact: two statistics, each fed half of a stream and merged, equal one that was fed
    all of it, whatever the order. Counts, extremes and histograms agree to the bit; sums are
    float64 and agree to its rounding.
    """

    @abstractmethod
    def update(self, tensor: Tensor) -> None:
        """Take one more tensor in.

        Raises:
            DataError: it holds NaN or infinite values, or does not fit the earlier ones.
        """

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Take in what another statistic of the same class and settings has seen.

        Raises:
            DataError: the settings or shapes differ.
        """


def finite(tensor: Tensor) -> Tensor:
    """`tensor`, detached.

    Raises:
        DataError: it holds NaN or infinite values.
    """
    tensor = tensor.detach()
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(f"{bad} of {tensor.numel()} values are NaN or infinite")
    return tensor


def same_settings(one: object, other: object, what: str) -> None:
    """Refuse to merge statistics of different settings.

    Raises:
        DataError: they differ.
    """
    if one != other:
        raise DataError(f"cannot merge: {what} is {one!r} here and {other!r} there")
