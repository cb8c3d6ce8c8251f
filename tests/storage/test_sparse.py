"""Zeros cost their entropy, patterns what they are, and everything comes back bit for bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from laconic import storage
from laconic.core.errors import StorageError
from laconic.program.capture import capture
from laconic.storage import planes, sparse
from laconic.storage.codecs import DTYPES, Coding, decode, encode, version

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]


def same_bits(one, two):
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


def round_trip(tensor):
    data = encode(tensor)
    back = decode(data, tensor.dtype, tuple(tensor.shape))
    assert back.dtype == tensor.dtype and same_bits(back, tensor.contiguous())
    return data


def entropy(p):
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


@pytest.mark.parametrize("kept", [0.5, 0.3, 0.2, 0.1, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_floats_cost_their_positions_and_their_values(dtype, kept, generator):
    """Within 2 % (adaptation, a head of 20 bytes) of H(p) an element plus the values alone."""
    values = (torch.randn(64, 64, 3, 3, generator=generator) * 0.02).to(dtype)
    dropped = torch.rand(values.shape, generator=generator) >= kept
    data = round_trip(values.masked_fill(dropped, 0))
    assert data[0] == Coding.SPARSE
    alone = 8 * len(encode(values[~dropped]))
    expected = values.numel() * entropy(1 - float(dropped.float().mean())) + alone
    assert 8 * len(data) < 1.02 * expected + 8 * 40
    assert len(data) < 1.15 * kept * len(encode(values)) + values.numel() * entropy(kept) / 8


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_with_many_zeros_cost_their_entropy(bits, rng):
    """One table for all would need the entropy; 4 % above it covers learning that table."""
    top = 2 ** (bits - 1) - 1
    values = np.rint(rng.standard_normal((64, 64, 3, 3)) * top / 3).clip(-top, top)
    codes = np.where(rng.random(values.shape) < 0.9, 0, values).astype(np.int8)
    _, counts = np.unique(codes, return_counts=True)
    ideal = (counts * np.log2(codes.size / counts)).sum()
    assert 8 * len(round_trip(torch.from_numpy(codes))) < 1.04 * ideal


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("space", [(), (3, 3)])
def test_patterns_cost_less_than_free_zeros(n, m, space, rng):
    """N:M along the inputs takes log2(m choose n) / m bits an element, less than H(n / m)."""
    shape = (64, 8 if space else 72, *space, m)
    ones = rng.permuted(np.broadcast_to([1] * n + [0] * (m - n), shape), axis=-1)
    mask = np.moveaxis(ones, -1, 2).reshape(64, -1, *space)
    weight = torch.from_numpy(rng.standard_normal(mask.shape).astype(np.float16))
    weight = weight.masked_fill(torch.from_numpy(mask == 0), 0)
    data = round_trip(weight)
    values = len(encode(weight[weight != 0]))
    ideal = weight.numel() * math.log2(math.comb(m, n)) / m
    free = weight.numel() * entropy(n / m)
    assert 8 * (len(data) - values) < min(1.1 * ideal + 8 * 40, 0.95 * free)


def test_signs_of_zeros_and_payloads_of_nan_stay():
    words = torch.zeros(40, 40, dtype=torch.int32)
    words[::3, ::2] = torch.randint(-(2**31), 2**31, (14, 20), dtype=torch.int64).int()
    words[1, :6] = torch.tensor([-(2**31), 0x7FC00001, 0x7F800001, -1, 1, 0x7F800000])
    round_trip(words)
    data = round_trip(words.view(torch.float32))
    assert data[0] == Coding.SPARSE
    minus = torch.zeros(500).masked_fill(torch.arange(500) % 2 == 0, -0.0)
    assert torch.equal(decode(encode(minus), minus.dtype, (500,)).signbit(), minus.signbit())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(DTYPES.values())), st.lists(st.integers(1, 9), max_size=4),
    st.floats(0, 1), st.integers(0, 2**31),
)  # fmt: skip
def test_any_dtype_and_shape(dtype, shape, kept, seed):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 2 if dtype == torch.bool else 256, (math.prod(shape), dtype.itemsize))
    raw *= rng.random((len(raw), 1)) < kept
    tensor = torch.from_numpy(raw.astype(np.uint8)).reshape(-1).view(dtype).reshape(shape)
    round_trip(tensor)
    folded = planes.fold(raw.astype(np.uint8), dtype)
    body = sparse.encode(folded, tuple(shape))
    if body:
        assert np.array_equal(sparse.decode(body, tuple(shape), dtype.itemsize), folded)


@pytest.mark.parametrize("dtype", SIGNED)
def test_folding_makes_small_integers_small_numbers(dtype):
    edge = torch.iinfo(dtype)
    values = torch.tensor([0, -1, 1, -2, 2, edge.max, edge.min], dtype=dtype)
    raw = values.view(torch.uint8).numpy().reshape(len(values), -1)
    folded = planes.fold(raw, dtype)
    numbers = [int.from_bytes(row.tobytes(), "little") for row in folded]
    assert numbers == [0, 1, 2, 3, 4, 2 * edge.max, 2 * edge.max + 1]
    assert np.array_equal(planes.unfold(folded, dtype), raw)


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (b"", "cut off"),
        (b"\0\1", "cut off"),
        (b"\2\1\4\0\0\0", "out of range"),
        (b"\1\1\4\0\0\0", "out of range"),  # channels last needs three dimensions
        (b"\0\0\4\0\0\0", "out of range"),
        (b"\0\x09\4\0\0\0", "out of range"),
        (b"\0\1\0\0\0\0", "out of range"),
        (b"\0\1\xff\xff\xff\xff", "out of range"),
        (b"\0\1\4\0\0\0\0", "damaged"),
        (b"\0\1\4\0\0\0\0\0\0\0", "uncoded byte plane is cut off"),
    ],
)
def test_forged_heads(head, match):
    with pytest.raises(StorageError, match=match):
        decode(bytes([Coding.SPARSE]) + head, torch.float32, (10, 10))


def test_a_wrong_count_is_refused(generator):
    weight = torch.randn(30, 30, generator=generator)
    data = bytearray(encode(weight.masked_fill(weight < 0.5, 0)))
    assert data[0] == Coding.SPARSE
    data[3] -= 1
    with pytest.raises(StorageError, match=r"damaged|cut off|not zero|left over|zero byte"):
        decode(bytes(data), torch.float32, (30, 30))


def test_the_version_follows_from_what_is_in_the_file(tmp_path, reader, generator):
    """Files without many zeros stay readable for readers of version 1; the prediction is exact."""
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    program = capture(model, torch.randn(2, 40, generator=generator))
    sizes = []
    for number, threshold in ((1, 0.0), (2, 0.1)):
        weight = program.tensor("0.weight").detach()
        program.set_tensor("0.weight", weight.masked_fill(weight.abs() < threshold, 0.0))
        path = tmp_path / f"{number}.laconic"
        sizes.append(storage.save(program, path))
        assert path.read_bytes()[8] == number
        assert sizes[-1] == path.stat().st_size == storage.predict(program).total
        _, tensors = reader(path)
        held = storage.load(path).tensor("0.weight")
        assert same_bits(held.detach(), program.tensor("0.weight").detach())
        assert tensors["0.weight"][2] == held.detach().numpy().tobytes()
    assert sizes[1] < 0.7 * sizes[0]
    assert version([]) == 1
