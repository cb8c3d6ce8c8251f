"""Identities of the uniform integer grid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laconic import forms
from laconic.core.errors import StorageError
from laconic.forms import affine
from laconic.forms._sides import spread
from laconic.forms.affine import Affine
from laconic.forms.operators import dequantize, fake_quantize

GRIDS = [(-127, 127), (-128, 127), (0, 255), (-7, 7), (-1, 1), (-32767, 32767)]
scales = st.floats(2.0**-40, 2.0**40, allow_nan=False, width=32)


@st.composite
def codes_on_a_grid(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int | None, int, int]:
    """(codes, scale, zero point, axis, qmin, qmax) of any rank up to three, any granularity."""
    qmin, qmax = draw(st.sampled_from(GRIDS))
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    count = math.prod(shape)
    values = draw(st.lists(st.integers(qmin, qmax), min_size=count, max_size=count))
    axis = draw(st.sampled_from([None, *range(len(shape))]))
    side: tuple[int, ...] = ()
    if axis is not None:
        rest = math.prod(size for place, size in enumerate(shape) if place != axis)
        runs = [g for g in range(1, rest + 1) if rest % g == 0]
        side = draw(st.sampled_from([(shape[axis],), *((shape[axis], g) for g in runs)]))
    n = math.prod(side)
    scale = torch.tensor(draw(st.lists(scales, min_size=n, max_size=n))).reshape(side)
    zero = torch.tensor(draw(st.lists(st.integers(qmin, qmax), min_size=n, max_size=n)))
    zero = zero.reshape(side)
    return torch.tensor(values).reshape(shape), scale, zero.int(), axis, qmin, qmax


@given(codes_on_a_grid())
@settings(max_examples=200, deadline=None)
def test_encoding_what_was_decoded_gives_the_codes(case):
    codes, scale, zero, axis, qmin, qmax = case
    values = affine.decode(codes, scale, zero, axis)
    again = affine.encode(values, scale, zero, axis, qmin, qmax)
    assert torch.equal(again.long(), codes)
    assert qmin >= torch.iinfo(again.dtype).min and qmax <= torch.iinfo(again.dtype).max


@given(codes_on_a_grid(), st.floats(-1e6, 1e6, width=32))
@settings(max_examples=100, deadline=None)
def test_both_operators_and_the_form_give_the_same_numbers(case, factor):
    codes, scale, zero, axis, qmin, qmax = case
    x = codes.float() * factor
    kept = affine.encode(x, scale, zero, axis, qmin, qmax)
    wanted = affine.decode(kept, scale, zero, axis)
    assert torch.equal(fake_quantize(x, scale, zero, axis, qmin, qmax), wanted)
    assert torch.equal(dequantize(kept, scale, zero, axis), wanted)
    assert torch.equal(Affine(kept, scale, zero, axis, qmin, qmax).decode(), wanted)


@given(codes_on_a_grid(), st.floats(-0.499, 0.499))
@settings(max_examples=100, deadline=None)
def test_a_value_inside_the_range_moves_by_half_a_step_at_most(case, part):
    codes, scale, zero, axis, qmin, qmax = case
    side = spread(scale, axis, codes.shape)
    x = affine.decode(codes, scale, zero, axis) + side * part
    inside = (codes > qmin) & (codes < qmax)
    moved = (fake_quantize(x, scale, zero, axis, qmin, qmax) - x).abs()
    rounding = 4 * torch.finfo(torch.float32).eps * (x.abs() + side * abs(qmax))
    assert bool((moved <= side / 2 + rounding)[inside].all())


@given(codes_on_a_grid())
@settings(max_examples=50, deadline=None)
def test_a_form_is_rebuilt_from_its_parts(case):
    codes, scale, zero, axis, qmin, qmax = case
    values = affine.decode(codes, scale, zero, axis)
    kept = affine.encode(values, scale, zero, axis, qmin, qmax)
    form = Affine(kept, scale, zero, axis, qmin, qmax)
    again = forms.build("affine", form.tensors(), form.meta())
    assert isinstance(again, Affine)
    assert torch.equal(again.decode(), form.decode())
    assert (again.nbytes(), again.meta()) == (form.nbytes(), form.meta())


def test_bytes_are_packed_bits_plus_scales_plus_zero_points_that_are_not_zero():
    codes = torch.zeros(3, 5, dtype=torch.int8)
    plain = Affine(codes, torch.full((3,), 0.3), torch.zeros(3, dtype=torch.int32), 0, -7, 7)
    assert plain.nbytes() == 8 + 12  # 15 codes of 4 bits
    shifted = Affine(codes, torch.full((3,), 0.3), torch.ones(3, dtype=torch.int32), 0, -127, 127)
    assert shifted.nbytes() == 15 + 12 + 3
    powers = Affine(codes, torch.full((3,), 0.25), torch.zeros(3, dtype=torch.int32), 0, -7, 7)
    assert powers.nbytes() == 8 + 3  # exponents


def numeric_gradient(x, scale, zero, axis, qmin, qmax):
    """Straight through inside [qmin, qmax], zero outside, from its definition."""
    s, z = spread(scale, axis, x.shape), spread(zero, axis, x.shape)
    position = x / s + z
    return ((position >= qmin) & (position <= qmax)).to(x.dtype)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize(("qmin", "qmax", "zero"), [(-127, 127, 0), (0, 255, 0), (0, 255, 100)])
def test_gradient_of_the_input_is_straight_through_inside_the_range(
    axis, qmin, qmax, zero, generator
):
    x = torch.randn(4, 6, generator=generator) * 3
    n = 1 if axis is None else x.shape[axis]
    scale = (torch.rand(n, generator=generator) + 0.5) / 100
    zeros = torch.full((n,), zero, dtype=torch.int32)
    if axis is None:
        scale, zeros = scale[0], zeros[0]
    x.requires_grad_()
    upstream = torch.randn(4, 6, generator=generator)
    fake_quantize(x, scale, zeros, axis, qmin, qmax).backward(upstream)
    inside = numeric_gradient(x.detach(), scale, zeros, axis, qmin, qmax)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(x.grad, upstream * inside)


@pytest.mark.parametrize(("axis", "runs"), [(0, 3), (1, 2), (2, 20), (0, 12), (0, 1)])
def test_gradients_of_runs_are_those_of_each_run_by_itself(axis, runs, generator):
    x = torch.randn(5, 4, 3, generator=generator).mul(2).transpose(1, 2).contiguous()
    x = x.transpose(1, 2).requires_grad_()  # [5, 4, 3], not in its own order in memory
    n = x.shape[axis]
    runs = math.gcd(runs, x.numel() // n)
    scale = ((torch.rand(n, runs, generator=generator) + 0.5) / 3).requires_grad_()
    zero = torch.randint(-2, 3, (n, runs), dtype=torch.int32, generator=generator)
    upstream = torch.randn(x.shape, generator=generator)
    out = fake_quantize(x, scale, zero, axis, -4, 3)
    out.backward(upstream)

    def rows(t: Tensor) -> Tensor:
        return t.detach().movedim(axis, 0).reshape(n * runs, -1)

    # the same as one scale for each row of the runs below each other
    one = rows(x).clone().requires_grad_()
    flat = scale.detach().reshape(-1).clone().requires_grad_()
    wanted = fake_quantize(one, flat, zero.reshape(-1), 0, -4, 3)
    wanted.backward(rows(upstream))
    assert torch.equal(rows(out), wanted)
    assert torch.equal(rows(x.grad), one.grad)
    assert torch.allclose(scale.grad.reshape(-1), flat.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_code(bad):
    with pytest.raises(StorageError, match="NaN or infinite"):
        affine.encode(torch.tensor([1.0, bad]), torch.tensor(1.0), torch.tensor(0), None, -7, 7)


@pytest.mark.parametrize("side", [(3,), (4, 5), (2, 4, 1)])
def test_scales_that_do_not_fit_are_refused(side):
    zero = torch.zeros(side, dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError)):
        fake_quantize(torch.ones(4, 6), torch.ones(side), zero, 0, -7, 7)
    with pytest.raises((ValueError, RuntimeError)):
        dequantize(torch.ones(4, 6, dtype=torch.int8), torch.ones(side), zero, 0)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradient_of_the_scale_is_that_of_lsq(axis, generator):
    x = torch.randn(5, 3, generator=generator) * 2
    n = 1 if axis is None else x.shape[axis]
    scale = ((torch.rand(n, generator=generator) + 0.5) / 5).requires_grad_()
    given_scale = scale if axis is not None else scale.reshape(())
    zero = torch.zeros_like(given_scale, dtype=torch.int32)
    upstream = torch.randn(5, 3, generator=generator)
    fake_quantize(x, given_scale, zero, axis, -3, 3).backward(upstream)
    s = spread(given_scale.detach(), axis, (5, 3))
    position = x / s
    # d(round(x/s) s)/ds with round straight through: round(x/s) - x/s inside, the limit outside
    inside = position.abs() <= 3
    slope = torch.where(inside, position.round() - position, position.sign() * 3)
    wanted = slope * upstream
    wanted = wanted.sum() if axis is None else wanted.sum(1 - axis)
    assert torch.allclose(scale.grad.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


def test_the_operators_export_and_deepcopy(generator):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3))
            self.register_buffer("scale", torch.full((4,), 0.02))
            self.register_buffer("zero", torch.zeros(4, dtype=torch.int32))

        def forward(self, x):
            w = fake_quantize(self.weight, self.scale, self.zero, 0, -127, 127)
            return x @ w.T

    net, x = Net(), torch.randn(2, 3, generator=generator)
    exported = torch.export.export(net, (x,))
    assert torch.equal(exported.module()(x), net(x))
    torch.library.opcheck(fake_quantize, (x, torch.tensor(0.1), torch.tensor(3), None, 0, 255))
    codes = torch.randint(-9, 9, (2, 3), dtype=torch.int8, generator=generator)
    torch.library.opcheck(dequantize, (codes, torch.tensor(0.1), torch.tensor(3), None))
