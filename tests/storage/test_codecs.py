"""Every tensor comes back bit for bit, in no more bytes than it takes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.core.errors import StorageError
from laconic.storage import codecs
from laconic.storage.codecs import DTYPES, Coding, check_size, decode, encode


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else None


def round_trip(tensor, axis=0):
    data = encode(tensor, axis)
    if data:
        check_size(len(data), data[0], tensor.numel() * tensor.element_size())
    back = decode(data, tensor.dtype, tuple(tensor.shape))
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert tensor.numel() == 0 or torch.equal(bits(back), bits(tensor))
    assert len(data) <= tensor.numel() * tensor.element_size() + 1
    return data


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5,), (3, 4), (16, 3, 3, 3), (40, 64)])
def test_every_dtype_bit_for_bit(dtype, shape, generator):
    n = math.prod(shape)
    noise = torch.randint(0, 256, (n * dtype.itemsize,), generator=generator).to(torch.uint8)
    if dtype == torch.bool:
        noise = noise % 2
    round_trip(noise.view(dtype).reshape(shape))
    round_trip(torch.zeros(shape, dtype=dtype))
    small = torch.randint(0, 3, shape, generator=generator)
    round_trip(small.to(torch.float32).to(dtype))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2),
    st.floats(0, 60), st.integers(-40, 40), st.integers(0, 2**31),
)  # fmt: skip
def test_integer_codes_of_any_shape_and_spread(rows, channels, width, axis, spread, shift, seed):
    rng = np.random.default_rng(seed)
    shape = (rows, channels, width, width)[: max(2, axis + 1)]
    codes = np.rint(rng.standard_normal(shape) * spread + shift).clip(-128, 127)
    round_trip(torch.from_numpy(codes.astype(np.int8)), axis)
    round_trip(torch.from_numpy(codes.astype(np.int64)), axis)


def test_strides_and_gradients_do_not_matter(generator):
    w = torch.randn(6, 5, 4, 4, generator=generator, requires_grad=True)
    for view in (w.transpose(0, 1), w[:, ::2], w.to(memory_format=torch.channels_last)):
        assert encode(view) == encode(view.detach().clone(memory_format=torch.contiguous_format))


def gaussian_bits(sigma):
    x = np.arange(-127, 128)
    cdf = np.vectorize(lambda v: 0.5 * math.erf(v / sigma / math.sqrt(2)))
    p = np.maximum(cdf(x + 0.5) - cdf(x - 0.5), 1e-30)
    return -(p * np.log2(p)).sum()


def test_codes_take_their_entropy(rng):
    """One scale everywhere: within 1 % of the source's entropy, tables and head included."""
    codes = np.rint(rng.standard_normal((256, 576)) * 25).clip(-127, 127).astype(np.int8)
    data = round_trip(torch.from_numpy(codes))
    assert 8 * len(data) / codes.size < 1.01 * gaussian_bits(25)


def test_rows_and_columns_of_different_scale_are_told_apart(rng):
    """Scales a factor of 16 apart in rows and columns: within 4 % of the sum of entropies."""
    rows, columns = 2.0 ** rng.uniform(0, 2, 128), 2.0 ** rng.uniform(0, 2, 32).repeat(9)
    sigma = 2 * rows[:, None] * columns[None, :]
    codes = np.rint(rng.standard_normal(sigma.shape) * sigma).clip(-127, 127).astype(np.int8)
    ideal = np.vectorize(gaussian_bits)(np.unique(sigma))
    ideal = np.interp(sigma, np.unique(sigma), ideal).mean()
    data = round_trip(torch.from_numpy(codes.reshape(128, 32, 3, 3)))
    _, counts = np.unique(codes, return_counts=True)
    one_table = (counts * np.log2(codes.size / counts)).sum() / codes.size
    assert 8 * len(data) / codes.size < min(1.03 * ideal, 0.97 * one_table)


def test_sparse_codes(rng):
    codes = np.where(rng.random((64, 64, 3, 3)) < 0.05, rng.integers(-100, 100, (64, 64, 3, 3)), 0)
    data = round_trip(torch.from_numpy(codes.astype(np.int8)))
    entropy = 0.05 * math.log2(200 / 0.05) - 0.95 * math.log2(0.95)
    assert 8 * len(data) / codes.size < 1.15 * entropy


def test_floats_lose_their_predictable_bits(generator):
    w = torch.randn(200, 200, generator=generator) * 0.02
    assert round_trip(w)[0] == Coding.PLANES
    assert len(encode(w)) < 0.84 * 4 * w.numel()
    assert len(encode(w.bfloat16())) < 0.68 * 2 * w.numel()
    assert len(encode(w.bfloat16().float())) < 0.35 * 4 * w.numel(), "zero mantissas cost nothing"


def test_regular_tensors_nearly_vanish():
    assert len(encode(torch.arange(4096).reshape(1, -1))) < 600
    assert len(encode(torch.ones(256, 256, dtype=torch.bool).tril())) < 800
    assert len(encode(torch.zeros(64, dtype=torch.int32))) == 5


def test_what_cannot_be_stored_is_named():
    with pytest.raises(StorageError, match="sparse"):
        encode(torch.eye(3).to_sparse())
    with pytest.raises(StorageError, match="float8_e4m3fnuz"):
        encode(torch.zeros(3, dtype=torch.float8_e4m3fnuz))


@pytest.mark.parametrize("size", [1 << 20, 1 << 33, 1 << 60])
@pytest.mark.parametrize("coding", [1, 2, 3, 4, 5, 6])
def test_a_bomb_is_refused_before_anything_is_allocated(coding, size):
    with pytest.raises(StorageError, match="bomb"):
        check_size(100, coding, size)


@pytest.mark.parametrize("coding", list(Coding))
def test_damaged_bytes_are_an_error_or_another_tensor(coding, rng):
    """Whatever the bytes are, decoding gives a tensor of the stated form or a StorageError."""
    samples = {
        Coding.RAW: torch.from_numpy(rng.integers(0, 256, (40, 40)).astype(np.uint8)),
        Coding.CONSTANT: torch.zeros(40, 40, dtype=torch.int8),
        Coding.PLANES: torch.randn(40, 40),
        Coding.DEFLATE: torch.tensor([7, 1, 200, 90], dtype=torch.uint8).repeat(100, 5),
        Coding.DEFLATE_PLANES: torch.arange(4000),
        Coding.CONTEXT: torch.from_numpy((rng.standard_normal((40, 40)) * 9).astype(np.int8)),
        Coding.SPARSE: torch.randn(40, 40) * (torch.rand(40, 40) < 0.2),
    }
    tensor = samples[coding]
    data = encode(tensor)
    assert data[0] == coding
    outcomes = {"same": 0, "other": 0, "error": 0}
    for position in range(0, len(data), max(1, len(data) // 150)):
        for forged in (
            data[:position]
            + bytes([data[position] ^ (1 << int(rng.integers(8)))])
            + data[position + 1 :],
            data[:position],
            data[:position] + b"\1" + data[position:],
        ):
            try:
                if forged:
                    check_size(len(forged), forged[0], tensor.numel() * tensor.element_size())
                back = decode(forged, tensor.dtype, tuple(tensor.shape))
            except StorageError:
                outcomes["error"] += 1
            else:
                assert back.shape == tensor.shape and back.dtype == tensor.dtype
                outcomes["same" if torch.equal(back, tensor) else "other"] += 1
    assert outcomes["error"] > 0 and outcomes["same"] == 0


def test_truth_values_are_checked():
    with pytest.raises(StorageError, match="truth value"):
        codecs.decode(bytes([0, 1, 0, 2]), torch.bool, (3,))
