"""Confidence intervals of accuracies, drops and mean scores; exact for right/wrong scores.

One proportion: Wilson's score interval (Wilson, JASA 22, 1927) for display, Clopper-Pearson
(Biometrika 26, 1934) where a guarantee is wanted. A paired drop of right/wrong scores: the exact
unconditional bound of `drop_bound`. Any other score: the bias-corrected and accelerated bootstrap
(Efron, JASA 82, 1987) of the paired differences, never narrower than what unseen samples may hide.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

from laconic.core.errors import DataError

Array = NDArray[np.float64]
_NUISANCE_SHARE = 2e-4  # part of alpha spent on bounding how often the two models disagree
_GRID = 33
_HALVINGS = 28
_TAIL = 1e-10  # weight of the far tails of a binomial that is counted as inside, not summed


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Wilson score interval of a proportion, as fractions.

    >>> tuple(round(end, 4) for end in wilson(9339, 10000))
    (0.9289, 0.9386)
    """
    _positive(n)
    z = float(special.ndtri(0.5 + confidence / 2))
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def clopper_pearson(
    successes: int, n: int, alpha_low: float, alpha_high: float
) -> tuple[float, float]:
    """Exact bounds of a proportion that each fail with at most the probability given."""
    _positive(n)
    low = float(special.betaincinv(successes, n - successes + 1, alpha_low)) if successes else 0.0
    high = 1.0
    if successes < n:
        high = float(special.betaincinv(successes + 1, n - successes, 1 - alpha_high))
    return low, high


def drop_bound(losses: int, gains: int, n: int, confidence: float = 0.95) -> float:
    """Exact one-sided upper bound of a paired drop of right/wrong scores, as a fraction.

    `losses` samples turned from right to wrong and `gains` from wrong to right among `n`; the drop
    is P(loss) - P(gain). The bound is Buehler's (JASA 52, 1957): the largest drop under which
    outcomes that look at least as good as this one still have probability alpha, whatever the rate
    of disagreement. Outcomes are ordered by an approximate upper limit,
    `losses - gains + z * sqrt(losses + gains + 1)`; that choice touches power only, not validity.
    The rate of disagreement is first confined to an exact interval (Berger and Boos, JASA 89,
    1994), whose error is taken out of alpha. Without a single change among 600 samples it
    certifies half a point, where McNemar's conditional test says nothing:

    >>> round(100 * drop_bound(0, 0, 600), 3)
    0.498
    """
    _positive(n)
    if losses < 0 or gains < 0 or losses + gains > n:
        raise DataError(f"{losses} losses and {gains} gains do not fit {n} samples")
    if losses == n:
        return 1.0
    total_alpha = 1 - confidence
    spent = total_alpha * _NUISANCE_SHARE
    alpha = total_alpha - spent
    best = _Region(losses, gains, n, float(special.ndtri(confidence)))
    low, high = clopper_pearson(losses + gains, n, spent / 2, spent / 2)
    # Where every disagreement is a loss the drop *is* the disagreement: a one-sided exact bound.
    edge = min(max(best.all_losses(alpha), low), high)
    bound = edge if edge > low else -1.0
    grid = np.unique(np.concatenate([np.linspace(low, high, _GRID), [edge]]))
    for _ in range(4):  # a smooth function of one variable: look closer around its maximum
        limits = best.limits(grid, alpha)
        top = int(np.argmax(limits))
        bound = max(bound, float(limits[top]))
        left, right = grid[max(top - 1, 0)], grid[min(top + 1, len(grid) - 1)]
        grid = np.linspace(left, right, 7)
    return bound


def drop_interval(losses: int, gains: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a paired drop, as fractions: two one-sided bounds."""
    one_sided = 0.5 + confidence / 2
    return (
        -drop_bound(gains, losses, n, one_sided),
        drop_bound(losses, gains, n, one_sided),
    )


class _Region:
    """Outcomes (b losses, c gains) that look at least as good as the one observed.

    With m = b + c fixed the ordering rises in b, so the region is `b <= most[m]`, and its
    probability is a sum over m of a binomial weight times a binomial distribution function.
    """

    def __init__(self, losses: int, gains: int, n: int, z: float) -> None:
        self.n, self.z = n, z
        self.observed = losses - gains + z * math.sqrt(losses + gains + 1)

    def most(self, m: Array) -> Array:
        """The largest number of losses among m disagreements inside the region; -1 if none."""
        # The tiny term keeps the observed outcome itself inside in spite of rounding.
        best = np.floor((self.observed + m - self.z * np.sqrt(m + 1)) / 2 + 1e-9)
        return np.clip(best, -1, m)

    def all_losses(self, alpha: float) -> float:
        """The largest rate of losses, without any gain, that leaves the region alpha."""
        b = np.arange(self.n + 1.0)
        inside = self.most(b) >= b
        if not inside[0]:
            return 0.0
        count = int(np.argmin(inside)) - 1 if not inside.all() else self.n
        return clopper_pearson(count, self.n, 0.5, alpha)[1]

    def limits(self, rates: Array, alpha: float) -> Array:
        """For each rate of disagreement the largest drop under which the region keeps alpha."""
        ends = np.array([[_TAIL / 4], [1 - _TAIL / 4]])
        span = special.bdtrik(ends, self.n, np.clip(rates, 1e-300, 1 - 1e-12))
        first = int(max(0, np.floor(np.nanmin(span)) - 1))
        last = int(min(self.n, np.ceil(np.nanmax(span)) + 1))
        m = np.arange(first, last + 1.0)[None, :]
        k = self.most(m)
        weight = _binomial(m, self.n, rates[:, None])
        drop_low, drop_high = -rates.copy(), rates.copy()
        for _ in range(_HALVINGS):
            drop = (drop_low + drop_high) / 2
            share = np.clip((1 + drop / np.maximum(rates, 1e-300)) / 2, 0, 1)[:, None]
            enough = (weight * _at_most(k, m, share)).sum(1) + _TAIL > alpha
            drop_low = np.where(enough, drop, drop_low)
            drop_high = np.where(enough, drop_high, drop)
        return drop_high


def _at_most(k: Array, m: Array, p: Array) -> Array:
    """P(at most k of m) for a binomial of rate p; k in [-1, m]."""
    inner = special.betainc(np.maximum(m - k, 1), np.maximum(k + 1, 1), 1 - p)
    return np.where(k < 0, 0.0, np.where(k >= m, 1.0, inner))


def _binomial(m: Array, n: int, p: Array) -> Array:
    log_choose = special.gammaln(n + 1) - special.gammaln(m + 1) - special.gammaln(n - m + 1)
    return np.exp(log_choose + special.xlogy(m, p) + special.xlog1py(n - m, -p))


def mean_interval(
    scores: Array, generator: np.random.Generator, confidence: float = 0.95
) -> tuple[float, float]:
    """Two-sided bootstrap interval (BCa) of the mean of per-sample scores `[n]`."""
    ends = _bca(scores, generator, np.array([0.5 - confidence / 2, 0.5 + confidence / 2]))
    return float(ends[0]), float(ends[1])


def mean_drop_bound(
    original: Array,
    compressed: Array,
    generator: np.random.Generator,
    confidence: float = 0.95,
    score_range: tuple[float, float] | None = None,
) -> float:
    """One-sided upper bound of the mean of `original - compressed` (paired scores `[n]`).

    The larger of the bootstrap's bound and a guard: with n samples, a loss of `worst` on a share
    `1 - alpha ** (1 / n)` of the population (about 3 / n) would be missed with probability alpha.
    `worst` is the largest loss seen, or, where no sample lost anything, the whole range of the
    score (`score_range`, else the range seen). So the bound is never the observed drop itself
    merely because no sample changed. The guard's premise, that unseen losses are not worse than
    `worst`, is an assumption; for right/wrong scores use `drop_bound`, which needs none.
    """
    loss = np.asarray(original, np.float64) - np.asarray(compressed, np.float64)
    _positive(loss.size)
    alpha = 1 - confidence
    upper = float(_bca(loss, generator, np.array([confidence]))[0])
    worst = float(loss.max())
    if worst <= 0:
        low, high = score_range or (
            float(min(original.min(), compressed.min())),
            float(max(original.max(), compressed.max())),
        )
        worst = high - low
    unseen = 1 - alpha ** (1 / loss.size)
    return max(upper, (1 - unseen) * float(loss.mean()) + unseen * worst)


def _bca(values: Array, generator: np.random.Generator, levels: Array, draws: int = 4000) -> Array:
    values = np.asarray(values, np.float64)
    _positive(values.size)
    if not np.isfinite(values).all():
        raise DataError("a score is not finite", hint="the metric returned NaN or infinity")
    mean = values.mean()
    centred = values - mean
    spread = float((centred**2).sum())
    if spread <= 1e-24 * max(1.0, float((values**2).sum())):
        return np.full(levels.shape, mean)
    means = _resampled_means(values, generator, draws)
    below = (means < mean).mean() + 0.5 * (means == mean).mean()
    bias = float(special.ndtri(np.clip(below, 1 / (2 * draws), 1 - 1 / (2 * draws))))
    acceleration = float((centred**3).sum()) / (6 * spread**1.5)
    z = special.ndtri(levels) + bias
    adjusted = special.ndtr(bias + z / np.maximum(1 - acceleration * z, 1e-3))
    return np.quantile(means, adjusted)


def _resampled_means(values: Array, generator: np.random.Generator, draws: int) -> Array:
    """Means of bootstrap samples, a slab of draws at a time so that memory stays small."""
    slab = max(1, 4_000_000 // values.size)
    parts = [
        values[generator.integers(0, values.size, (min(slab, draws - at), values.size))].mean(1)
        for at in range(0, draws, slab)
    ]
    return np.concatenate(parts)


def _positive(n: int) -> None:
    if n <= 0:
        raise DataError("an interval needs at least one sample")
