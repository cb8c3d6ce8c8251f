"""Many zeros: where the other elements stand, and what they are.

Which elements are not zero is a row of bits, coded at its entropy: H(p) bits an element at random
places. Bits are taken a few at a time as one symbol, so that patterns (N:M) cost what they are:
2:4 takes log2(6) / 4 = 0.65 bits an element instead of 1. The other elements follow as byte planes
without gaps between them. Zero means that every byte is zero: -0.0, which multiplying
by a mask leaves behind, is an element like another.

Row and column densities as contexts were measured on a ResNet-20 with 50 to 90 % zeros: 6 to 1.5 %
of the positions, 0.5 to 0.2 % of the file. They are left out.
"""

import math
import struct

import numpy as np
from numpy.typing import NDArray

from laconic.storage import adaptive, ans, planes
from laconic.storage.planes import Bytes, expect

Bits = NDArray[np.bool_]

_HEAD = struct.Struct("<BBI")
_LARGEST_GROUP = 8
_GROUPS = (1, 2, 4, 8)
_ROW_MAJOR, _CHANNELS_LAST = 0, 1
_FEWEST = 0.05
_MOST = 1 << 32


def encode(raw: Bytes, shape: tuple[int, ...]) -> bytes:
    """Elements as bytes `[elements, width]`; nothing where they have too few zeros to gain by it.

    Args:
        raw: folded (`planes.fold`).
        shape: of the tensor.
    """
    bits = np.asarray(raw.any(axis=1))
    count = int(bits.sum())
    if not 0 < count <= (1 - _FEWEST) * len(bits) or count >= _MOST:
        return b""
    order, group = _cheapest(bits, shape)
    encoder = ans.Encoder()
    adaptive.code(encoder, _symbols(_ordered(bits, shape, order), group), 1 << group)
    values = planes.encode(np.ascontiguousarray(raw[bits].T), encoder)
    return _HEAD.pack(order, group, count) + values + encoder.finish()


def decode(body: bytes, shape: tuple[int, ...], width: int) -> Bytes:
    """The inverse of `encode`: bytes `[elements, width]`, still folded.

    Raises:
        StorageError: not such bytes.
    """
    expect(len(body) >= _HEAD.size, "the head of the sparse elements is cut off")
    order, group, count = _HEAD.unpack_from(body)
    n = math.prod(shape)
    good = order == _ROW_MAJOR or (order == _CHANNELS_LAST and len(shape) > 2)
    expect(
        good and 1 <= group <= _LARGEST_GROUP and 0 < count < n,
        f"the head of the sparse elements is out of range: {order}, {group}, {count} of {n}",
    )
    values = planes.Reader(body[_HEAD.size :], count, width)
    decoder = ans.Decoder(values.rest)
    symbols = adaptive.code(decoder, np.zeros(-(-n // group), np.int32), 1 << group)
    bits = _bits(symbols, group)
    expect(not bits[n:].any(), "an element behind the last one")
    expect(int(bits.sum()) == count, f"{int(bits.sum())} elements that are not zero, not {count}")
    raw = np.zeros((n, width), np.uint8)
    raw[_row_major(bits[:n], shape, order)] = values.finish(decoder).T
    decoder.finish()
    return raw


def _cheapest(bits: Bits, shape: tuple[int, ...]) -> tuple[int, int]:
    """The order and the group that take the fewest bits; plain ones unless others clearly do."""
    orders = (_ROW_MAJOR, _CHANNELS_LAST) if len(shape) > 2 else (_ROW_MAJOR,)
    choices = [(order, group) for group in _GROUPS for order in orders]

    def cost(choice: tuple[int, int]) -> float:
        order, group = choice
        counts = np.bincount(_symbols(_ordered(bits, shape, order), group)).astype(np.float64)
        counts = counts[counts > 0]
        total = counts.sum()
        learning = (1 << group) - 1 + len(counts) * math.log2(total + 1)
        return float((counts * np.log2(total / counts)).sum() + 0.5 * learning)

    return min(choices, key=cost)


def _ordered(bits: Bits, shape: tuple[int, ...], order: int) -> Bits:
    if order == _ROW_MAJOR:
        return bits
    return np.moveaxis(bits.reshape(shape), 1, -1).reshape(-1)


def _row_major(bits: Bits, shape: tuple[int, ...], order: int) -> Bits:
    if order == _ROW_MAJOR:
        return bits
    moved = (shape[0], *shape[2:], shape[1])
    return np.moveaxis(bits.reshape(moved), -1, 1).reshape(-1)


def _symbols(bits: Bits, group: int) -> NDArray[np.int32]:
    """`group` bits a symbol, the first one the lowest; zeros fill the last symbol."""
    padded = np.pad(bits, (0, -len(bits) % group)).reshape(-1, group)
    return padded @ (1 << np.arange(group, dtype=np.int32))


def _bits(symbols: NDArray[np.int32], group: int) -> Bits:
    return ((symbols[:, None] >> np.arange(group)) & 1).astype(np.bool_).reshape(-1)
