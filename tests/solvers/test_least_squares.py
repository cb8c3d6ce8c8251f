import pytest
import torch

from laconic.core.errors import DataError
from laconic.solvers.least_squares import refit, residual, solve
from laconic.statistics.gram import Gram


def gram(rows, targets):
    held = Gram()
    held.update(rows, targets)
    return held


def data(n, d, o, noise=0.0):
    x = torch.randn(n, d, dtype=torch.float64) + 2
    w, b = torch.randn(o, d, dtype=torch.float64), torch.randn(o, dtype=torch.float64)
    return x, x @ w.T + b + noise * torch.randn(n, o, dtype=torch.float64), w, b


def test_a_consistent_map_is_found_exactly():
    x, t, w, b = data(60, 5, 3)
    fit = solve(gram(x, t), torch.zeros(3, 5), 1e-12)
    assert torch.allclose(fit.weight, w, atol=1e-7)
    assert torch.allclose(fit.bias, b, atol=1e-7)
    assert float(fit.error.max()) < 1e-9


def test_the_solution_is_a_stationary_point_of_the_ridge_objective():
    x, t, _, _ = data(40, 4, 2, noise=1.0)
    prior, ridge = torch.randn(2, 4, dtype=torch.float64), 0.3
    fit = solve(gram(x, t), prior, ridge)
    level = float(torch.cov(x.T, correction=0).diagonal().mean())
    weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    loss = (x @ weight.T + bias - t).square().mean(0).sum() + ridge * level * (
        weight - prior
    ).square().sum()
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-9
    assert float(bias.grad.abs().max()) < 1e-9
    assert torch.allclose(fit.error, (x @ fit.weight.T + fit.bias - t).square().mean(0))


def test_without_a_bias_moments_are_about_zero():
    x, t, w, _ = data(60, 5, 3)
    t = x @ w.T
    fit = solve(gram(x, t), torch.zeros(3, 5), 1e-12, bias=False)
    assert torch.allclose(fit.weight, w, atol=1e-6)
    assert not fit.bias.any()


def test_singular_and_short_data_fall_back_to_the_prior():
    prior = torch.randn(2, 3, dtype=torch.float64)
    x = torch.randn(20, 1, dtype=torch.float64).repeat(1, 3)  # rank one
    fit = solve(gram(x, x @ prior.T), prior, 1e-6)
    assert torch.allclose(fit.weight, prior, atol=1e-6)
    still = solve(gram(torch.ones(20, 3), torch.zeros(20, 2)), prior, 1e-3)
    assert torch.equal(still.weight, prior)  # constant columns say nothing
    assert torch.allclose(still.bias, -prior.sum(1))
    wide = torch.randn(6, 40, dtype=torch.float64)
    far = torch.randn(2, 40, dtype=torch.float64)
    held = solve(gram(wide, wide @ far.T), far, 1e-3)
    assert torch.allclose(held.weight, far, atol=1e-9)
    with pytest.raises(DataError, match="no calibration rows"):
        solve(Gram(), prior, 1e-3)


def test_the_ridge_that_predicts_the_other_half_wins():
    x, t, w, _ = data(400, 5, 3)
    fit = refit((gram(x[:200], t[:200]), gram(x[200:], t[200:])), torch.zeros(3, 5))
    assert fit.ridge == 1e-5
    x, t, w, _ = data(30, 25, 3, noise=20.0)
    noisy = refit((gram(x[:15], t[:15]), gram(x[15:], t[15:])), w)
    assert noisy.ridge == 1.0
    alone = refit((gram(x, t), Gram()), w)
    assert alone.ridge == 1.0


def test_residual_is_the_mean_squared_error_on_other_rows():
    x, t, _, _ = data(50, 4, 2, noise=0.5)
    fit = solve(gram(x[:25], t[:25]), torch.zeros(2, 4), 1e-3)
    other = residual(fit, gram(x[25:], t[25:]))
    assert torch.allclose(other, (x[25:] @ fit.weight.T + fit.bias - t[25:]).square().mean(0))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_moments_that_are_not_finite_are_refused(bad):
    x, t, _, _ = data(20, 3, 2)
    held = gram(x, t)
    held.scatter[1, 1] = bad
    with pytest.raises(DataError, match="not finite"):
        solve(held, torch.zeros(2, 3), 1e-3)
