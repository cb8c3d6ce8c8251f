"""Identities of fixed levels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laconic import forms
from laconic.core.errors import StorageError
from laconic.forms import levels
from laconic.forms._sides import spread
from laconic.forms.levels import NAMES, Levels
from laconic.forms.operators import fake_levels, levels_

FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

scales = st.sampled_from([2.0**-30, 1e-3, 0.37, 1.0, 512.0])


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Tensor, Tensor, int | None, str]:
    """(x, scale, axis, name): any rank, any size, any granularity, values with ties and zeros."""
    name = draw(st.sampled_from(NAMES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = math.prod(shape)
    axis = draw(st.sampled_from([None, *range(-len(shape), len(shape))]))
    side: tuple[int, ...] = ()
    if axis is not None:
        rest = math.prod(n for i, n in enumerate(shape) if i != axis % len(shape))
        runs = [g for g in range(1, rest + 1) if rest % g == 0]
        side = (shape[axis], draw(st.sampled_from(runs))) if runs else (shape[axis],)
        side = draw(st.sampled_from([side, side[:1]]))
    total = math.prod(side)
    scale = torch.tensor(draw(st.lists(scales, min_size=total, max_size=total))).reshape(side)
    held = levels.values(name)
    wide = 1.5 * held[-1]
    places = st.one_of(
        st.sampled_from([0.0, -0.0, *held, *levels.borders(name)]), st.floats(-wide, wide, width=32)
    )
    x = torch.tensor(draw(st.lists(places, min_size=count, max_size=count))).reshape(shape)
    return x * spread(scale, axis, x.shape), scale, axis, name


def nearest(x: Tensor, scale: Tensor, axis: int | None, name: str) -> Tensor:
    """The least distance from a level, by trying all; in float64."""
    s = spread(scale, axis, x.shape).double()
    held = torch.tensor(levels.values(name), dtype=torch.float64)
    return (x.double()[..., None] - held * s[..., None]).abs().amin(-1)


@given(tensors())
@settings(max_examples=200, deadline=None)
def test_every_value_goes_to_the_nearest_level(case):
    x, scale, axis, name = case
    codes = levels.encode(x, scale, axis, name)
    off = (levels.decode(codes, scale, axis, name).double() - x.double()).abs()
    side = spread(scale, axis, x.shape).double()
    rounding = 2.0**-22 * (x.double().abs() + side * levels.values(name)[-1])
    assert bool((off <= nearest(x, scale, axis, name) + rounding).all())


@given(tensors())
@settings(max_examples=150, deadline=None)
def test_operators_form_and_parts_give_the_same_numbers(case):
    x, scale, axis, name = case
    codes = levels.encode(x, scale, axis, name)
    wanted = levels.decode(codes, scale, axis, name)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    assert torch.equal(fake_levels(x, scale, axis, name), wanted)
    assert torch.equal(levels_(codes, scale, axis, name), wanted)
    form = Levels(codes, scale, axis, name)
    again = forms.build("levels", form.tensors(), form.meta())
    assert isinstance(again, Levels) and torch.equal(again.decode(), wanted)
    assert (again.nbytes(), again.meta()) == (form.nbytes(), form.meta())
    assert torch.equal(levels.encode(wanted, scale, axis, name), codes)


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_exact_ascending_and_hold_their_ends(name):
    held = levels.values(name)
    assert list(held) == sorted(set(held))
    assert [float(np.float32(value)) for value in held] == list(held)
    assert len(held) <= 2 ** levels.bits(name) <= 256


@pytest.mark.parametrize("name", FLOAT8)
def test_fp8_rounds_as_the_hardware_format(name):
    largest = levels.values(name)[-1]
    x = torch.cat([torch.tensor(levels.values(name)), torch.tensor(levels.borders(name))])
    x = torch.cat([x, torch.randn(4000, generator=torch.Generator().manual_seed(0)) * largest / 4])
    x = x.clamp(-largest, largest)
    one = torch.tensor(1.0)
    assert torch.equal(fake_levels(x, one, None, name), x.to(FLOAT8[name]).float())


def test_fp4_is_the_published_list():
    half = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert list(levels.values("fp4_e2m1")) == [-v for v in reversed(half)] + [0.0, *half]


def test_binary_is_the_sign_and_zero_is_positive():
    x = torch.tensor([-2.0, -1e-40, -0.0, 0.0, 1e-40, 3.0])
    assert fake_levels(x, torch.tensor(0.5), None, "binary").tolist() == [-0.5] * 2 + [0.5] * 4


@pytest.mark.parametrize("side", [(), (4,), (4, 3), (4, 6)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_straight_through_and_of_the_scale(name, side):
    generator = torch.Generator().manual_seed(3)
    axis = 1 if side else None
    scale = (torch.rand(side, generator=generator) + 0.5).requires_grad_()
    largest = levels.values(name)[-1]
    x = (torch.randn(3, 4, 2, generator=generator) * largest).requires_grad_()
    upstream = torch.randn(3, 4, 2, generator=generator)
    out = fake_levels(x, scale, axis, name)
    out.backward(upstream)
    s = spread(scale.detach(), axis, x.shape)
    position = x.detach() / s
    inside = (position >= levels.values(name)[0]) & (position <= largest)
    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.equal(x.grad, upstream * inside)
    # of level(x/s)*s by s, the level straight through: level - x/s inside, the end outside
    slope = (out.detach() / s - torch.where(inside, position, 0.0)) * upstream
    wanted = slope.sum() if not side else slope.movedim(1, 0).reshape(*side, -1).sum(-1)
    wanted = wanted.reshape(side)
    assert torch.allclose(scale.grad, wanted, rtol=1e-4, atol=1e-4 * largest)


def test_nan_stays_nan_in_training_and_is_refused_as_a_code():
    one = torch.tensor(1.0)
    for name in NAMES:
        seen = fake_levels(torch.tensor([math.nan, 1.0, -math.inf]), one, None, name)
        assert math.isnan(seen[0]) and float(seen[2]) == levels.values(name)[0]
        for bad in (math.nan, math.inf, -math.inf):
            with pytest.raises(StorageError, match="NaN or infinite"):
                levels.encode(torch.tensor([1.0, bad]), one, None, name)


def test_bytes_are_packed_bits_and_scales():
    codes = torch.zeros(3, 7, dtype=torch.uint8)
    odd, power = torch.full((3,), 0.3), torch.full((3,), 0.25)
    assert Levels(codes, odd, 0, "binary").nbytes() == 3 + 12
    assert Levels(codes, power, 0, "nf4").nbytes() == 11 + 3
    assert Levels(codes, odd[0], None, "fp8_e4m3").nbytes() == 21 + 4


def test_unknown_levels_are_refused_with_the_nearest():
    with pytest.raises(StorageError, match="nf4"):
        levels.values("nf5")


@pytest.mark.parametrize("side", [(3,), (4, 5), (2, 4, 1)])
def test_scales_that_do_not_fit_are_refused(side):
    with pytest.raises((ValueError, RuntimeError)):
        fake_levels(torch.ones(4, 6), torch.ones(side), 0, "nf4")


def test_the_operators_pass_torchs_own_checks():
    x = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    for name in ("binary", "fp4_e2m1"):
        torch.library.opcheck(fake_levels, (x, torch.tensor(0.4), None, name))
        codes = levels.encode(x, torch.rand(4, 2) + 1, 0, name) if name != "binary" else None
        if codes is not None:
            torch.library.opcheck(levels_, (codes, torch.rand(4, 2) + 1, 0, name))
    torch.library.opcheck(fake_levels, (torch.randn(4, 6), torch.rand(4, 3) + 1, 0, "nf4"))
