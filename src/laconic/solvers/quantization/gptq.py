"""Round the rows of a linear map so that its outputs, not its weights, move least.

For rows W of a map whose inputs have second moments H, rounding to Q costs (Q - W) H (Q - W)^T a
row. `fed_back` rounds column after column and lets the columns behind make up for each error (GPTQ,
Frantar et al., arXiv 2210.17323; the order of falling diag(H) is its act-order). It is greedy, so
the cost can also end above that of plain rounding: such rows are rounded plainly. `descended` then
rounds each weight again, all others given, as long as that pays (QuantEase, Behdin et al., arXiv
2309.01885), and `best_factors` is the least-squares factor on each row's scales for given codes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laconic.solvers.weights.obs_weights import Becomes, Rows, factor, solvable, swept

_BLOCK = 128  # columns whose changes reach the others in one product


@dataclass(frozen=True)
class Steps:
    """The grid of every weight: `(code - zero) * scale`, codes in [qmin, qmax].

    Attributes:
        scale, zero: float64 `[rows, columns]`.
    """

    scale: Tensor
    zero: Tensor
    qmin: int
    qmax: int

    def nearest(self, values: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """The nearest point for values `[rows, ...]` of these columns."""
        scale, zero = self.scale[:, columns], self.zero[:, columns]
        if values.ndim == 1:
            scale, zero = scale[:, 0], zero[:, 0]
        return self.on_grid(values, scale, zero)

    def on_grid(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest point for values with these scales and zeros, all of one shape."""
        codes = ((values / scale).round_().add_(zero)).clamp_(self.qmin, self.qmax)
        return codes.sub_(zero).mul_(scale)

    def scaled(self, factors: Tensor) -> "Steps":
        """With every row's scale multiplied by its factor `[rows]`, as float32 holds it."""
        scale = (self.scale * factors[:, None]).float().double()
        return Steps(scale, self.zero, self.qmin, self.qmax)


def costs(rows: Rows, values: Tensor) -> Tensor:
    """float64 `[rows]`: what having `values` in place of the weights costs."""
    return _costs(rows, values, _slope(rows, values))


def _slope(rows: Rows, values: Tensor) -> Tensor:
    """Half the gradient of the cost, `[rows, columns]`: the one product that takes long."""
    return (values - rows.weight) @ rows.moments


def _costs(rows: Rows, values: Tensor, slope: Tensor) -> Tensor:
    return ((values - rows.weight) * slope).sum(1)


def rounded(rows: Rows, steps: Steps, *, act_order: bool = True, passes: int = 0) -> Tensor:
    """The rows on the grid, none of them worse than rounded to nearest.

    Args:
        rows: what to round; weights that are `held` stay zero.
        steps: the grids.
        act_order: take columns with large moments first.
        passes: of `descended` afterwards.
    """
    rows = solvable(rows)
    plain = steps.nearest(rows.weight).masked_fill(rows.held, 0.0)
    made = fed_back(rows, steps, act_order=act_order)
    slope, other = _slope(rows, made), _slope(rows, plain)
    worse = (_costs(rows, made, slope) > _costs(rows, plain, other))[:, None]
    made, slope = torch.where(worse, plain, made), torch.where(worse, other, slope)
    return descended(rows, steps, made, slope, passes)[0]


def fed_back(rows: Rows, steps: Steps, *, act_order: bool = True) -> Tensor:
    """One sweep over the columns; `rows.moments` must have a Cholesky factor."""
    order = torch.arange(rows.weight.shape[1], device=rows.weight.device)
    if act_order:
        order = rows.moments.diagonal().argsort(descending=True, stable=True)
    held = rows.held[:, order]

    def becomes(column: int, values: Tensor) -> Tensor:
        place = order[column : column + 1]
        return steps.nearest(values, place).masked_fill(held[:, column], 0.0)

    def choose(weight: Tensor, start: int, end: int) -> Becomes:
        del weight, start, end
        return becomes

    made = swept(rows.weight[:, order], factor(rows.moments[order][:, order]), choose)
    return made[:, order.argsort()]


def descended(
    rows: Rows, steps: Steps, values: Tensor, slope: Tensor, passes: int
) -> tuple[Tensor, Tensor]:
    """Round every weight again with all others fixed, `passes` times at most; costs never rise.

    Takes and gives the values and `(values - weights) @ moments`.
    """
    values, slope = values.clone(), slope.clone()
    for _ in range(passes):
        moved = False
        for start in range(0, values.shape[1], _BLOCK):
            block = slice(start, start + _BLOCK)
            change = _descended_block(rows, steps, values, slope, block)
            if bool(change.any()):
                moved = True
                slope.addmm_(change, rows.moments[block])
        if not moved:
            break
    return values, slope


def _descended_block(
    rows: Rows, steps: Steps, values: Tensor, slope: Tensor, block: slice
) -> Tensor:
    """One pass over a block of columns of `values`, in place; how they changed `[rows, block]`.

    `slope` is that before the block: what other columns feel of it is added once for all of it.
    """
    inner = rows.moments[block, block]
    curvature = inner.diagonal().clamp(min=1e-300)
    sides = (values, slope, steps.scale, steps.zero, rows.held)
    here, feel, scale, zero, held = (side[:, block].T.contiguous() for side in sides)
    before = here.clone()
    for place, old in enumerate(before):
        best = old - feel[place] / curvature[place]
        made = steps.on_grid(best, scale[place], zero[place]).masked_fill_(held[place], 0.0)
        change = made - old
        pays = change * (2 * feel[place] + change * curvature[place]) < 0
        change.mul_(pays)
        if bool(pays.any()):
            here[place] = torch.where(pays, made, old)
            feel[place + 1 :].addr_(inner[place, place + 1 :], change)
    values[:, block] = here.T
    return (here - before).T


def best_factors(rows: Rows, values: Tensor, seen: Tensor) -> Tensor:
    """float64 `[rows]`: the positive factor on each row of `values` that costs least; else 1.

    `seen` is `values @ moments`.
    """
    along, size = (seen * rows.weight).sum(1), (seen * values).sum(1)
    useful = (along > 0) & (size > 0)
    return torch.where(useful, along / size.clamp(min=1e-300), torch.ones_like(along))


def rescaled(rows: Rows, steps: Steps, values: Tensor, rounds: int) -> tuple[Steps, Tensor]:
    """Scales, one for each row, and values in turns: the best factor for its codes, one descent.

    A row whose cost would rise keeps what it had.
    """
    rows = solvable(rows)
    aim = rows.weight @ rows.moments
    seen = values @ rows.moments
    cost = _costs(rows, values, seen - aim)
    for _ in range(rounds):
        tried = steps.scaled(best_factors(rows, values, seen))
        factor = (tried.scale / steps.scale)[:, :1]
        start = values / steps.scale * tried.scale  # exactly on the grid
        moved, slope = descended(rows, tried, start, seen * factor - aim, 1)
        now = _costs(rows, moved, slope)
        better = now < cost
        if not bool(better.any()):
            break
        keep = better[:, None]
        steps = replace(steps, scale=torch.where(keep, tried.scale, steps.scale))
        values, seen = torch.where(keep, moved, values), torch.where(keep, slope + aim, seen)
        cost = torch.where(better, now, cost)
    return steps, values
