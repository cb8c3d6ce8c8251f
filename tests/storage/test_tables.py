"""Tables are integers that add up; the coder is the one the format describes."""

import math

import numpy as np
import pytest

from laconic.core.errors import StorageError
from laconic.storage import adaptive, ans
from laconic.storage.tables import (
    CLASSES,
    TOTAL,
    base_tables,
    eighth_power,
    exp2,
    normalise,
    thresholds,
)


def test_exp2_is_a_power_of_two():
    t = np.arange(0, 20 << 16, 997, dtype=np.int64)
    # 16 truncating multiplications and square roots at 2^30: below 2^-24 before the shift.
    exact = 2.0 ** (30 - t / 65536)
    assert np.abs(exp2(t) - exact).max() <= 2 + 2.0**30 * 2.0**-24
    assert exp2(np.array([31 << 16, 40 << 16], np.int64)).tolist() == [0, 0]


def test_constants_are_exact_floors():
    for n in (-240, -62, -1, 0, 1, 8, 31):
        value = eighth_power(n)
        assert value**8 <= 2 ** (n + 240) < (value + 1) ** 8
    assert thresholds(0, 0)[0] == math.floor(256 * 2 ** (-1 / 8))


@pytest.mark.parametrize(("low", "high", "centre"), [(-127, 127, 0), (0, 1, 1), (-512, 511, 3)])
@pytest.mark.parametrize("shape", [0, 4, 8])
def test_every_table_adds_up(low, high, centre, shape):
    tables = base_tables(low, high, centre, shape)
    assert tables.shape == (CLASSES, high - low + 1)
    assert (tables.sum(1) == TOTAL).all() and tables.min() >= 1
    spread = (tables * np.abs(np.arange(low, high + 1) - centre)).sum(1)
    assert (np.diff(spread) >= 0).all(), "a higher class has larger distances"


def test_normalise_keeps_proportions_and_the_least():
    table = normalise(np.array([[0, 1, 2**38]], np.int64))[0]
    assert table.sum() == TOTAL and table.tolist()[:2] == [1, 1]


def tables_for(rng):
    yield np.array([1, TOTAL - 1])
    yield np.array([TOTAL - 1, 1])
    yield np.full(256, TOTAL // 256)
    for n in (2, 3, 17, 1000):
        yield normalise(rng.integers(0, 1 << 38, (1, n)))[0]


def test_constriction_takes_integer_tables_as_they_are(rng):
    """Words made by `constriction` are those that Python's integers make."""
    for table in tables_for(rng):
        symbols = rng.integers(0, len(table), 50).astype(np.int32)
        encoder = ans.Encoder()
        encoder.code(table, symbols)
        borders = [0, *np.cumsum(table).tolist()]
        state, words = 0, []
        for s in symbols[::-1].tolist():
            f = int(table[s])
            if state >> 40 >= f:
                words.append(state & 0xFFFFFFFF)
                state >>= 32
            state = (state // f << 24) + borders[s] + state % f
        while state:
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        # The state goes out high word last.
        expected = np.array(words, "<u4").tobytes().rstrip(b"\0")
        assert encoder.finish() == expected
        decoder = ans.Decoder(expected)
        assert (decoder.code(table, np.zeros(50, np.int32)) == symbols).all()
        decoder.finish()


def test_left_over_words_are_refused(rng):
    encoder = ans.Encoder()
    encoder.code(np.full(256, TOTAL // 256), rng.integers(0, 256, 99).astype(np.int32))
    decoder = ans.Decoder(encoder.finish())
    decoder.code(np.full(256, TOTAL // 256), np.zeros(98, np.int32))
    with pytest.raises(StorageError, match="left over"):
        decoder.finish()
    with pytest.raises(StorageError, match="zero byte"):
        ans.Decoder(b"abc\0")


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 5000])
def test_adaptive_round_trip(rng, length):
    symbols = np.minimum(rng.geometric(0.3, length), 40).astype(np.int32) - 1
    encoder = ans.Encoder()
    adaptive.code(encoder, symbols, 40)
    decoder = ans.Decoder(encoder.finish())
    assert (adaptive.code(decoder, np.zeros(length, np.int32), 40) == symbols).all()
    decoder.finish()
