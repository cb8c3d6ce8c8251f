"""Frequency tables in integer arithmetic: every platform computes the same ones.

A table gives each symbol an integer frequency of at least 1; the frequencies of a table add up to
2^24, the fixed point in which `constriction` codes. No floating-point number takes part. All
quantities fit signed 64-bit integers; `docs/format.md` states each formula.
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

TOTAL = 1 << 24
CLASSES = 40
ALPHABET = 1024
LOG2_E = 94548  # floor(2^16 log2(e))
LOG2_E_BY_PI = 30095  # floor(2^16 log2(e) / pi)
FLOOR = 512


def eighth_power(n: int) -> int:
    """floor(2^(30 + n/8)), for n of at least -240."""
    return math.isqrt(math.isqrt(math.isqrt(1 << (n + 240))))


def thresholds(first: int, last: int) -> Ints:
    """Borders of quarter-octave classes: 2^((m - 1/2)/4) in units of 2^-8, m = first..last."""
    return np.array([eighth_power(2 * m - 1) >> 22 for m in range(first, last + 1)], np.int64)


def normalise(weights: Ints) -> Ints:
    """Frequencies proportional to weights.

    Args:
        weights: `[tables, symbols]`, each in [0, 2^39), at least two symbols, each row's sum
            positive.

    Returns:
        `[tables, symbols]`, each at least 1, rows adding up to 2^24.
    """
    free = TOTAL - weights.shape[1]
    frequencies = 1 + (weights * free) // weights.sum(1, keepdims=True)
    first_largest = weights.argmax(1)
    rest = TOTAL - frequencies.sum(1)
    frequencies[np.arange(len(weights)), first_largest] += rest
    return frequencies


def exp2(t: Ints) -> Ints:
    """About 2^(30 - t/2^16) for t ≥ 0: one multiplication for each bit of the fraction."""
    value = np.full(t.shape, 1 << 30, np.int64)
    factor = math.isqrt(1 << 59)
    for bit in range(15, -1, -1):
        value = np.where((t >> bit) & 1 == 1, (value * factor) >> 30, value)
        factor = math.isqrt(factor << 30)
    return np.where(t < 31 << 16, value >> np.minimum(t >> 16, 62), 0)


@cache
def inverse_scales() -> Ints:
    """2^30 / s for the scale s = 2^((k - 8)/4) of every class k."""
    return np.array([eighth_power(-2 * (k - 8)) for k in range(CLASSES)], np.int64)


def base_tables(low: int, high: int, centre: int, shape: int) -> Ints:
    """One table for every scale class: a mixture of a Laplace and a Gauss curve.

    Args:
        low: smallest symbol.
        high: largest symbol; at most 1024 symbols in all.
        centre: where the curves have their peak, within [low, high].
        shape: eighths of Laplace in the mixture, 0 to 8.

    Returns:
        frequencies `[40, high - low + 1]`.
    """
    x = np.abs(np.arange(low, high + 1, dtype=np.int64) - centre)[None, :]
    inverse = inverse_scales()[:, None]
    squared = np.array([eighth_power(-4 * (k - 8)) for k in range(CLASSES)], np.int64)[:, None]
    laplace = exp2((x * ((LOG2_E * inverse) >> 14)) >> 16)
    gauss = exp2((x * x * ((LOG2_E_BY_PI * squared) >> 14)) >> 16)
    laplace = (laplace << 24) // laplace.sum(1, keepdims=True)
    gauss = (gauss << 24) // gauss.sum(1, keepdims=True)
    return normalise(shape * laplace + (8 - shape) * gauss + FLOOR)
