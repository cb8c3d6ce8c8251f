"""How often each value occurs, on a grid that does not depend on the order of the data.

Bins are `[i * width, (i + 1) * width)` with `width` a power of two, the smallest for which all
values fit into `bins` bins around zero. A value outside doubles the width and adds neighbouring
bins up, which is what direct counting at that width would have given: floor(floor(x/w)/2) =
floor(x/2w). So any split and order of the data gives the same counts.
"""

import math
from typing import Self

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.statistics.base import Statistic, finite, same_settings

_SMALLEST = -100  # widths below 2**-100 would need float64 to divide by


class Histogram(Statistic):
    """Counts of all values of a stream.

    Attributes:
        bins: how many bins there are, an even number; bin `i` begins at `(i - bins // 2) * width`.
        counts: int64 `[bins]`.
        width: of a bin, a power of two.
        total: how many values there were.
        minimum, maximum: exact extremes.
    """

    def __init__(self, bins: int = 8192) -> None:
        if bins < 2 or bins % 2:
            raise DataError(f"found {bins} bins, expected an even number of at least 2")
        self.bins = bins
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self._exponent = _SMALLEST
        self.total = 0
        self.minimum = math.inf
        self.maximum = -math.inf

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self._exponent

    @property
    def edges(self) -> Tensor:
        """float64 `[bins + 1]`: where the bins meet."""
        half = self.bins // 2
        return torch.arange(-half, half + 1, dtype=torch.float64) * self.width

    @property
    def centres(self) -> Tensor:
        """float64 `[bins]`: the middle of each bin."""
        return self.edges[:-1] + self.width / 2

    def update(self, tensor: Tensor) -> None:
        """Count every value of a tensor of any shape."""
        if tensor.numel() == 0:
            return
        values = finite(tensor).float().flatten()
        low, high = (float(v) for v in torch.aminmax(values))
        self._widen(self._exponent_for(low, high))
        places = torch.floor(values * 2.0**-self._exponent).long() + self.bins // 2
        self.counts += torch.bincount(places, minlength=self.bins).cpu()
        self.total += values.numel()
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)

    def merge(self, other: Self) -> None:
        """Add the counts of another one."""
        same_settings(self.bins, other.bins, "number of bins")
        self._widen(other._exponent)
        self.counts += _coarsened(other.counts, self._exponent - other._exponent)
        self.total += other.total
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    def percentile(self, fraction: float) -> float:
        """The value below which `fraction` (0 to 1) of the values lie, linear within a bin.

        Raises:
            DataError: nothing was counted.
        """
        if not self.total:
            raise DataError("no values were counted")
        wanted = fraction * self.total
        reached = self.counts.cumsum(0)
        place = int(torch.searchsorted(reached, torch.tensor(wanted, dtype=torch.float64)))
        place = min(place, self.bins - 1)
        inside = float(self.counts[place])
        before = float(reached[place]) - inside
        part = (wanted - before) / inside if inside else 0.0
        value = (place - self.bins // 2 + part) * self.width
        return min(max(value, self.minimum), self.maximum)

    def _exponent_for(self, low: float, high: float) -> int:
        """The smallest exponent at which both extremes have a bin."""
        half, found = self.bins // 2, _SMALLEST
        largest = max(abs(low), abs(high))
        if largest > 0:
            found = max(found, math.frexp(largest)[1] - half.bit_length() - 1)
        while not (-half <= math.floor(low / 2.0**found) and high / 2.0**found < half):
            found += 1
        return found

    def _widen(self, exponent: int) -> None:
        if exponent > self._exponent:
            self.counts = _coarsened(self.counts, exponent - self._exponent)
            self._exponent = exponent


def _coarsened(counts: Tensor, doublings: int) -> Tensor:
    """Counts on bins `2**doublings` times as wide."""
    if not doublings:
        return counts
    bins = len(counts)
    places = torch.arange(bins) - bins // 2
    places = places >> min(doublings, 62)
    return torch.zeros_like(counts).index_add_(0, places + bins // 2, counts)
