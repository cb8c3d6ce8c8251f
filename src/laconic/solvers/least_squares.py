"""Refit a linear map from moments: ridge regression toward a prior, the ridge chosen by the data.

Minimise  sum ||W x + b - t||^2 + e * ||W - W0||^2 * n  over W and b; b is not penalised. With
centred moments S = cov(x, x) and C = cov(t, x) the solution is

    W = (C + e W0) (S + e I)^-1,        b = mean(t) - W mean(x).

Inputs x from the compressed network and targets t from the dense one give the asymmetric form of
the refit (ThiNet, He et al. 2017; AdaPrune, Hubara et al. 2021). e is chosen on a grid by
cross-validation between two halves of the calibration samples, so that few samples fall back to the
prior by themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.statistics.gram import Gram

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Grid for the ridge, in units of the mean variance of the columns; ascending."""
_NOISE = 1e-9  # of products of float32 rows, where a matrix is singular but for it


@dataclass(frozen=True)
class Fit:
    """A refitted map.

    Attributes:
        weight: float64 `[targets, columns]`.
        bias: float64 `[targets]`; zeros where none was asked for.
        ridge: the ridge that was chosen, in units of the mean variance of the columns.
        error: mean squared residual of each target on the calibration rows, `[targets]`.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    error: Tensor


def solve(gram: Gram, prior: Tensor, ridge: float, *, bias: bool = True) -> Fit:
    """The ridge solution for one value of the ridge.

    Args:
        gram: moments of rows `[columns]` and targets `[targets]`.
        prior: `[targets, columns]`, what the weight falls back to where the data say nothing.
        ridge: in units of the mean variance of the columns.
        bias: whether the map has one; without, moments are taken about zero.

    Raises:
        DataError: no rows were seen, or rows too large to be multiplied.
    """
    if not gram.count:
        raise DataError("there are no calibration rows to fit")
    moments = gram if bias else gram.raw()
    prior = prior.to(moments.scatter)
    covariance, cross = moments.covariance, moments.cross / moments.count
    if not bool(torch.isfinite(covariance).all()):
        raise DataError("second moments of the calibration rows are not finite")
    level = float(covariance.diagonal().mean())
    if level <= 0.0:  # constant columns: only the bias can do anything
        weight = prior
    else:
        damped = covariance.clone()
        damped.diagonal().add_(ridge * level)
        weight = _solve_symmetric(damped, cross + ridge * level * prior)
    offset = moments.target_mean - weight @ moments.mean
    fit = Fit(weight, offset if bias else torch.zeros_like(offset), ridge, torch.empty(0))
    return Fit(fit.weight, fit.bias, ridge, residual(fit, gram))


def residual(fit: Fit, gram: Gram) -> Tensor:
    """Mean squared residual of each target when `fit` is used on the rows of `gram`."""
    weight = fit.weight
    centred = (
        gram.target_scatter
        - 2 * (weight * gram.cross).sum(1)
        + ((weight @ gram.scatter) * weight).sum(1)
    ) / max(gram.count, 1)
    miss = weight @ gram.mean + fit.bias - gram.target_mean
    return centred.clamp(min=0) + miss.square()


def refit(
    halves: tuple[Gram, Gram],
    prior: Tensor,
    *,
    bias: bool = True,
    ridges: Sequence[float] = RIDGES,
    importance: Tensor | None = None,
) -> Fit:
    """Fit on both halves with the ridge under which each half predicts the other best.

    Args:
        halves: moments of the two halves of the calibration samples; the second may be empty, then
            the largest ridge is used.
        prior: `[targets, columns]`.
        bias: whether the map has one.
        ridges: the grid, ascending.
        importance: `[targets]`, weight of each target's error in the choice; equal if None.
    """
    left, right = halves
    whole = Gram()
    whole.merge(left)
    whole.merge(right)
    if not left.count or not right.count:
        return solve(whole, prior, max(ridges), bias=bias)
    spread = whole.target_scatter / whole.count
    scale = 1 / spread.clamp(min=1e-12 * float(spread.max()) + 1e-30)
    weighting = scale if importance is None else importance.to(spread)
    best = _valley(ridges, lambda ridge: _held_out(left, right, prior, ridge, bias, weighting))
    return solve(whole, prior, best, bias=bias)


def _valley(grid: Sequence[float], score: Callable[[float], float]) -> float:
    """The value of a sorted grid with the least score, found downhill from the middle.

    Each score costs two factorisations; between too little and too much there is one valley.
    """
    known: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in known:
            known[place] = score(grid[place])
        return known[place]

    here = (len(grid) - 1) // 2
    while True:
        near = [i for i in (here, here - 1, here + 1) if 0 <= i < len(grid)]
        lowest = min(near, key=at)
        if lowest == here:
            return grid[here]
        here = lowest


def _held_out(
    left: Gram, right: Gram, prior: Tensor, ridge: float, bias: bool, weighting: Tensor
) -> float:
    total = torch.zeros((), dtype=torch.float64)
    for fitted, kept in ((left, right), (right, left)):
        error = residual(solve(fitted, prior, ridge, bias=bias), kept)
        total += (error * weighting.to(error.device)).sum().cpu()
    return float(total)


def _solve_symmetric(matrix: Tensor, rows: Tensor) -> Tensor:
    """`rows @ inverse(matrix)` for a symmetric positive matrix; singular ones are damped further.

    matrix: `[n, n]`, finite, rows: `[m, n]`, both float64.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    damping = _NOISE * float(matrix.diagonal().mean())
    while int(failed):
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        damping *= 10
    return torch.cholesky_solve(rows.T, factor).T
