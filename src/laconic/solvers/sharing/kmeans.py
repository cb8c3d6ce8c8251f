"""k-means of numbers: the few values that stand for many with the least weighted squared error.

On a line clusters are intervals, so the best ones are found exactly by dynamic programming (Wang &
Song 2011, "Ckmeans.1d.dp"). More than `_POINTS` different values are first gathered into as many
bins, and the borders found there are polished by Lloyd's iteration on all values, which costs a
sort and then a few binary searches a round. Everything is float64 and, given the generator,
deterministic.
"""

from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from laconic.core.errors import DataError

Start: TypeAlias = Literal["exact", "linear", "plusplus"]
Floats: TypeAlias = NDArray[np.float64]

_POINTS = 1024  # different values up to which the result is the global optimum
_ROUNDS = 300
_FLOOR = 1e-4  # least weight, in parts of the mean: what does not matter still wants a value


def centroids(
    values: Tensor,
    clusters: int,
    weights: Tensor | None = None,
    *,
    start: Start = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The values that stand for `values`, ascending: float64 `[at most clusters]`.

    There are fewer than `clusters` where there are fewer different values; no cluster is empty.

    Args:
        values: any shape, finite.
        clusters: how many, at least 1.
        weights: the shape of `values`, not negative: what a squared error counts; None: all alike.
        start: "exact" is the optimum for up to 1,024 different values and close to it beyond;
            "linear" begins with values at equal distances from the least to the greatest, which
            keeps large weights apart (Han et al. 2016); "plusplus" draws them (Arthur &
            Vassilvitskii 2007).
        generator: for "plusplus".

    Raises:
        DataError: NaN or infinite values, weights that are negative or do not fit.
    """
    points, mass = _sorted(values, weights)
    if len(points) <= clusters:
        return torch.from_numpy(points)
    sums = _Sums(points, mass)
    if start == "exact":
        bins, weight, starts = _gathered(points, mass)
        ends = np.append(starts, len(points))
        found = sums.means(ends[_best_borders(bins, weight, clusters)])
    elif start == "linear":
        found = np.linspace(points[0], points[-1], clusters)
    else:
        found = _plusplus(points, mass, clusters, generator)
    return torch.from_numpy(_lloyd(sums, found))


def error(values: Tensor, chosen: Tensor, weights: Tensor | None = None) -> float:
    """Weighted squared error of the nearest of `chosen` (ascending), summed."""
    points, mass = _sorted(values, weights)
    found = chosen.detach().cpu().double().numpy()
    nearest = found[np.searchsorted((found[1:] + found[:-1]) / 2, points)]
    return float((mass * (points - nearest) ** 2).sum())


def _sorted(values: Tensor, weights: Tensor | None) -> tuple[Floats, Floats]:
    """Different values, ascending, and the weight of each."""
    x = values.detach().cpu().double().flatten().numpy()
    w = np.ones_like(x)
    if weights is not None:
        w = weights.detach().cpu().double().flatten().numpy()
        if w.shape != x.shape or not np.isfinite(w).all() or (w < 0).any():
            raise DataError(f"weights {list(weights.shape)} for values {list(values.shape)}",
                            hint="one finite weight, not below 0, for every value")  # fmt: skip
        w = np.maximum(w, _FLOOR * w.mean()) if w.any() else np.ones_like(x)
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).sum())
        raise DataError(f"{bad} of {x.size} values are NaN or infinite")
    points, where = np.unique(x, return_inverse=True)
    return points, np.bincount(where.reshape(-1), w, len(points)).astype(np.float64)


class _Sums:
    """Running sums over sorted points, so that the mean of any interval is two differences."""

    def __init__(self, points: Floats, mass: Floats) -> None:
        self.points, self.mass = points, mass
        self._origin = float(np.average(points, weights=mass))  # differences stay precise
        self._weight = np.concatenate([[0.0], np.cumsum(mass)])
        self._first = np.concatenate([[0.0], np.cumsum(mass * (points - self._origin))])

    def means(self, borders: NDArray[np.int64]) -> Floats:
        """Weighted means between `borders` `[k + 1]`; empty intervals give NaN."""
        weight = np.diff(self._weight[borders])
        total = np.diff(self._first[borders])
        empty = np.diff(borders) == 0
        found = np.where(empty, np.nan, total / np.where(empty, 1.0, weight) + self._origin)
        low = self.points[np.minimum(borders[:-1], len(self.points) - 1)]
        high = self.points[borders[1:] - 1]
        return np.where(empty, np.nan, np.clip(found, low, high))

    def borders(self, found: Floats) -> NDArray[np.int64]:
        """Where the points of one centroid end and those of the next begin, `[k + 1]`."""
        inner = np.searchsorted(self.points, (found[1:] + found[:-1]) / 2, side="right")
        return np.concatenate([[0], inner, [len(self.points)]]).astype(np.int64)


def _lloyd(sums: _Sums, found: Floats) -> Floats:
    """Assign and average until nothing moves; an empty cluster goes where the error is largest."""
    borders = sums.borders(found)
    for _ in range(_ROUNDS):
        made = sums.means(borders)
        empty = np.isnan(made)
        if empty.any():
            made = np.sort(_filled(sums, borders, made))
        now = sums.borders(made)
        found = made
        if not empty.any() and np.array_equal(now, borders):
            break
        borders = now
    final = sums.means(sums.borders(found))
    return np.unique(final[~np.isnan(final)])


def _filled(sums: _Sums, borders: NDArray[np.int64], means: Floats) -> Floats:
    """Centroids whose empty ones stand on the points of the largest error."""
    own = np.repeat(means, np.diff(borders))
    errors = sums.mass * (sums.points - own) ** 2
    count = int(np.isnan(means).sum())
    worst = np.argsort(-errors, kind="stable")[:count]
    made = means.copy()
    made[np.isnan(means)] = sums.points[worst]
    return made


def _plusplus(
    points: Floats, mass: Floats, clusters: int, generator: torch.Generator | None
) -> Floats:
    """Each next one is drawn in proportion to its weighted squared distance from those so far."""
    draws = torch.rand(clusters, generator=generator, dtype=torch.float64).numpy()
    chosen: list[float] = []
    chances = mass
    away = np.full_like(points, np.inf)
    for draw in draws:
        running = np.cumsum(chances)
        place = min(int(np.searchsorted(running, draw * running[-1])), len(points) - 1)
        chosen.append(float(points[place]))
        away = np.minimum(away, (points - points[place]) ** 2)
        chances = mass * away
    return np.sort(np.array(chosen))


def _gathered(points: Floats, mass: Floats) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """(means, weights, first point of each bin) of at most `_POINTS` bins.

    Half of the borders at equal distances, for the tails, half at equal numbers, for the middle.
    """
    count = len(points)
    starts = np.arange(count)
    if count > _POINTS:
        half = _POINTS // 2
        even = np.searchsorted(points, np.linspace(points[0], points[-1], half, endpoint=False))
        starts = np.unique(np.concatenate([even, np.arange(half) * count // half]))
    weight = np.add.reduceat(mass, starts)
    return np.add.reduceat(mass * points, starts) / weight, weight, starts


def _best_borders(points: Floats, mass: Floats, clusters: int) -> NDArray[np.int64]:
    """Borders `[clusters + 1]` with the least weighted error.

    `best[j]` is the least error of the first `j` bins in as many clusters as rounds have passed.
    """
    bins = len(points)
    clusters = min(clusters, bins)
    x = points - np.average(points, weights=mass)
    sums = [np.concatenate([[0.0], np.cumsum(mass * x**power)]) for power in range(3)]
    weight, first, second = (s[:, None] - s[None, :] for s in sums)  # [to, from)
    with np.errstate(divide="ignore", invalid="ignore"):
        within = np.maximum(second - first**2 / weight, 0.0)
    inside = np.arange(bins + 1)[:, None] > np.arange(bins + 1)[None, :]
    within = np.where(inside, within, np.inf)
    best, choice = within[:, 0], list[NDArray[np.intp]]()
    for _ in range(clusters - 1):
        total = best + within
        choice.append(total.argmin(1))
        best = np.take_along_axis(total, choice[-1][:, None], 1)[:, 0]
    ends = [bins]
    for row in reversed(choice):
        ends.append(int(row[ends[-1]]))
    return np.array([0, *reversed(ends)], dtype=np.int64)
