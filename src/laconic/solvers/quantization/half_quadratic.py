"""Scales and zero points without data: robust against outliers, by half-quadratic splitting.

Minimise sum |W - (q - z) s|^p over codes q, zero points z and scales s, with p < 1, so that a few
weights far out do not stretch the grid for all others. An auxiliary E takes what is far out (a
generalised soft threshold), and z and s are then the least-squares fit of W - E, in turns (Badri &
Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023). There the zero point
is a real number and the scale is fixed; here the zero point is a code, and the scale is fitted too.
Errors are counted in steps of the starting grid, so that a network's scale does not matter.
"""

from dataclasses import replace

import torch
from torch import Tensor

from laconic.solvers.quantization.ranges import Grid


def half_quadratic(
    weight: Tensor,
    axis: int | None,
    start: Grid,
    *,
    norm: float = 0.7,
    rounds: int = 20,
    beta: float = 10.0,
    growth: float = 1.01,
) -> Grid:
    """The grid of the least error, never worse than `start` for any run of weights.

    Args:
        weight: any shape, finite.
        axis: that the scales belong to; None: one scale.
        start: where to begin; its zero points stay if its codes are symmetric around zero.
        norm: p, above 0 and at most 1.
        rounds: at most.
        beta: how much an error has to stand out to be left out, at first.
        growth: of beta in each round.
    """
    rows = _runs(weight.detach().double(), axis, start)
    scale = start.scale.detach().double().reshape(-1, 1)
    zero = start.zero_point.double().reshape(-1, 1)
    unit, moves = scale, start.qmin != -start.qmax
    best, found = _error(rows, _points(rows, scale, zero, start), unit, norm), (scale, zero)
    for _ in range(rounds):
        codes = ((rows / scale).round() + zero).clamp(start.qmin, start.qmax)
        away = _shrunk((rows - (codes - zero) * scale) / unit, beta, norm) * unit
        aim = rows - away
        if moves:
            zero = (codes - aim / scale).mean(1, keepdim=True).round()
            zero = zero.clamp(start.qmin, start.qmax)
        scale = _fitted(codes - zero, aim, scale)
        error = _error(rows, _points(rows, scale, zero, start), unit, norm)
        better = error < best
        best = torch.where(better, error, best)
        found = (torch.where(better, scale, found[0]), torch.where(better, zero, found[1]))
        beta *= growth
    scale, zero = (side.reshape(start.scale.shape) for side in found)
    return replace(start, scale=scale.to(start.scale), zero_point=zero.to(start.zero_point))


def error(weight: Tensor, axis: int | None, grid: Grid, norm: float, unit: Tensor) -> Tensor:
    """float64 `[runs]`: sum of |error / unit|^norm of the weights of each scale.

    unit: the shape of the scale.
    """
    rows = _runs(weight.detach().double(), axis, grid)
    scale, zero = (side.double().reshape(-1, 1) for side in (grid.scale, grid.zero_point))
    return _error(rows, _points(rows, scale, zero, grid), unit.double().reshape(-1, 1), norm)[:, 0]


def _runs(weight: Tensor, axis: int | None, grid: Grid) -> Tensor:
    """`[scales, weights of each]`."""
    rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0)
    return rows.reshape(grid.scale.numel(), -1)


def _points(rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """What the nearest codes stand for, as float32 scales give it."""
    held = scale.float().double()
    codes = ((rows / held).round() + zero).clamp(grid.qmin, grid.qmax)
    return (codes - zero) * held


def _error(rows: Tensor, points: Tensor, unit: Tensor, norm: float) -> Tensor:
    return ((rows - points) / unit).abs().pow(norm).sum(1, keepdim=True)


def _shrunk(x: Tensor, beta: float, norm: float) -> Tensor:
    """The minimiser of |e|^norm + beta / 2 (e - x)^2, to first order: a soft threshold."""
    size = x.abs()
    threshold = size.clamp(min=1e-12).pow(norm - 1) / beta
    return x.sign() * (size - threshold).clamp(min=0)


def _fitted(codes: Tensor, aim: Tensor, old: Tensor) -> Tensor:
    """The least-squares scale of each row; the old one where it would not be positive."""
    along, size = (codes * aim).sum(1, keepdim=True), codes.square().sum(1, keepdim=True)
    made = along / size.clamp(min=1e-300)
    usable = (along > 0) & (made > torch.finfo(torch.float32).tiny)
    return torch.where(usable, made, old)
