"""Grids for weights, and (by other names, from `histogram_ranges`) for activations.

A weight is known exactly, so its range can be the extremes or the one of the least squared error of
each channel or group, found by trying; the rules that need a histogram take one of all values, each
as a part of its own channel's or group's extremes.
"""

from typing import Literal

import torch
from torch import Tensor

from laconic.core.errors import DataError, RecipeError
from laconic.forms import affine, levels
from laconic.solvers.quantization.histogram_ranges import Grid as Grid
from laconic.solvers.quantization.histogram_ranges import Rule as Rule
from laconic.solvers.quantization.histogram_ranges import choose as choose
from laconic.solvers.quantization.histogram_ranges import grid as grid
from laconic.solvers.quantization.histogram_ranges import resolved_share as resolved_share
from laconic.solvers.quantization.histogram_ranges import squared_error as squared_error
from laconic.solvers.quantization.histogram_ranges import unfit as unfit
from laconic.statistics.histogram import Histogram

OutputRule = Rule | Literal["output"]
"""Rules of methods that have calibration data: also the least error of the layer's outputs."""
Pair = tuple[Tensor, Tensor]
_TINY = torch.finfo(torch.float32).tiny


def weight_grid(
    weight: Tensor,
    axis: int | None,
    rule: OutputRule,
    bits: int = 8,
    *,
    group: int | None = None,
    symmetric: bool = True,
    power_of_two: bool = False,
    percentile: float = 99.9,
    moments: Tensor | None = None,
) -> Grid:
    """A signed grid for each index of `axis`, or for each run of `group` elements of its slices.

    Symmetric: codes in [-qmax, qmax], qmax = 2^(bits - 1) - 1, so that no code lacks its negative.
    Otherwise all 2^bits codes and a zero point; zero is always a point of the grid. A slice
    of zeros takes the largest scale of the others.

    Args:
        weight: finite values.
        axis: None: one grid for the whole tensor.
        rule: "minmax" clips nothing, "mse" has the least squared error for each slice; "percentile"
            and "entropy" clip every slice at the same share of its extremes, because one slice has
            too few values for a histogram; "output" has the least squared error of the outputs for
            inputs of these `moments`, and is "mse" without them or without an axis.
        bits: of the codes, 2 to 16.
        group: elements that share a scale, None: the whole slice.
        symmetric: see above.
        power_of_two: every scale is a power of two.
        percentile: per cent of the values that "percentile" does not clip at either end.
        moments: float64 `[slice, slice]`, of the inputs that one slice's elements multiply; of
            groups their own part of it counts.

    Raises:
        RecipeError: `bits` out of range, or a group that does not divide.
        DataError: NaN or infinite weights.
    """
    if not 2 <= bits <= 16:
        raise RecipeError(
            f"{bits} bits for a uniform grid of weights, expected 2 to 16",
            hint="one bit is the levels -1 and 1: quantize.weights with grid: binary",
        )
    rows, side = _rows(weight, axis, group)
    low, high = _ends(rows, symmetric)
    qmax = 2 ** (bits - 1) - 1
    qmin = -qmax if symmetric else -qmax - 1
    if rule in ("percentile", "entropy") and rows.numel():
        share = _shares(rows, low, high, rule, symmetric, percentile, bits)
        low, high = low * share[0], high * share[1]
    scale, zero = _affine_of(low, high, qmin, qmax)
    if rule in ("mse", "output"):
        counted = _blocks(moments, rows) if rule == "output" and axis is not None else None
        scale, zero = _least_row_error(rows, low, high, qmin, qmax, counted)
    if power_of_two:
        scale, zero = _powers(rows, scale, low, qmin, qmax, clips=rule != "minmax")
    scale = _filled(rows, scale).reshape(side)
    return Grid(scale, zero.to(torch.int32).reshape(side), qmin, qmax)


def _rows(weight: Tensor, axis: int | None, group: int | None) -> tuple[Tensor, tuple[int, ...]]:
    """float64 `[scales, elements of one scale]`, and the shape of the scale.

    Raises:
        RecipeError: a group that does not divide.
        DataError: NaN or infinite weights.
    """
    if not bool(torch.isfinite(weight).all()):
        raise DataError("weights are NaN or infinite", hint="the network may have diverged")
    rows = weight.detach().double()
    if axis is None:
        if group is not None:
            raise RecipeError("groups need an axis, and this weight has one scale")
        return rows.reshape(1, -1), ()
    n, size = weight.shape[axis], affine.slice_size(weight.shape, axis)
    rows = rows.movedim(axis, 0).reshape(n, size)
    if group is None or group == size:
        return rows, (n,)
    if size % group:
        fits = ", ".join(str(g) for g in range(1, size + 1) if size % g == 0)
        raise RecipeError(
            f"a group of {group} does not divide the {size} weights of a channel",
            hint=f"sizes that divide: {fits}",
        )
    return rows.reshape(-1, group), (n, size // group)


def _ends(rows: Tensor, symmetric: bool) -> Pair:
    """The extremes of each row, zero included; -low = high where symmetric."""
    if not rows.shape[1]:
        return rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def _affine_of(low: Tensor, high: Tensor, qmin: int, qmax: int) -> Pair:
    """Scale and zero point of each range."""
    scale = (high - low) / (qmax - qmin)
    zero = torch.round(qmin - low / scale.clamp(min=_TINY)).clamp(qmin, qmax)
    return scale, zero if qmin != -qmax else torch.zeros_like(zero)


def _shares(
    rows: Tensor,
    low: Tensor,
    high: Tensor,
    rule: Rule,
    symmetric: bool,
    percentile: float,
    bits: int,
) -> tuple[float, float]:
    """What part of each row's extremes `rule` keeps, from all values as parts of them."""
    parts = rows / torch.where(rows < 0, -low[:, None], high[:, None]).clamp(min=_TINY)
    histogram = Histogram()
    histogram.update(parts)
    if histogram.minimum == histogram.maximum == 0:
        return 1.0, 1.0
    first, last = choose(histogram, rule, symmetric=symmetric, percentile=percentile, bits=bits)
    return -first if first < 0 else 1.0, last if last > 0 else 1.0


def _filled(rows: Tensor, scale: Tensor) -> Tensor:
    """float32 scales, positive: where a row is zeros, the largest of the others'."""
    if not scale.numel():
        return scale.float()
    there = rows.count_nonzero(1) > 0
    scale = torch.where(there, scale, scale[there].max() if bool(there.any()) else 1.0)
    return scale.float().clamp(min=_TINY)


def _blocks(moments: Tensor | None, rows: Tensor) -> Tensor | None:
    """The moments of each group's own columns, float32 `[groups, columns, columns]`."""
    if moments is None or not rows.numel():
        return None
    size = rows.shape[1]
    runs = moments.to(rows.device).float().unflatten(0, (-1, size)).unflatten(2, (-1, size))
    return runs.diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def _least_row_error(
    rows: Tensor, low: Tensor, high: Tensor, qmin: int, qmax: int, counted: Tensor | None
) -> Pair:
    """Scale and zero point of each row with the least squared error, the range within [low, high].

    `counted`: what errors count, `[groups, columns, columns]`; None: all alike.

    Both ends shrink together; where the grid is not symmetric then each by itself.
    """
    found = _affine_of(low, high, qmin, qmax)
    best = torch.full_like(low, torch.inf)
    ends, narrow = (low, high), rows.float()
    lowest = 0.8 if qmax > 100 else 0.3  # at 8 bits clipping more than that never pays
    shares = torch.linspace(1, lowest, 24).tolist()
    tries = [(a, a) for a in shares]
    if qmin != -qmax:
        tries += [(a, 1.0) for a in shares[1::2]] + [(1.0, a) for a in shares[1::2]]
    kept = ends
    for number, (first, last) in enumerate(tries):
        if number == len(shares):
            ends = kept  # shrunk together as far as pays; now each by itself
        tried = ends[0] * first, ends[1] * last
        grid = _affine_of(*tried, qmin, qmax)
        error = _row_errors(narrow, *grid, qmin, qmax, counted)
        better = error < best
        best = torch.where(better, error, best)
        found, kept = _picked(better, grid, found), _picked(better, tried, kept)
    return found


def _row_errors(
    rows: Tensor,
    scale: Tensor,
    zero: Tensor,
    qmin: int,
    qmax: int,
    counted: Tensor | None = None,
) -> Tensor:
    """Summed squared error of each row (float32) on its grid, float64."""
    side, origin = scale.clamp(min=1e-38).float()[:, None], zero.float()[:, None]
    codes = torch.round(rows / side).add_(origin).clamp_(qmin, qmax)
    off = codes.sub_(origin).mul_(side).sub_(rows)
    if counted is None:
        return off.square_().sum(1, dtype=torch.float64)
    wide = off.unflatten(0, (-1, len(counted)))
    made = torch.einsum("ngc,gcd->ngd", wide, counted)
    return made.mul_(wide).sum(2, dtype=torch.float64).flatten()


def _powers(rows: Tensor, scale: Tensor, low: Tensor, qmin: int, qmax: int, *, clips: bool) -> Pair:
    """The power of two above each scale, or where that `clips` less well, the one below."""
    above = torch.exp2(torch.ceil(torch.log2(scale.clamp(min=_TINY))))

    def origin(side: Tensor) -> Tensor:
        zero = torch.round(qmin - low / side).clamp(qmin, qmax)
        return zero if qmin != -qmax else torch.zeros_like(zero)

    chosen = above, origin(above)
    if clips:
        below = above / 2, origin(above / 2)
        narrow = rows.float()
        errors = [_row_errors(narrow, *grid, qmin, qmax) for grid in (below, chosen)]
        better = errors[0] < errors[1]
        chosen = _picked(better, below, chosen)
    return chosen


def _picked(better: Tensor, one: Pair, other: Pair) -> Pair:
    """Row by row one pair or the other."""
    return torch.where(better, one[0], other[0]), torch.where(better, one[1], other[1])


def on_grid(weight: Tensor, axis: int | None, chosen: Grid) -> Tensor:
    """The values that `weight` has on a grid, in its own dtype."""
    codes = affine.encode(weight, chosen.scale, chosen.zero_point, axis, chosen.qmin, chosen.qmax)
    return affine.decode(codes, chosen.scale, chosen.zero_point, axis).to(weight.dtype)


def stretched(weight: Tensor, axis: int | None, scale: Tensor, step: float = 1.0) -> int:
    """How many scales an outlier stretches until its neighbours are lost, even to a float32 sum.

    There half of the weights that are not zero are below a millionth of the step, `scale * step`.
    """
    size = affine.slice_size(weight.shape, axis) if axis is not None else weight.numel()
    group = size // max(scale.shape[1], 1) if scale.ndim == 2 else None
    rows, _ = _rows(weight, axis, group)
    if not rows.numel():
        return 0
    typical = torch.where(rows == 0, torch.nan, rows.abs()).nanmedian(1).values
    return int((typical < scale.double().reshape(-1) * step * 1e-6).sum())


def level_scale(
    weight: Tensor,
    axis: int | None,
    name: str,
    rule: Literal["minmax", "mse"],
    *,
    group: int | None = None,
    power_of_two: bool = False,
) -> Tensor:
    """The scale of fixed levels (see `forms.levels`), float32 `[]`, `[n]` or `[n, g]`.

    "minmax" puts the largest magnitude on the highest level, "mse" has the least squared error.
    Of two levels the best scale is known: the mean magnitude, whatever the rule (Rastegari et al.,
    "XNOR-Net", arXiv 1603.05279).

    Raises:
        RecipeError: a group that does not divide.
        DataError: NaN or infinite weights.
    """
    rows, side = _rows(weight, axis, group)
    top = levels.values(name)[-1]
    if name == "binary":
        wide = rows.abs().mean(1) if rows.shape[1] else rows.new_zeros(len(rows))
        shares = [1.0]
    else:
        wide = _ends(rows, True)[1] / top
        shares = torch.linspace(1, 0.4, 25).tolist() if rule == "mse" else [1.0]
    scale = wide
    if power_of_two:
        wide = torch.exp2(torch.ceil(torch.log2(wide.clamp(min=_TINY))))
        scale, shares = wide, [1.0, 0.5, 0.25] if rule == "mse" or name == "binary" else [1.0]
    best = torch.full_like(scale, torch.inf)
    for share in shares if len(shares) > 1 else ():
        tried = (wide * share).clamp(min=_TINY)
        error = _level_errors(rows.float(), tried.float(), name)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    return (scale.float().clamp(min=_TINY) if name == "binary" else _filled(rows, scale)).reshape(
        side
    )


def _level_errors(rows: Tensor, scale: Tensor, name: str) -> Tensor:
    """Summed squared error of each row (float32) on levels times its scale, float64."""
    codes = levels.numbers(rows / scale[:, None], name)
    return (levels.decode(codes, scale, 0, name) - rows).square_().sum(1, dtype=torch.float64)
