"""What all grids promise, of 1 to 16 bits and of fixed levels, on any tensor: nothing gets lost.

Shapes of any rank, empty ones, one element; zeros of both signs, denormals, the largest floats.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from laconic import forms
from laconic.core.errors import StorageError
from laconic.forms import affine, levels
from laconic.forms.affine import Affine
from laconic.forms.levels import Levels
from laconic.runtimes._safetensors import pack
from laconic.solvers.quantization import ranges
from laconic.storage.codecs import decode, encode

GRIDS = [*((bits, even) for bits in range(2, 17) for even in (True, False)), *levels.NAMES]
values = st.sampled_from([0.0, -0.0, 1e-45, -1e-42, 1e30, -3e38]) | st.floats(-3, 3, width=32)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Tensor, int | None, int | None]:
    """(values, axis, group)."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    axis = draw(st.sampled_from([None, *range(len(shape))]))
    rest = math.prod(n for i, n in enumerate(shape) if i != axis)
    sizes = [g for g in range(1, rest + 1) if rest % g == 0]
    group = draw(st.sampled_from([None, *sizes])) if axis is not None else None
    count = math.prod(shape)
    held = draw(st.lists(values, min_size=count, max_size=count))
    return torch.tensor(held).reshape(shape), axis, group


def form_on(x: Tensor, axis: int | None, group: int | None, grid: object) -> Affine | Levels:
    """`x` written down on one of `GRIDS`, clipping nothing."""
    if isinstance(grid, str):
        scale = ranges.level_scale(x, axis, grid, "minmax", group=group)
        return Levels(levels.encode(x, scale, axis, grid), scale, axis, grid)
    assert isinstance(grid, tuple)
    bits, symmetric = grid
    made = ranges.weight_grid(x, axis, "minmax", bits, group=group, symmetric=symmetric)
    parts = (made.scale, made.zero_point, axis, made.qmin, made.qmax)
    return Affine(affine.encode(x, *parts), *parts)


def encoded(form: Affine | Levels, x: Tensor) -> Tensor:
    if isinstance(form, Levels):
        return levels.encode(x, form.scale, form.axis, form.name)
    return affine.encode(x, form.scale, form.zero_point, form.axis, form.qmin, form.qmax)


def width(form: Affine | Levels) -> int:
    """Bits of a code."""
    points = form.qmax - form.qmin + 1 if isinstance(form, Affine) else 2 ** levels.bits(form.name)
    return max(1, math.ceil(math.log2(points)))


@given(tensors(), st.sampled_from(GRIDS))
@example((torch.zeros(0, 3), 1, None), (4, True))
@example((torch.tensor(1e-45), None, None), "nf4")
@example((torch.tensor([[3e38, -3e38]]), 0, 1), (16, False))
@example((torch.zeros(4, 5), None, None), (7, True))
@settings(max_examples=300, deadline=None)
def test_codes_survive_decoding_rebuilding_storing_and_packing(case, grid):
    x, axis, group = case
    form = form_on(x, axis, group, grid)
    made = form.decode()
    assert made.shape == x.shape and bool(made.isfinite().all())
    assert torch.equal(encoded(form, made), form.codes)
    again = forms.build(form.kind, form.tensors(), form.meta())
    assert torch.equal(again.decode(), made) and again.nbytes() == form.nbytes()
    bits, count = width(form), form.codes.numel()
    assert form.nbytes() >= math.ceil(count * bits / 8)
    stored = encode(form.codes)
    assert torch.equal(decode(stored, form.codes.dtype, tuple(form.codes.shape)), form.codes)
    if isinstance(form, Affine) and bits <= 8 and form.codes.ndim == 2 and count:
        bits = 4 if bits <= 4 else 8  # the widths that are packed
        words = pack(form.codes, bits)
        assert words.numel() == len(form.codes) * math.ceil(form.codes.shape[1] * bits / 32)
        assert np.array_equal(unpacked(words, bits, form.codes.shape[1]), form.codes.numpy())


def unpacked(words: Tensor, bits: int, count: int) -> np.ndarray:
    """Element i of a row stands at bits i * bits and following, raised by 2^(bits - 1)."""
    wide = words.numpy().astype(np.int64)[..., None]
    taken = ((wide >> np.arange(32)) & 1).reshape(len(words), -1)[:, : count * bits]
    return (taken.reshape(len(words), count, bits) << np.arange(bits)).sum(-1) - 2 ** (bits - 1)


@given(tensors(), st.sampled_from(GRIDS), st.sampled_from([math.inf, -math.inf, math.nan]))
@settings(max_examples=60, deadline=None)
def test_what_is_not_finite_has_no_code_on_any_grid(case, grid, bad):
    x, axis, group = case
    form = form_on(x, axis, group, grid)
    if not x.numel():
        return
    broken = x.clone()
    broken.view(-1)[-1] = bad
    with pytest.raises(StorageError, match="NaN or infinite"):
        encoded(form, broken)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_in_a_file_take_no_more_than_their_bits(grid):
    """Codes that are all alike likely, which no coder can shorten: packed, and little besides."""
    bits = width(form_on(torch.ones(2, 2), 0, None, grid))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (64, 64), generator=generator)
    codes = (codes - 2 ** (bits - 1)).to(torch.int8 if bits <= 8 else torch.int16)
    assert len(encode(codes, 0)) <= 64 * 64 * bits / 8 * 1.02 + 64
