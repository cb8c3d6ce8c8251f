"""Integer codes of a weight: the expected size of each one comes from its row and its column.

A weight is seen as rows (output channels) of columns (input channel and kernel position). Each
row's scale is a stored class of a quarter octave. Each column's scale is learned from the rows
already coded, blended with the mean over its input channel and over all columns, and costs
nothing. Row class plus column class choose one of 40 tables, a mixture of Laplace and Gauss; a
correction that learns how the codes so far differ from these tables catches spikes at zero and at
the ends of the range. Helps wherever channels differ in size, from a few hundred codes on; with
one scale everywhere it costs what a single good table costs. Own work; the nearest published
relative is context modelling in DeepCABAC (arXiv 1907.11900), which is adaptive per symbol.
"""

import math
import struct
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from laconic.core.errors import StorageError
from laconic.storage import adaptive
from laconic.storage.ans import Channel, Symbols
from laconic.storage.tables import ALPHABET, CLASSES, base_tables, inverse_scales, normalise
from laconic.storage.tables import thresholds as quarter_octaves

_HEAD = struct.Struct("<BhhhBBB")
_CHANNEL_WEIGHT = 8
_ALL_WEIGHT = 2
_LARGEST = 1 << 20
_BLOCK_SYMBOLS = 1 << 22

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Head:
    """What the decoder is told: 10 bytes.

    Attributes:
        shape: eighths of Laplace in the mixture, 0 to 8.
        low: smallest code.
        high: largest code.
        centre: the code at the curves' peak.
        axis: the axis of the rows.
        first: smallest row class.
        last: largest row class; equal to `first` if all rows are of one class.
    """

    shape: int
    low: int
    high: int
    centre: int
    axis: int
    first: int
    last: int

    SIZE = _HEAD.size

    def pack(self) -> bytes:
        """The bytes of the head."""
        return _HEAD.pack(
            self.shape, self.low, self.high, self.centre, self.axis, self.first, self.last
        )

    @classmethod
    def unpack(cls, data: bytes, ndim: int) -> Self:
        """The inverse of `pack`.

        Raises:
            StorageError: too short, or a field out of range.
        """
        if len(data) < _HEAD.size:
            raise StorageError("the head of the coded integers is cut off")
        head = cls(*_HEAD.unpack_from(data))
        good = head.shape <= 8 and head.low <= head.centre <= head.high and head.axis < ndim
        good = good and 2 <= head.high - head.low + 1 <= ALPHABET
        if not good or not head.first <= head.last < CLASSES:
            raise StorageError(f"the head of the coded integers is out of range: {head}")
        return head


def rows(codes: NDArray[np.int64], axis: int) -> tuple[Ints, int]:
    """`codes` as `[rows, columns]` with `axis` first, and how many columns make one channel."""
    moved = np.moveaxis(codes, axis, 0)
    return np.ascontiguousarray(moved).reshape(len(moved), -1), _positions(moved.shape)


def _positions(moved: tuple[int, ...]) -> int:
    return math.prod(moved[2:])


def row_classes(codes: Ints, centre: int) -> Ints:
    """Row classes `[rows]`: mean distance of `[rows, columns]` from `centre`, quarter octaves."""
    mean = (np.abs(codes - centre).sum(1) << 8) // codes.shape[1]
    return np.searchsorted(quarter_octaves(-7, CLASSES - 9), mean, side="right")


def encode(channel: Channel, codes: NDArray[np.int64], head: Head) -> None:
    """Code integers of any shape, at least one element, all in [head.low, head.high]."""
    matrix, positions = rows(codes, head.axis)
    if head.first == head.last:
        classes = np.full(len(matrix), head.first)
    else:
        classes = row_classes(matrix, head.centre)
    _run(channel, (matrix - head.low).astype(np.int32), classes, head, positions)


def decode(channel: Channel, shape: tuple[int, ...], head: Head) -> Symbols:
    """The inverse of `encode`; `[*shape]` int32."""
    moved = (shape[head.axis], *(n for i, n in enumerate(shape) if i != head.axis))
    symbols = np.zeros((moved[0], math.prod(moved[1:])), np.int32)
    classes = np.full(moved[0], head.first)
    _run(channel, symbols, classes, head, _positions(moved))
    symbols += head.low
    return np.moveaxis(symbols.reshape(moved), 0, head.axis)


def _run(channel: Channel, symbols: Symbols, classes: Ints, head: Head, positions: int) -> None:
    """Code `[rows, columns]` symbols block by block of rows; a decoder fills `symbols`."""
    if head.first != head.last:
        alphabet = head.last - head.first + 1
        coded = adaptive.code(channel, (classes - head.first).astype(np.int32), alphabet)
        classes = coded.astype(np.int64) + head.first
    correction = _Correction(base_tables(head.low, head.high, head.centre, head.shape))
    columns = _Columns(symbols.shape[1], positions)
    first = 0
    while first < len(symbols):
        step = max(1, min(first // 2, _BLOCK_SYMBOLS // symbols.shape[1]))
        block = symbols[first : first + step]
        chosen = np.clip(
            classes[first : first + step, None] + columns.classes()[None, :], 0, CLASSES - 1
        ).astype(np.uint8)
        _code_block(channel, block, chosen, correction)
        distance = np.abs(block.astype(np.int64) + (head.low - head.centre))
        columns.update(distance, classes[first : first + step])
        first += step


def _code_block(
    channel: Channel, block: Symbols, chosen: NDArray[np.uint8], correction: "_Correction"
) -> None:
    """Code one block class by class, in row-major order within a class."""
    order = np.argsort(chosen.reshape(-1), kind="stable")
    sizes = np.bincount(chosen.reshape(-1), minlength=CLASSES)
    tables = correction.tables()
    sorted_symbols = block.reshape(-1)[order]
    start = 0
    for k in np.flatnonzero(sizes):
        end = start + int(sizes[k])
        sorted_symbols[start:end] = channel.code(tables[k], sorted_symbols[start:end])
        start = end
    block.reshape(-1)[order] = sorted_symbols
    correction.update(sorted_symbols, sizes)


class _Correction:
    """How often each symbol came, against how often the tables expected it."""

    def __init__(self, base: Ints) -> None:
        self._base = base
        self._seen = np.zeros(base.shape[1], np.int64)
        self._expected = np.zeros(base.shape[1], np.int64)

    def tables(self) -> Ints:
        """Frequencies `[40, symbols]` for the next block."""
        ratio = ((self._seen + 16) << 24) // ((self._expected >> 8) + (1 << 20))
        return normalise((self._base * np.clip(ratio, 1, 1 << 20)) >> 6)

    def update(self, symbols: Symbols, sizes: Ints) -> None:
        self._seen += np.bincount(symbols, minlength=len(self._seen))
        self._expected += sizes.astype(np.int64) @ self._base


class _Columns:
    """The scale of each column, from the rows coded so far."""

    def __init__(self, columns: int, positions: int) -> None:
        self._sum = np.zeros(columns, np.int64)
        self._positions = positions
        self._rows = 0
        self._borders = quarter_octaves(-11, 12)

    def classes(self) -> Ints:
        """Quarter octaves above the mean column, `[columns]`, in -12 .. 12."""
        n = self._rows
        mean = int(self._sum.sum()) // max(1, n * len(self._sum))
        if mean == 0:
            return np.zeros(len(self._sum), np.int64)
        channels = self._sum.reshape(-1, self._positions).sum(1) // (self._positions * n)
        blended = self._sum + _CHANNEL_WEIGHT * np.repeat(channels, self._positions)
        scale = (blended + _ALL_WEIGHT * mean) // (n + _CHANNEL_WEIGHT + _ALL_WEIGHT)
        return np.searchsorted(self._borders, (scale << 8) // mean, side="right") - 12

    def update(self, distance: Ints, classes: Ints) -> None:
        """Add rows `[rows, columns]` of distances from the centre, each over its row's scale."""
        inverse = inverse_scales()[classes][:, None]
        self._sum += np.minimum((distance * inverse) >> 18, _LARGEST).sum(0)
        self._rows += len(distance)
