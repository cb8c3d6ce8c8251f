"""Chains against the definitions: full rank is the weight, truncation is optimal, signs are fixed."""

import pytest
import torch
from torch.nn import functional as F

from laconic.solvers.sharing import low_rank, ranks
from laconic.solvers.sharing.low_rank import Shape

KERNELS = {"channel": (3, 3), "spatial": (3, 5), "tucker2": (3, 3), "cp": (3, 5)}


def drawn(kernel, out=7, into=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, into, *kernel, generator=generator, dtype=torch.float64)
    rows = torch.rand(out, generator=generator, dtype=torch.float64) + 0.5
    x = torch.randn(400, weight[0].numel(), generator=generator, dtype=torch.float64)
    x = x @ torch.diag(torch.logspace(0, -1, x.shape[1], dtype=torch.float64)).roll(2, 1)
    return weight, x.T @ x / len(x), rows


def loss(weight, made, moment, rows):
    miss = rows[:, None] * (weight.flatten(1) - made)
    return float(((miss @ moment) * miss).sum())


@pytest.mark.parametrize(
    ("kind", "full"), [("channel", (7,)), ("spatial", (15,)), ("tucker2", (5, 7))]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_is_the_weight(kind, full, weighted):
    weight, moment, rows = drawn(KERNELS[kind])
    extra = (moment, rows) if weighted else ()
    factors = low_rank.decompose(kind, weight, full, *extra)
    assert torch.allclose(low_rank.product(kind, factors), weight.flatten(1), atol=1e-9)


def test_channel_loses_exactly_the_rest_of_the_spectrum_and_nothing_does_better():
    weight, moment, rows = drawn((3, 3))
    spectrum = low_rank.spectra("channel", weight, moment, rows)[0]
    made = low_rank.product("channel", low_rank.decompose("channel", weight, (3,), moment, rows))
    found = loss(weight, made, moment, rows)
    assert abs(found - float(spectrum[3:].sum())) < 1e-9 * float(spectrum.sum())
    plain = low_rank.product("channel", low_rank.decompose("channel", weight, (3,)))
    assert found < loss(weight, plain, moment, rows)
    singular = torch.linalg.svdvals(weight.flatten(1))
    assert torch.allclose(low_rank.spectra("channel", weight)[0], singular.square(), rtol=1e-9)


@pytest.mark.parametrize(("kind", "held"), [("spatial", (5,)), ("tucker2", (3, 4)), ("cp", (6,))])
def test_the_last_factor_is_the_best_one_behind_the_others(kind, held):
    weight, moment, rows = drawn(KERNELS[kind])
    factors = low_rank.decompose(kind, weight, held, moment, rows)
    best = loss(weight, low_rank.product(kind, factors), moment, rows)
    features = low_rank.before_last(kind, factors)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        step = 1e-3 * torch.randn(7, len(features), generator=generator, dtype=torch.float64)
        moved = (factors[-1].flatten(1) + step) @ features
        assert loss(weight, moved, moment, rows) > best


@pytest.mark.parametrize("kind", list(KERNELS))
def test_the_chain_of_convolutions_is_the_product(kind):
    kernel = KERNELS[kind]
    weight, moment, rows = drawn(kernel)
    held = (3, 4) if kind == "tucker2" else (4,)
    shape = Shape(7, 5, kernel, (1, 1, 1))
    factors = low_rank.decompose(kind, weight, held, moment, rows)
    stages = low_rank.stages(kind, shape, held)
    assert [tuple(f.shape) for f in factors] == [stage.shape for stage in stages]
    x = torch.randn(2, 5, 9, 9, dtype=torch.float64)
    y = x
    for stage, factor in zip(stages, factors, strict=True):
        y = F.conv2d(y, factor, groups=stage.groups)
    whole = F.conv2d(x, low_rank.product(kind, factors).reshape(weight.shape))
    assert torch.allclose(y, whole, atol=1e-9)


def test_signs_do_not_depend_on_the_solver():
    weight = drawn((3, 3))[0]
    basis = low_rank.top(weight.flatten(1) @ weight.flatten(1).T, 4)
    assert bool((basis.gather(0, basis.abs().argmax(0)[None]) > 0).all())


def test_cp_that_does_not_settle_is_refused(monkeypatch):
    weight, moment, rows = drawn((3, 5))
    assert low_rank.decompose("cp", weight, (6,), moment, rows) is not None
    monkeypatch.setattr(low_rank, "ITERATIONS", 2)
    assert low_rank.decompose("cp", weight, (6,), moment, rows) is None
    assert low_rank.alternate(torch.zeros(3, 3, 2, 2, dtype=torch.float64), 2) is None


@pytest.mark.parametrize("kind", list(KERNELS))
def test_options_are_cheaper_and_ever_more_harmful(kind):
    kernel = KERNELS[kind]
    weight, moment, rows = drawn(kernel, out=12, into=10)
    shape = Shape(12, 10, kernel, (64, 64, 64))
    found = ranks.options(kind, shape, weight, moment, rows)
    assert found
    for option in found:
        assert option.macs < shape.macs and option.params < shape.params
        assert (option.macs, option.params) == low_rank.cost(kind, shape, option.ranks)
    slack = 0.02 if kind == "cp" else 1e-12  # a fit is no global optimum
    for before, after in zip(found, found[1:], strict=False):
        assert after.macs <= before.macs and after.harm >= before.harm - slack
