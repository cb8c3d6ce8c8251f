"""Rounding with error feedback: against brute force, and never worse than rounding to nearest."""

import itertools

import pytest
import torch

from laconic.solvers.quantization.gptq import (
    Steps,
    best_factors,
    costs,
    descended,
    fed_back,
    rescaled,
    rounded,
)
from laconic.solvers.weights.obs_weights import Rows


def problem(rows=5, columns=6, seed=0, *, rank=None, diagonal=False):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, rank or columns, generator=generator, dtype=torch.float64)
    if rank:
        inputs = inputs @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    elif not diagonal:
        mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
        inputs = inputs @ (torch.eye(columns, dtype=torch.float64) + mixing)
    moments = inputs.T @ inputs / 64
    if diagonal:
        moments = moments.diagonal().diag()
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    held = torch.zeros(rows, columns, dtype=torch.bool)
    return Rows(weight, moments, torch.ones(rows, dtype=torch.float64), held)


def grid(rows, qmin=-2, qmax=1, step=0.7):
    return Steps(torch.full_like(rows.weight, step), torch.zeros_like(rows.weight), qmin, qmax)


def plain(rows, steps):
    return steps.nearest(rows.weight)


def brute(rows, steps):
    """The least cost of each row over all codes."""
    codes = torch.tensor(list(itertools.product(range(steps.qmin, steps.qmax + 1),
                                                repeat=rows.weight.shape[1])))  # fmt: skip
    points = codes.double() * steps.scale[0, 0]
    away = points[None] - rows.weight[:, None]
    return ((away @ rows.moments) * away).sum(2).min(1).values


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("act_order", [True, False])
def test_between_the_best_codes_and_the_nearest(seed, act_order):
    rows = problem(seed=seed)
    steps = grid(rows)
    made = rounded(rows, steps, act_order=act_order, passes=3)
    assert bool((costs(rows, made) <= costs(rows, plain(rows, steps)) + 1e-12).all())
    assert bool((costs(rows, made) >= brute(rows, steps) - 1e-9).all())
    codes = made / steps.scale
    assert torch.allclose(codes, codes.round(), atol=1e-12)
    assert float(codes.min()) >= steps.qmin
    assert float(codes.max()) <= steps.qmax


def test_feedback_and_descent_find_the_best_codes_of_two_columns_more_often_than_nearest():
    hits = {"nearest": 0, "rounded": 0}
    for seed in range(20):
        rows = problem(rows=4, columns=2, seed=seed)
        steps = grid(rows)
        least = brute(rows, steps) + 1e-9
        hits["nearest"] += int((costs(rows, plain(rows, steps)) <= least).sum())
        hits["rounded"] += int((costs(rows, rounded(rows, steps, passes=4)) <= least).sum())
    assert hits["rounded"] > hits["nearest"]
    assert hits["rounded"] >= 72  # of 80


def test_independent_inputs_leave_nothing_to_make_up_for():
    rows = problem(diagonal=True)
    steps = grid(rows)
    assert torch.equal(fed_back(rows, steps), plain(rows, steps))
    torch.testing.assert_close(costs(rows, rounded(rows, steps)), brute(rows, steps))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_singular_hessian_is_damped(rank):
    rows = problem(rank=rank)
    steps = grid(rows)
    made = rounded(rows, steps, passes=2)
    assert bool(torch.isfinite(made).all())
    assert bool((costs(rows, made) <= costs(rows, plain(rows, steps)) + 1e-9).all())


def test_inputs_that_are_never_there():
    rows = problem()
    nothing = Rows(rows.weight, torch.zeros_like(rows.moments), rows.importance, rows.held)
    steps = grid(rows)
    assert torch.equal(rounded(nothing, steps, passes=1), plain(rows, steps))


def test_each_pass_of_the_descent_costs_no_more():
    rows = problem(rows=20, columns=12)
    steps, values = grid(rows), torch.zeros(20, 12, dtype=torch.float64)
    before, slope = costs(rows, values), (values - rows.weight) @ rows.moments
    for _ in range(4):
        values, slope = descended(rows, steps, values, slope, 1)
        torch.testing.assert_close(slope, (values - rows.weight) @ rows.moments)
        now = costs(rows, values)
        assert bool((now <= before + 1e-12).all())
        before = now
    again, slope = descended(rows, steps, values, slope, 50)
    assert torch.equal(descended(rows, steps, again, slope, 1)[0], again)


def test_zeros_that_are_held_stay():
    rows = problem()
    held = torch.rand(rows.weight.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    kept = Rows(rows.weight.masked_fill(held, 0.0), rows.moments, rows.importance, held)
    made = rounded(kept, grid(rows), passes=2)
    assert not bool(made[held].any())


def test_the_best_factor_is_where_the_cost_is_level():
    rows = problem()
    values = plain(rows, grid(rows))
    factors = best_factors(rows, values, values @ rows.moments)
    least = costs(rows, values * factors[:, None])
    for away in (0.99, 1.01):
        assert bool((costs(rows, values * factors[:, None] * away) >= least).all())


def test_fitted_scales_cost_less_and_the_values_lie_on_them():
    rows = problem(rows=8, columns=10)
    steps = grid(rows)
    values = rounded(rows, steps, passes=2)
    fitted, moved = rescaled(rows, steps, values, 5)
    assert float(costs(rows, moved).sum()) < float(costs(rows, values).sum())
    codes = moved / fitted.scale
    assert torch.allclose(codes, codes.round(), atol=1e-9)
    assert torch.equal(fitted.scale, fitted.scale.float().double())
