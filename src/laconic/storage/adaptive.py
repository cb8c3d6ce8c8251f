"""Symbols without a known shape: one table that learns from what was already coded.

The table is made anew at each border of ever larger blocks, from the counts so far, so the
symbols still go through the coder as arrays and no table has to be stored.
"""

from collections.abc import Iterator

import numpy as np

from laconic.storage.ans import Channel, Symbols
from laconic.storage.tables import normalise

FIRST_BLOCK = 32
LARGEST_BLOCK = 1 << 22


def code(channel: Channel, symbols: Symbols, alphabet: int) -> Symbols:
    """Code `[n]` symbols in `0 .. alphabet - 1`, `alphabet` at least 2."""
    counts = np.zeros(alphabet, np.int64)
    out: list[Symbols] = []
    for first, last in _blocks(len(symbols)):
        table = normalise((2 * counts + 1)[None, :])[0]
        block = channel.code(table, symbols[first:last])
        counts += np.bincount(block, minlength=alphabet)
        out.append(block)
    return np.concatenate(out) if out else symbols


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    first = 0
    while first < n:
        last = min(n, first + min(max(FIRST_BLOCK, first // 2), LARGEST_BLOCK))
        yield first, last
        first = last
