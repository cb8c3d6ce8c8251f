"""Which range of values an integer grid should cover, from a histogram of the values.

A wide range clips nothing and rounds coarsely, a narrow one rounds finely and clips the tails. Four
rules: the extremes (`minmax`), percentiles, the least squared error (`mse`), and the least
divergence between the histogram and its quantised twin (`entropy`: Migacz, "8-bit Inference with
TensorRT", GTC 2017).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.statistics.histogram import Histogram

Rule = Literal["minmax", "percentile", "mse", "entropy"]
_FRACTIONS = 80
_RESOLVED = 1e-3  # a grid on which fewer values than that differ from zero is useless
_LOST = 0.25  # of a step: values below it are lost


@dataclass(frozen=True)
class Grid:
    """A uniform grid `(code - zero_point) * scale`, codes in [qmin, qmax].

    Attributes:
        scale: float32 `[]`, `[channels]` or `[channels, groups]`, positive.
        zero_point: int32, the same shape.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int


def choose(
    histogram: Histogram,
    rule: Rule,
    *,
    symmetric: bool,
    percentile: float = 99.99,
    bits: int = 8,
) -> tuple[float, float]:
    """The range (low, high) that `rule` picks, zero included; low = -high where symmetric.

    Args:
        histogram: of the values, at least one of them.
        rule: see the module.
        symmetric: whether the grid has to be symmetric around zero if there are negative values.
        percentile: how many per cent of the values must not be clipped at either end.
        bits: of the codes.
    """
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    if rule == "percentile":
        part = percentile / 100
        low = min(max(low, histogram.percentile(1 - part)), 0.0)
        high = max(min(high, histogram.percentile(part)), 0.0)
    if symmetric and low < 0:
        high = max(-low, high)
        low = -high
    if rule == "mse":
        return _least_error(histogram, low, high, symmetric, bits)
    if rule == "entropy":
        return _least_divergence(histogram, low, high, bits)
    return low, high


def grid(
    low: float, high: float, *, symmetric: bool, bits: int = 8, power_of_two: bool = False
) -> Grid:
    """The grid over [low, high]: unsigned with zero point 0 where nothing is negative.

    Signed and around zero where `symmetric`, else unsigned with a zero point. Zero is always a
    point of it. With `power_of_two` the step is the next one that is.
    """
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    signed = symmetric and low < 0
    qmin, qmax = (-half, half - 1) if signed else (0, levels)
    scale = max(-low / half, high / (half - 1)) if signed else (high - min(low, 0.0)) / levels
    scale = max(scale, float(torch.finfo(torch.float32).tiny) * 2**bits)
    if power_of_two:
        scale = 2.0 ** math.ceil(math.log2(scale))
    zero = 0 if signed or low >= 0 else min(max(round(-low / scale), 0), levels)
    return Grid(
        torch.tensor(scale, dtype=torch.float32), torch.tensor(zero, dtype=torch.int32), qmin, qmax
    )


def unfit(histogram: Histogram, chosen: Grid | None = None) -> str:
    """Why values cannot be put on a grid, in words; empty if they can.

    `chosen`: the grid; None: the one of 8 bits with the least squared error.
    """
    if not histogram.total or histogram.minimum == histogram.maximum == 0:
        return "only zeros were seen in calibration, so no range is known"
    if chosen is None:
        low, high = choose(histogram, "mse", symmetric=True)
        chosen = grid(low, high, symmetric=True)
    if resolved_share(histogram, chosen) < _RESOLVED or _lost_share(histogram, chosen) > 0.5:
        extremes = f"[{histogram.minimum:.4g}, {histogram.maximum:.4g}]"
        return f"outliers stretch its range to {extremes}: nearly all codes would be 0"
    return ""


def _lost_share(histogram: Histogram, chosen: Grid) -> float:
    """Share of the values other than zero that surely lie below a part of the grid's step."""
    furthest = histogram.centres.abs() + histogram.width / 2
    near = furthest <= _LOST * chosen.scale.double()
    lost = int(histogram.counts[near].sum()) - histogram.zeros
    return max(lost, 0) / max(histogram.total - histogram.zeros, 1)


def squared_error(histogram: Histogram, chosen: Grid) -> float:
    """Mean squared error of the histogram's values (bin centres) on a grid."""
    wanted = _occupied(histogram)
    return float(_errors(*wanted, chosen.scale.double()[None], chosen.zero_point.double()[None],
                         chosen.qmin, chosen.qmax)[0]) / histogram.total  # fmt: skip


def resolved_share(histogram: Histogram, chosen: Grid) -> float:
    """Share of the values that get another code than zero's: near 0 if outliers set the range."""
    centres, counts = _occupied(histogram)
    away = torch.round(centres / chosen.scale.double()) != 0
    return float(counts[away].sum()) / histogram.total


def _occupied(histogram: Histogram) -> tuple[Tensor, Tensor]:
    """float64 (centres, counts) of the bins that hold something; zero's bin stands at zero."""
    held = histogram.counts.nonzero().flatten()
    centres = histogram.centres[held].clamp(histogram.minimum, histogram.maximum)
    centres = torch.where(held == histogram.bins // 2, torch.zeros_like(centres), centres)
    return centres, histogram.counts[held].double()


def _errors(
    centres: Tensor, counts: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
) -> Tensor:
    """Summed squared error for each of the grids `scale, zero` `[grids]`."""
    codes = torch.round(centres / scale[:, None]).add_(zero[:, None]).clamp_(qmin, qmax)
    off = codes.sub_(zero[:, None]).mul_(scale[:, None]).sub_(centres)
    return off.square_() @ counts


def _least_error(
    histogram: Histogram, low: float, high: float, symmetric: bool, bits: int
) -> tuple[float, float]:
    """Shrink both ends to the least squared error: together, or in turns where not symmetric."""
    centres, counts = _occupied(histogram)
    one_sided = low >= 0 or symmetric
    shares = torch.linspace(1, 1 / _FRACTIONS, _FRACTIONS, dtype=torch.float64)

    def best(lows: Tensor, highs: Tensor) -> int:
        scale, zero, qmin, qmax = _grids(lows, highs, symmetric, bits)
        return int(_errors(centres, counts, scale, zero, qmin, qmax).argmin())

    if one_sided:
        share = float(shares[best(low * shares, high * shares)])
        return low * share, high * share
    ends = [low, high]
    for turn in range(6):
        end = turn % 2
        tried = [torch.full_like(shares, ends[0]), torch.full_like(shares, ends[1])]
        tried[end] = (low, high)[end] * shares
        ends[end] = float(tried[end][best(*tried)])
    return ends[0], ends[1]


def _grids(
    lows: Tensor, highs: Tensor, symmetric: bool, bits: int
) -> tuple[Tensor, Tensor, int, int]:
    """`grid` for many ranges at once: (scales, zero points, qmin, qmax)."""
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    smallest = torch.finfo(torch.float32).tiny * 2**bits
    if bool((lows >= 0).all()):
        return (highs / levels).clamp(min=smallest), torch.zeros_like(highs), 0, levels
    if symmetric:
        scale = torch.maximum(-lows / half, highs / (half - 1))
        return scale.clamp(min=smallest), torch.zeros_like(highs), -half, half - 1
    scale = ((highs - lows) / levels).clamp(min=smallest)
    return scale, torch.round(-lows / scale).clamp(0, levels), 0, levels


def _least_divergence(
    histogram: Histogram, low: float, high: float, bits: int
) -> tuple[float, float]:
    """Shrink both ends by one factor to the least Kullback-Leibler divergence."""
    counts = histogram.counts.double()
    half, levels = histogram.bins // 2, 2**bits
    best, found = float("inf"), (low, high)
    for step in range(_FRACTIONS, _FRACTIONS // 8 - 1, -1):
        share = step / _FRACTIONS
        first = half + int(low * share / histogram.width // 1)
        last = half + int(-(-high * share / histogram.width // 1))
        if last - first < levels // 2:
            break
        divergence = _divergence(counts, max(first, 0), min(last, histogram.bins), levels)
        if divergence < best:
            best, found = divergence, (low * share, high * share)
    return found


def _divergence(counts: Tensor, first: int, last: int, levels: int) -> float:
    """KL(P, Q): P the clipped histogram, tails on its end bins; Q the same on `levels` levels."""
    inside = counts[first:last]
    clipped = inside.clone()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    place = torch.arange(len(inside)) * levels // len(inside)
    held = (clipped > 0).double()
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, place, inside)
    holders = torch.zeros(levels, dtype=torch.float64).index_add_(0, place, held)
    spread = (sums / holders.clamp(min=1))[place] * held
    total, spread_total = clipped.sum(), spread.sum()
    if total == 0 or spread_total == 0:
        return float("inf")
    p = clipped / total
    q = (spread / spread_total).clamp(min=1e-12)
    return float((p * (p / q).clamp(min=1e-300).log()).sum())
