"""Byte planes: byte j of every element side by side, each plane written the way that suits it.

Floats are rotated left by one bit first, which makes the exponent a byte of its own: exponents are
very predictable, mantissas are not (Hershcovitch et al., "ZipNN", arXiv 2411.05239; Zhang et al.,
"DFloat11", arXiv 2504.11651).
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from laconic.core.errors import StorageError
from laconic.storage import adaptive, ans

Bytes = NDArray[np.uint8]

_ROTATED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_SIGNED = {torch.int64, torch.int32, torch.int16, torch.int8}
_RAW, _CONSTANT, _CODED = 0, 1, 2


def rotate(raw: Bytes, dtype: torch.dtype, by: int) -> Bytes:
    """Floats `[elements, width]` rotated by one bit, left (1) or right (-1); others as they are."""
    if dtype not in _ROTATED:
        return raw
    width = dtype.itemsize
    bits = width * 8
    words = np.ascontiguousarray(raw).view(f"<u{width}")
    left = 1 if by > 0 else bits - 1
    right = bits - left
    kind = words.dtype.type
    return ((words << kind(left)) | (words >> kind(right))).view(np.uint8).reshape(raw.shape)


def fold(raw: Bytes, dtype: torch.dtype) -> Bytes:
    """The sign as the lowest bit: floats rotated, signed integers as 0, -1, 1, -2, 2, ...

    Small integers of both signs so become small numbers. Zero stays zero. `[elements, width]`.
    """
    if dtype not in _SIGNED:
        return rotate(raw, dtype, 1)
    words = np.ascontiguousarray(raw).view(f"<i{dtype.itemsize}")
    kind = words.dtype.type
    shifted = words >> kind(8 * dtype.itemsize - 1)
    return ((words << kind(1)) ^ shifted).view(np.uint8).reshape(raw.shape)


def unfold(raw: Bytes, dtype: torch.dtype) -> Bytes:
    """The inverse of `fold`."""
    if dtype not in _SIGNED:
        return rotate(raw, dtype, -1)
    words = np.ascontiguousarray(raw).view(f"<u{dtype.itemsize}")
    kind = words.dtype.type
    signs = kind(0) - (words & kind(1))
    return ((words >> kind(1)) ^ signs).view(np.uint8).reshape(raw.shape)


def encode(split: Bytes, encoder: ans.Encoder) -> bytes:
    """Byte planes `[width, elements]`, each uncoded, constant or adaptively coded.

    Returns:
        the head and the uncoded planes; coded planes go to `encoder`.
    """
    head, uncoded = bytearray(), bytearray()
    for plane in split:
        low, high = int(plane.min()), int(plane.max())
        if low == high:
            head += bytes([_CONSTANT, low])
        elif _saves(plane):
            head += bytes([_CODED, low, high])
            adaptive.code(encoder, plane.astype(np.int32) - low, high - low + 1)
        else:
            head += bytes([_RAW])
            uncoded += plane.tobytes()
    return bytes(head + uncoded)


def _saves(plane: Bytes) -> bool:
    """Whether coding is likely to save at least half a percent and its two bytes."""
    counts = np.bincount(plane, minlength=256).astype(np.float64)
    counts = counts[counts > 0]
    bits = float((counts * np.log2(plane.size / counts)).sum())
    learning = len(counts) * 0.5 * math.log2(plane.size + 1)
    return bits + learning + 16 < 0.995 * 8 * plane.size


class Reader:
    """The inverse of `encode`: the head and the uncoded planes first, then the coded ones."""

    def __init__(self, body: bytes, n: int, width: int) -> None:
        """Read what stands before the coded symbols.

        Raises:
            StorageError: damaged or cut off.
        """
        kinds, at = _heads(body, width)
        uncoded = sum(kind == _RAW for kind, _, _ in kinds)
        expect(len(body) >= at + uncoded * n, "an uncoded byte plane is cut off")
        self._kinds = kinds
        self._planes = np.empty((width, n), np.uint8)
        for plane, (kind, low, _) in zip(self._planes, kinds, strict=True):
            if kind == _RAW:
                plane[:] = np.frombuffer(body, np.uint8, n, at)
                at += n
            elif kind == _CONSTANT:
                plane[:] = low
        self.rest = body[at:]

    def finish(self, decoder: ans.Decoder) -> Bytes:
        """All planes, `[width, elements]`."""
        n = self._planes.shape[1]
        for plane, (kind, low, high) in zip(self._planes, self._kinds, strict=True):
            if kind == _CODED:
                plane[:] = adaptive.code(decoder, np.zeros(n, np.int32), high - low + 1) + low
        return self._planes


def _heads(body: bytes, width: int) -> tuple[list[tuple[int, int, int]], int]:
    """Kind, lowest and highest value of each plane, and where the heads end."""
    kinds: list[tuple[int, int, int]] = []
    at = 0
    for _ in range(width):
        kind = body[at] if at < len(body) else 255
        expect(kind <= _CODED, "the head of the byte planes is damaged")
        values = body[at + 1 : at + 1 + kind]
        expect(len(values) == kind, "the head of the byte planes is cut off")
        low, high = (values[0], values[-1]) if values else (0, 0)
        expect(kind != _CODED or low < high, "a coded plane of one value")
        kinds.append((kind, low, high))
        at += 1 + kind
    return kinds, at


def expect(good: bool, message: str) -> None:
    """Refuse bytes that are not what the format says.

    Raises:
        StorageError: `good` is false.
    """
    if not good:
        raise StorageError(message)
