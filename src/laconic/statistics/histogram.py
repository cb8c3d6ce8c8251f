"""How often each value occurs, on a grid that does not depend on the order of the data.

Of all values together, or of each channel apart on one grid for all of them.

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
    """Counts of all values of a stream, together or channel by channel.

    Attributes:
        axis: dimension whose indices are kept apart; None takes all values together.
        bins: how many bins there are, an even number; bin `i` begins at `(i - bins // 2) * width`.
        counts: int64 `[bins]`, or `[channels, bins]` with an axis.
        width: of a bin, a power of two.
        total: how many values there were.
        zeros: how many of them were exactly zero.
        minimum, maximum: exact extremes.
    """

    def __init__(self, bins: int = 8192, axis: int | None = None) -> None:
        if bins < 2 or bins % 2:
            raise DataError(f"found {bins} bins, expected an even number of at least 2")
        self.bins, self.axis = bins, axis
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self._exponent = _SMALLEST
        self.total = self.zeros = 0
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
        values = finite(tensor).float()
        rows = values.flatten()[None] if self.axis is None else values.movedim(self.axis, 0)
        rows = rows.flatten(1)
        self._shape(len(rows))
        low, high = (float(v) for v in torch.aminmax(values))
        self._widen(self._exponent_for(low, high))
        places = torch.floor(rows * 2.0**-self._exponent).long()
        if self._exponent > 0:  # what lies next to zero may have become -0, on the other side
            places -= ((rows < 0) & (places == 0)).long()
        places += self.bins // 2
        places += self.bins * torch.arange(len(rows), device=rows.device)[:, None]
        found = torch.bincount(places.flatten(), minlength=self.bins * len(rows)).cpu()
        self.counts += found.reshape(self.counts.shape)
        self.total += values.numel()
        self.zeros += values.numel() - int(values.count_nonzero())
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)

    def merge(self, other: Self) -> None:
        """Add the counts of another one."""
        same_settings(self.bins, other.bins, "number of bins")
        same_settings(self.axis, other.axis, "axis")
        if not other.total:
            return
        self._shape(len(other.counts))
        self._widen(other._exponent)
        self.counts += _coarsened(other.counts, self._exponent - other._exponent)
        self.total += other.total
        self.zeros += other.zeros
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    def percentile(self, fraction: float) -> float:
        """The value below which `fraction` (0 to 1) of the values lie, linear within a bin.

        Raises:
            DataError: nothing was counted, or channels were counted apart.
        """
        if not self.total or self.axis is not None:
            raise DataError("no values were counted" if not self.total else "channels are apart")
        wanted = fraction * self.total
        reached = self.counts.cumsum(0)
        place = int(torch.searchsorted(reached, torch.tensor(wanted, dtype=torch.float64)))
        place = min(place, self.bins - 1)
        inside = float(self.counts[place])
        before = float(reached[place]) - inside
        part = (wanted - before) / inside if inside else 0.0
        value = (place - self.bins // 2 + part) * self.width
        return min(max(value, self.minimum), self.maximum)

    def entropy(self) -> Tensor:
        """Shannon entropy of the bins in bits, float64 `[]` or `[channels]`; 0 of nothing."""
        counts = self.counts.double()
        shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        return torch.special.entr(shares).sum(-1) / math.log(2)

    def _shape(self, channels: int) -> None:
        """Make room for the channels of the first update; the others must have as many.

        Raises:
            DataError: they have not.
        """
        if self.axis is None:
            return
        if not self.total:
            self.counts = torch.zeros(channels, self.bins, dtype=torch.int64)
        elif len(self.counts) != channels:
            raise DataError(f"{channels} channels after {len(self.counts)}")

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
    """Counts `[..., bins]` on bins `2**doublings` times as wide."""
    if not doublings:
        return counts
    bins = counts.shape[-1]
    places = torch.arange(bins) - bins // 2
    places = places >> min(doublings, 62)
    return torch.zeros_like(counts).index_add_(-1, places + bins // 2, counts)
