"""Optimal brain surgeon for single weights: which go, and how the others of their row make up.

For rows W of a linear map whose inputs have second moments H, changing W to V costs
(V - W) H (V - W)^T for each row. With a set of columns kept, the best V is a least-squares solution
on that set, and dropping column j of it costs v_j^2 / [inverse(H_kept)]_jj (Hassibi & Stork 1993).

`exact` drops weights of all rows together in a few rounds, each with the true cost given what is
gone already (ExactOBS, Frantar & Alistarh 2022, arXiv 2208.11580, in batches instead of one by
one), and ends with the exact solution. Each round costs n^3 a row. `sweep` goes over the columns
once with one Cholesky factor for all rows, in blocks (SparseGPT, Frantar & Alistarh 2023, arXiv
2301.00774): n^3 for the layer, for layers where `exact` would take minutes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.solvers.least_squares import Fit, residual
from laconic.solvers.weights.weight_masks import highest, patterned
from laconic.statistics.gram import Gram

Solver = Literal["auto", "exact", "sweep"]
EXACT_WORK = 2e11
"""Multiply-adds that `auto` lets `exact` spend on one layer."""
_ROUNDS = 8
_BLOCK = 128

Becomes = Callable[[int, Tensor], Tensor]
"""A column's number and its values `[rows]` to what they become."""
Choose = Callable[[Tensor, int, int], Becomes]


@dataclass(frozen=True)
class Rows:
    """Rows to prune, all float64.

    Attributes:
        weight: `[rows, columns]`: the best weights if nothing had to go.
        moments: `[columns, columns]`, second moments of the inputs, damped.
        importance: `[rows]`, what a unit of squared error in each row counts.
        held: bool `[rows, columns]`: zero already, and staying so.
    """

    weight: Tensor
    moments: Tensor
    importance: Tensor
    held: Tensor


@dataclass(frozen=True)
class Wanted:
    """How many weights stay: `count` in all rows, or `n` of every `m` of the first `width` columns.

    The pattern leaves the columns from `width` on alone.
    """

    count: int = 0
    n: int = 0
    m: int = 0
    width: int = 0

    def keep(self, score: Tensor, held: Tensor) -> Tensor:
        """The weights that stay by `score` (`[rows, columns]`), bool."""
        score = score.masked_fill(held, -1.0)
        if self.m:
            keep = ~held
            keep[:, : self.width] &= patterned(score[:, : self.width], self.n, self.m)
            return keep
        return highest(score, self.count) & ~held

    def milder(self, part: float, size: int, available: int) -> "Wanted":
        """What is wanted once `part` of the way is gone, from 0 to 1."""
        if self.m:
            return replace(self, n=self.n + round((self.m - self.n) * (1 - part)))
        start = min(size, available)
        if self.count >= start:
            return Wanted(count=start)
        return Wanted(count=round(start * (max(self.count, 1) / start) ** part))


def prune(rows: Rows, wanted: Wanted, solver: Solver = "auto") -> Tensor:
    """The rows with exact zeros where weights went and the others compensating, float64.

    Args:
        rows: what to prune; a `moments` that is singular is damped further.
        wanted: how many stay.
        solver: "exact", "sweep", or "auto": exact where it is affordable.
    """
    rows = solvable(rows)
    height, width = rows.weight.shape
    rounds = wanted.m - wanted.n if wanted.m else _ROUNDS
    affordable = height * width**3 * rounds <= EXACT_WORK
    if solver == "exact" or (solver == "auto" and affordable):
        return exact(rows, wanted, max(rounds, 1))
    return sweep(rows, wanted)


def onto(rows: Rows) -> Tensor:
    """The best rows that are zero where `held`, and nowhere else by force."""
    rows = solvable(rows)
    if len(rows.weight) * rows.weight.shape[1] ** 3 <= EXACT_WORK:
        return _solution(rows, ~rows.held)
    return _sweep_onto(rows, None)


def held(fit: Fit, gram: Gram, bias: bool, zeros: Tensor) -> Fit:
    """What a weight with fixed `zeros` (bool `[rows, columns]`) can hold of a fit."""
    seen = gram if bias else gram.raw()
    equal = torch.ones(len(fit.weight)).to(fit.weight)
    rows = Rows(fit.weight, damped(seen.covariance, fit.ridge), equal, zeros)
    return refitted(fit, gram, bias, onto(rows))


def refitted(fit: Fit, gram: Gram, bias: bool, weight: Tensor) -> Fit:
    """A fit with another weight, its bias and its error."""
    offset = gram.target_mean - weight @ gram.mean if bias else fit.bias
    made = Fit(weight, offset, fit.ridge, fit.error)
    return Fit(weight, offset, fit.ridge, residual(made, gram))


def damped(moments: Tensor, ridge: float) -> Tensor:
    """`moments` with `ridge`, in units of their mean, added to the diagonal."""
    made = moments.clone()
    made.diagonal().add_(ridge * float(moments.diagonal().mean()))
    return made


def exact(rows: Rows, wanted: Wanted, rounds: int = _ROUNDS) -> Tensor:
    """Drop in `rounds`, each by the cost given what is gone already; then solve exactly."""
    keep = ~rows.held
    available = int(keep.sum())
    for number in range(1, rounds + 1):
        aim = wanted.milder(number / rounds, rows.weight.numel(), available)
        aim = wanted if number == rounds else aim
        keep = aim.keep(_costs(rows, keep), ~keep)
    return _solution(rows, keep)


def _costs(rows: Rows, keep: Tensor) -> Tensor:
    """What dropping each kept weight costs after the best repair; 0 where it is gone."""
    found = torch.zeros_like(rows.weight)
    whole = None
    for row, stays in enumerate(keep):
        if bool(stays.all()):
            whole = _inverse(rows.moments) if whole is None else whole
            found[row] = rows.weight[row].square() / whole.diagonal()
            continue
        kept = stays.nonzero()[:, 0]
        if not len(kept):
            continue
        inverse = _inverse(rows.moments[kept][:, kept])
        best = inverse @ (rows.moments[kept] @ rows.weight[row])
        found[row, kept] = best.square() / inverse.diagonal()
    return found * rows.importance[:, None]


def _solution(rows: Rows, keep: Tensor) -> Tensor:
    """The best rows on the kept columns of each."""
    found = torch.zeros_like(rows.weight)
    for row, stays in enumerate(keep):
        kept = stays.nonzero()[:, 0]
        if len(kept) == len(stays):
            found[row] = rows.weight[row]
        elif len(kept):
            factor = torch.linalg.cholesky(rows.moments[kept][:, kept])
            aim = (rows.moments[kept] @ rows.weight[row])[:, None]
            found[row, kept] = torch.cholesky_solve(aim, factor)[:, 0]
    return found


def sweep(rows: Rows, wanted: Wanted) -> Tensor:
    """One pass over the columns; what is dropped is repaired by the columns behind it."""
    return _sweep_onto(rows, wanted)


def _sweep_onto(rows: Rows, wanted: Wanted | None) -> Tensor:
    upper, left = factor(rows.moments), 0 if wanted is None else wanted.count
    block = _BLOCK if wanted is None or not wanted.m else max(_BLOCK // wanted.m, 1) * wanted.m

    def choose(weight: Tensor, start: int, end: int) -> Becomes:
        nonlocal left
        held = rows.held[:, start:]
        if wanted is None:
            keep = ~held[:, : end - start]
        else:
            costs = (weight[:, start:] / upper.diagonal()[start:]).square()
            aim = Wanted(count=left)
            if wanted.m:
                aim = replace(wanted, width=max(wanted.width - start, 0))
            chosen = aim.keep(costs * rows.importance[:, None], held)
            keep = chosen[:, : end - start]
        left -= int(keep.sum())
        return lambda column, values: values.masked_fill(~keep[:, column - start], 0.0)

    return swept(rows.weight, upper, choose, block)


def swept(weight: Tensor, upper: Tensor, choose: Choose, block: int = _BLOCK) -> Tensor:
    """Change the columns one after the other; those behind make up for what each one lost.

    Args:
        weight: float64 `[rows, columns]`.
        upper: `factor` of the moments of the columns.
        choose: called with all rows at the start of each block of columns, and its first and last;
            what it returns says what a column becomes.
        block: columns whose errors reach the columns behind them together.
    """
    weight, width = weight.clone(), weight.shape[1]
    for start in range(0, width, block):
        end = min(start + block, width)
        becomes = choose(weight, start, end)
        errors = torch.zeros_like(weight[:, start:end])
        for column in range(start, end):
            made = becomes(column, weight[:, column])
            error = (weight[:, column] - made) / upper[column, column]
            weight[:, column:end] -= torch.outer(error, upper[column, column:end])
            weight[:, column] = made
            errors[:, column - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


def factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse moments, which `swept` works with."""
    return torch.linalg.cholesky(_inverse(moments), upper=True)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def solvable(rows: Rows) -> Rows:
    """Damped until a Cholesky factor exists; columns that never vary get a unit of their own.

    Raises:
        DataError: moments that are not finite.
    """
    moments = rows.moments
    if not bool(torch.isfinite(moments).all()):
        raise DataError("second moments of the inputs are not finite")
    level = float(moments.diagonal().mean())
    damping = 1e-10 * level if level > 0 else 1.0
    while int(torch.linalg.cholesky_ex(moments)[1]):
        moments = rows.moments.clone()
        moments.diagonal().add_(damping)
        damping *= 10
    return Rows(rows.weight, moments, rows.importance, rows.held)
