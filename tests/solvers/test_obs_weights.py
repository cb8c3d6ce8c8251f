"""Second-order pruning against brute force and against the conditions of an optimum."""

import itertools

import pytest
import torch

from laconic.solvers.weights.obs_weights import Rows, Wanted, exact, onto, prune, sweep
from laconic.solvers.weights.weight_masks import highest, patterned


def problem(rows=4, columns=6, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(64, columns, generator=generator, dtype=torch.float64) @ mixed
    held = torch.zeros(rows, columns, dtype=torch.bool)
    parts = {
        "weight": torch.randn(rows, columns, generator=generator, dtype=torch.float64),
        "moments": inputs.T @ inputs / 64 + 1e-3 * torch.eye(columns, dtype=torch.float64),
        "importance": torch.ones(rows, dtype=torch.float64),
        "held": held,
    }
    return Rows(**(parts | changes))


def cost(rows, weight):
    away = weight - rows.weight
    return float((((away @ rows.moments) * away).sum(1) * rows.importance).sum())


def best_on(rows, keep):
    found = torch.zeros_like(rows.weight)
    for r, stays in enumerate(keep):
        k = stays.nonzero()[:, 0]
        if len(k):
            found[r, k] = torch.linalg.solve(
                rows.moments[k][:, k], rows.moments[k] @ rows.weight[r]
            )
    return found


@pytest.mark.parametrize("solver", [exact, sweep])
@pytest.mark.parametrize("count", [0, 1, 7, 23, 24])
def test_so_many_weights_stay(solver, count):
    rows = problem()
    assert int(solver(rows, Wanted(count=count)).count_nonzero()) == count


@pytest.mark.parametrize("seed", range(5))
def test_dropping_one_weight_finds_the_best_one(seed):
    rows = problem(rows=1, seed=seed)
    every = [best_on(rows, torch.arange(6)[None] != drop) for drop in range(6)]
    least = min(cost(rows, weight) for weight in every)
    assert cost(rows, exact(rows, Wanted(count=5))) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_is_the_least_squares_solution(seed):
    rows = problem(seed=seed)
    solved = exact(rows, Wanted(count=11))
    assert torch.allclose(solved, best_on(rows, solved != 0), rtol=1e-8, atol=1e-10)
    assert torch.allclose(
        onto(Rows(rows.weight, rows.moments, rows.importance, solved == 0)), solved
    )


def test_exact_is_between_the_best_of_all_sets_and_magnitude():
    ratios = []
    for seed in range(5):
        rows = problem(rows=1, columns=7, seed=seed)
        sets = itertools.combinations(range(7), 4)
        masks = [torch.isin(torch.arange(7), torch.tensor(s))[None] for s in sets]
        least = min(cost(rows, best_on(rows, mask)) for mask in masks)
        simple = rows.weight.masked_fill(~highest(rows.weight.abs(), 4), 0.0)
        found = cost(rows, exact(rows, Wanted(count=4)))
        assert least * (1 - 1e-9) <= found < cost(rows, simple)
        ratios.append(cost(rows, sweep(rows, Wanted(count=4))) / cost(rows, simple))
    assert sum(ratios) / len(ratios) < 1


def test_independent_inputs_leave_nothing_to_repair():
    rows = problem(moments=torch.eye(6, dtype=torch.float64))
    largest = rows.weight.masked_fill(~highest(rows.weight.abs(), 10), 0.0)
    for solver in (exact, sweep):
        assert torch.allclose(solver(rows, Wanted(count=10)), largest, atol=1e-12)


@pytest.mark.parametrize("solver", ["exact", "sweep"])
@pytest.mark.parametrize(("n", "m", "width"), [(2, 4, 8), (1, 4, 8), (4, 8, 8), (1, 3, 6)])
def test_patterns_hold_and_the_rest_stays_whole(solver, n, m, width):
    rows = problem(rows=3, columns=10)
    solved = prune(rows, Wanted(n=n, m=m, width=width), solver)
    counts = (solved[:, :width].unflatten(1, (-1, m)) != 0).sum(2)
    assert bool((counts == n).all()) and bool((solved[:, width:] != 0).all())


@pytest.mark.parametrize("solver", ["exact", "sweep"])
def test_what_was_zero_stays_zero(solver):
    held = torch.zeros(4, 6, dtype=torch.bool)
    held[::2, 1::2] = True
    solved = prune(problem(held=held), Wanted(count=12), solver)
    assert bool((solved[held] == 0).all()) and int(solved.count_nonzero()) == 12


def test_rows_that_count_more_keep_more():
    importance = torch.tensor([1.0, 1.0, 1e6, 1.0], dtype=torch.float64)
    solved = exact(problem(importance=importance), Wanted(count=10))
    assert int(solved[2].count_nonzero()) == 6


@pytest.mark.parametrize("solver", ["exact", "sweep"])
@pytest.mark.parametrize("moments", [torch.zeros(6, 6), torch.ones(6, 6)])
def test_singular_moments_are_damped(solver, moments):
    solved = prune(problem(moments=moments.double()), Wanted(count=8), solver)
    assert bool(torch.isfinite(solved).all()) and int(solved.count_nonzero()) <= 8


def test_blocks_change_nothing_for_independent_columns():
    rows = problem(rows=2, columns=300, moments=torch.eye(300, dtype=torch.float64))
    keep = highest(rows.weight.square(), 100)
    assert torch.allclose(sweep(rows, Wanted(count=100)), rows.weight.masked_fill(~keep, 0.0))


def test_a_sweep_onto_a_pattern_is_near_the_exact_one():
    near = torch.arange(200)[:, None] - torch.arange(200)[None]
    rows = problem(rows=3, columns=200, moments=0.7 ** near.abs().double())
    keep = patterned(rows.weight.abs(), 2, 4)
    held = Rows(rows.weight, rows.moments, rows.importance, ~keep)
    dropped = rows.weight.masked_fill(~keep, 0.0)
    swept = sweep(held, Wanted(count=int(keep.sum())))
    assert torch.equal(swept != 0, keep)
    assert cost(rows, onto(held)) <= cost(rows, swept) < cost(rows, dropped)
