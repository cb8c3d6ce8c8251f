"""Grids of weights: what each rule promises, for every granularity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laconic.core.errors import DataError, RecipeError
from laconic.forms import levels
from laconic.forms._sides import spread
from laconic.solvers.quantization import ranges

RULES = ["minmax", "percentile", "mse", "entropy"]


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int | None, int | None]:
    """(weight, axis, group): any rank, also empty, constant, of zeros, of denormals, with outliers."""
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    axis = draw(st.sampled_from([None, *range(len(shape))]))
    rest = math.prod(n for i, n in enumerate(shape) if i != axis)
    sizes = [g for g in range(1, rest + 1) if rest % g == 0]
    group = draw(st.sampled_from([None, *sizes])) if axis is not None else None
    value = st.sampled_from([0.0, 1e-42, -1.0, 1e30]) | st.floats(-3, 3, width=32)
    count = math.prod(shape)
    values = draw(st.lists(value, min_size=count, max_size=count))
    return torch.tensor(values).reshape(shape), axis, group


@given(weights(), st.sampled_from(RULES), st.integers(2, 16), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_grids_are_sound_whatever_the_weights(case, rule, bits, symmetric, power):
    weight, axis, group = case
    chosen = ranges.weight_grid(
        weight, axis, rule, bits, group=group, symmetric=symmetric, power_of_two=power
    )
    assert chosen.scale.shape == chosen.zero_point.shape
    assert bool(torch.isfinite(chosen.scale).all()) and bool((chosen.scale > 0).all())
    assert chosen.qmax - chosen.qmin == 2**bits - (2 if symmetric else 1)
    inside = (chosen.zero_point >= chosen.qmin) & (chosen.zero_point <= chosen.qmax)
    assert bool(inside.all())
    if symmetric:
        assert not chosen.zero_point.any() and chosen.qmin == -chosen.qmax
    if power:
        assert bool((torch.frexp(chosen.scale)[0] == 0.5).all())
    on = ranges.on_grid(weight, axis, chosen)
    assert torch.equal(ranges.on_grid(on, axis, chosen), on)
    assert not bool(on[weight == 0].any())


@given(weights(), st.integers(2, 16), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_minmax_clips_nothing(case, bits, symmetric, power):
    weight, axis, group = case
    chosen = ranges.weight_grid(
        weight, axis, "minmax", bits, group=group, symmetric=symmetric, power_of_two=power
    )
    side = spread(chosen.scale, axis, weight.shape).double()
    off = (ranges.on_grid(weight, axis, chosen).double() - weight.double()).abs()
    # half a step; with a zero point another half, since that is rounded as well
    steps = 0.5 if symmetric else 1.0
    assert bool((off <= side * (steps + 2.0**-22 * 2**bits)).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 12, 4])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_least_error_is_no_more_than_that_of_other_rules(bits, group, symmetric):
    weight = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    errors = {}
    for rule in RULES:
        chosen = ranges.weight_grid(weight, 0, rule, bits, group=group, symmetric=symmetric)
        off = ranges.on_grid(weight, 0, chosen) - weight
        errors[rule] = float(off.square().sum())
    assert errors["mse"] <= errors["minmax"] * (1 + 1e-6)
    # other shares than those it tries can be better by what lies between two of them
    assert errors["mse"] <= min(errors.values()) * 1.1


def test_groups_are_runs_of_a_slice():
    weight = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(2))
    chosen = ranges.weight_grid(weight, 1, "minmax", 4, group=2)
    assert chosen.scale.shape == (6, 4)
    flat = weight.movedim(1, 0).reshape(6, 4, 2)
    assert torch.allclose(chosen.scale, flat.abs().amax(-1) / 7)
    whole = ranges.weight_grid(weight, 1, "minmax", 4, group=8)
    assert torch.equal(whole.scale, ranges.weight_grid(weight, 1, "minmax", 4).scale)


def test_percentile_clips_the_far_values():
    weight = torch.cat([torch.linspace(-1, 1, 4000), torch.tensor([50.0])]).reshape(1, -1)
    chosen = ranges.weight_grid(weight, 0, "percentile", 8, percentile=99.9)
    assert float(chosen.scale) * 127 < 2


def test_what_cannot_be_is_refused():
    weight = torch.ones(4, 18)
    for bits in (0, 1, 17):
        with pytest.raises(RecipeError, match="2 to 16"):
            ranges.weight_grid(weight, 0, "minmax", bits)
    with pytest.raises(RecipeError, match="1, 2, 3, 6, 9, 18"):
        ranges.weight_grid(weight, 0, "minmax", 4, group=4)
    with pytest.raises(RecipeError, match="axis"):
        ranges.weight_grid(weight, None, "minmax", 4, group=2)
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="NaN or infinite"):
            ranges.weight_grid(torch.tensor([[1.0, bad]]), 0, "minmax", 4)
        with pytest.raises(DataError, match="NaN or infinite"):
            ranges.level_scale(torch.tensor([[1.0, bad]]), 0, "nf4", "minmax")


@given(weights(), st.sampled_from(levels.NAMES), st.sampled_from(["minmax", "mse"]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_scales_of_levels_are_sound(case, name, rule, power):
    weight, axis, group = case
    scale = ranges.level_scale(weight, axis, name, rule, group=group, power_of_two=power)
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    if power:
        assert bool((torch.frexp(scale)[0] == 0.5).all())
    codes = levels.encode(weight, scale, axis, name)
    assert bool(torch.isfinite(levels.decode(codes, scale, axis, name)).all())


def test_two_levels_have_the_scale_of_the_least_error():
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(3))
    scale = ranges.level_scale(weight, 0, "binary", "mse")
    assert torch.allclose(scale, weight.abs().mean(1))


def test_least_error_of_levels_is_no_more_than_that_of_the_extremes():
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    for name in ("nf4", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2"):
        found = []
        for rule in ("mse", "minmax"):
            scale = ranges.level_scale(weight, 0, name, rule, group=10)
            codes = levels.encode(weight, scale, 0, name)
            found.append(float((levels.decode(codes, scale, 0, name) - weight).square().sum()))
        assert found[0] <= found[1]
