"""Identities of grids over a tensor's own range."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from laconic.forms import affine
from laconic.forms.operators import dynamic_quantize

values = st.sampled_from([0.0, -0.0, 1e-42, 1e30, -2.5]) | st.floats(-9, 9, width=32)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    count = int(torch.tensor(shape).prod())
    return torch.tensor(draw(st.lists(values, min_size=count, max_size=count))).reshape(shape)


@given(tensors(), st.integers(1, 8), st.booleans())
@example(torch.tensor([1e-45]), 2, False)
@example(torch.tensor([1e-42]), 6, False)
@settings(max_examples=200, deadline=None)
def test_the_range_is_covered_and_zero_stays(x, bits, per_token):
    out = dynamic_quantize(x, bits, per_token)
    assert out.shape == x.shape and bool(torch.isfinite(out).all())
    assert not bool(out[x == 0].any())
    if x.numel():
        scale, zero = affine.grid_of(x, bits, per_token)
        assert bool((scale > 0).all()) and bool(((zero >= 0) & (zero < 2**bits)).all())
        # half a step for the code and half for the zero point, both rounded in float32; a scale
        # that is a denormal is itself wrong by up to half the least one, as often as there are codes
        off = (out.double() - x.double()).abs()
        slack = 2.0**-150 * 2**bits
        assert bool((off <= scale.double() * (1 + 2.0**-20 * 2**bits) + slack).all())
        if per_token:
            rows = [dynamic_quantize(row, bits, True) for row in x.reshape(-1, x.shape[-1])]
            assert torch.equal(out.reshape(-1, x.shape[-1]), torch.stack(rows))


def test_it_is_onnx_dynamic_quantize_linear():
    # the example of the ONNX page of the operator
    x = torch.tensor([0.0, 2, -3, -2.5, 1.34, 0.5])
    scale, zero = affine.grid_of(x, 8, False)
    assert float(scale) == pytest.approx(0.0196078438) and int(zero) == 153
    codes = (dynamic_quantize(x, 8, False) / scale).round() + zero
    assert codes.flatten().int().tolist() == [153, 255, 0, 26, 221, 179]


@pytest.mark.parametrize("per_token", [False, True])
def test_the_gradient_is_straight_through(per_token):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    dynamic_quantize(x, 4, per_token).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_the_operator_passes_torchs_own_checks():
    x = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    for per_token in (False, True):
        torch.library.opcheck(dynamic_quantize, (x, 8, per_token))
