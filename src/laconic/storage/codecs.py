"""One tensor to bytes and back, without loss; the shortest of several codings is kept.

Floats go through `planes`, integer codes of two or more dimensions through `context`, whatever has
many zeros through `sparse`.
"""

import math
import sys
import zlib
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from laconic.core.errors import StorageError
from laconic.storage import ans, context, planes, sparse
from laconic.storage.limits import CODER_EXPANSION, DEFLATE_EXPANSION, plausible
from laconic.storage.planes import Bytes, expect
from laconic.storage.tables import ALPHABET

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128,
        torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    )
}  # fmt: skip
_CODED = {torch.int64: 8, torch.int32: 4, torch.int16: 2, torch.int8: 1, torch.uint8: 1}
_SMALL = 1 << 18
_SAMPLE = 1 << 16


class Coding(IntEnum):
    """First byte of a tensor's data: how the rest is to be read."""

    RAW = 0
    CONSTANT = 1
    PLANES = 2
    DEFLATE = 3
    DEFLATE_PLANES = 4
    CONTEXT = 5
    SPARSE = 6


def encode(tensor: Tensor, axis: int = 0) -> bytes:
    """The shortest coding of a tensor; nothing for a tensor without elements.

    Args:
        tensor: any shape, a dtype of `DTYPES`, any device and strides.
        axis: for integer codes, the axis their scales belong to.

    Raises:
        StorageError: a dtype or layout that has no plain bytes.
    """
    if tensor.dtype not in DTYPES.values() or tensor.layout is not torch.strided:
        raise StorageError(
            f"cannot store {tensor.dtype} with layout {tensor.layout}",
            hint="store a dense tensor of a plain dtype",
        )
    if tensor.numel() == 0:
        return b""
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    raw = _to_bytes(plain)
    if bool((raw == raw[0]).all()) and plausible(raw.size, 1 + raw.shape[1], DEFLATE_EXPANSION):
        return bytes([Coding.CONSTANT]) + raw[0].tobytes()
    best = bytes([Coding.RAW]) + raw.tobytes()
    split = planes.rotate(raw, plain.dtype, 1).T
    candidates = [_planes(split), *_contexts(plain, axis), *_sparse(raw, plain)]
    allowed = [c for c in candidates if plausible(raw.size, len(c), CODER_EXPANSION)]
    best = min([best, *allowed], key=len)
    for coding, data in ((Coding.DEFLATE, raw), (Coding.DEFLATE_PLANES, split)):
        best = _deflate(coding, data.tobytes(), best)
    return best


def decode(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `encode`, on the CPU.

    Raises:
        StorageError: the bytes are not a coding of such a tensor.
    """
    n, width = math.prod(shape), dtype.itemsize
    if n == 0:
        expect(len(data) == 0, "bytes for a tensor without elements")
        return torch.empty(shape, dtype=dtype)
    coding, body = _coding(data), data[1:]
    if coding == Coding.CONSTANT:
        expect(len(body) == width, f"{len(body)} bytes for one element of {width}")
        raw = np.tile(np.frombuffer(body, np.uint8), (n, 1))
    elif coding == Coding.CONTEXT:
        raw = _decode_context(body, dtype, shape)
    elif coding == Coding.PLANES:
        raw = planes.rotate(np.ascontiguousarray(_decode_planes(body, n, width).T), dtype, -1)
    elif coding == Coding.SPARSE:
        raw = planes.unfold(sparse.decode(body, shape, width), dtype)
    else:
        packed = coding != Coding.RAW
        flat = np.frombuffer(
            inflate(body, n * width, "the deflated tensor") if packed else body, np.uint8
        ).copy()
        expect(flat.size == n * width, f"found {flat.size} bytes, expected {n * width}")
        raw = flat.reshape(n, width)
        if coding == Coding.DEFLATE_PLANES:
            raw = planes.rotate(np.ascontiguousarray(flat.reshape(width, n).T), dtype, -1)
    expect(dtype != torch.bool or int(raw.max()) <= 1, "a truth value that is neither 0 nor 1")
    return _from_bytes(raw, dtype).reshape(shape)


def version(data: Iterable[bytes]) -> int:
    """The lowest format version whose readers know the codings of these tensors' data."""
    return max((2 if part[:1] == bytes([Coding.SPARSE]) else 1 for part in data), default=1)


def check_size(data_bytes: int, first_byte: int, decoded: int) -> None:
    """Refuse, before anything is allocated, a size that no honest coding has.

    Raises:
        StorageError: `decoded` bytes cannot come from `data_bytes`.
    """
    coding = _coding(bytes([first_byte]))
    if coding == Coding.RAW:
        expect(data_bytes == decoded + 1, f"{data_bytes} bytes for {decoded} uncoded ones")
        return
    coder = coding in (Coding.PLANES, Coding.CONTEXT, Coding.SPARSE)
    expect(
        plausible(decoded, data_bytes, CODER_EXPANSION if coder else DEFLATE_EXPANSION),
        f"{data_bytes} bytes claim to hold {decoded}: a decompression bomb",
    )


def _coding(data: bytes) -> Coding:
    expect(len(data) > 0, "no bytes for a tensor with elements")
    expect(data[0] <= max(Coding), f"unknown coding {data[0]}")
    return Coding(data[0])


def _to_bytes(tensor: Tensor) -> Bytes:
    """Little-endian bytes `[elements, width]`."""
    width = tensor.element_size()
    flat = tensor.as_strided((tensor.numel(),), (1,))  # one element may have any stride
    raw = flat.view(torch.uint8).numpy().reshape(-1, width)
    return _little_endian(raw, tensor.dtype)


def _from_bytes(raw: Bytes, dtype: torch.dtype) -> Tensor:
    native = np.ascontiguousarray(_little_endian(raw, dtype)).reshape(-1)
    return torch.from_numpy(native).view(dtype)


def _little_endian(raw: Bytes, dtype: torch.dtype) -> Bytes:
    if sys.byteorder == "little":
        return raw
    parts = 2 if dtype.is_complex else 1
    split = raw.reshape(len(raw), parts, -1)
    return np.ascontiguousarray(split[:, :, ::-1]).reshape(raw.shape)


def _planes(split: Bytes) -> bytes:
    encoder = ans.Encoder()
    head = planes.encode(split, encoder)
    return bytes([Coding.PLANES]) + head + encoder.finish()


def _decode_planes(body: bytes, n: int, width: int) -> Bytes:
    reader = planes.Reader(body, n, width)
    decoder = ans.Decoder(reader.rest)
    split = reader.finish(decoder)
    decoder.finish()
    return split


def _sparse(raw: Bytes, tensor: Tensor) -> list[bytes]:
    body = sparse.encode(planes.fold(raw, tensor.dtype), tuple(tensor.shape))
    return [bytes([Coding.SPARSE]) + body] if body else []


def _contexts(tensor: Tensor, axis: int) -> list[bytes]:
    """Codings of small integers by context, with several shapes of the tables."""
    if tensor.dtype not in _CODED or tensor.ndim < 2 or tensor.numel() < 32:
        return []
    low, high = int(tensor.min()), int(tensor.max())
    if not 2 <= high - low + 1 <= ALPHABET or not -32768 <= low <= high <= 32767:
        return []
    codes = tensor.numpy().astype(np.int64)
    axis %= tensor.ndim
    centre = min(max(0, low), high) if low <= 0 <= high else int(np.median(codes))
    matrix, _ = context.rows(codes, axis)
    classes = context.row_classes(matrix, centre)
    first, last, typical = int(classes.min()), int(classes.max()), int(np.median(classes))
    heads = [context.Head(s, low, high, centre, axis, first, last) for s in _shapes(matrix, centre)]
    made = {head: _context(codes, head) for head in heads}
    best = min(made, key=lambda head: len(made[head]))
    flat = context.Head(best.shape, low, high, centre, axis, typical, typical)
    return [made[best], _context(codes, flat)]


def _shapes(matrix: NDArray[np.int64], centre: int) -> list[int]:
    """Mixtures worth trying: all of a small tensor, for a large one the likely neighbours."""
    if matrix.size <= 4 * _SMALL:
        return [0, 4, 8]
    distance = np.abs(matrix[:: max(1, len(matrix) // 64)] - centre).astype(np.float64)
    square = np.maximum((distance**2).mean(1), 1e-9)
    peaked = float(np.median(distance.mean(1) ** 2 / square))  # Laplace 0.5, Gauss 0.637
    return [min(8, max(0, round(8 * (0.637 - peaked) / 0.137)))]


def _context(codes: NDArray[np.int64], head: context.Head) -> bytes:
    encoder = ans.Encoder()
    context.encode(encoder, codes, head)
    return bytes([Coding.CONTEXT]) + head.pack() + encoder.finish()


def _decode_context(body: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Bytes:
    width = _CODED.get(dtype)
    if width is None or len(shape) < 2:
        raise StorageError(f"coded integers for a tensor of {dtype} and shape {list(shape)}")
    head = context.Head.unpack(body, len(shape))
    info = torch.iinfo(dtype)
    expect(info.min <= head.low and head.high <= info.max, f"codes beyond {dtype}: {head}")
    decoder = ans.Decoder(body[context.Head.SIZE :])
    codes = context.decode(decoder, shape, head)
    decoder.finish()
    kind = f"<{'u' if dtype == torch.uint8 else 'i'}{width}"
    return np.ascontiguousarray(codes.astype(kind)).reshape(-1).view(np.uint8).reshape(-1, width)


def _deflate(coding: Coding, data: bytes, best: bytes) -> bytes:
    """`data` deflated, or `best` where that is shorter. A sample decides for large data."""
    if len(data) > _SMALL:
        middle = len(data) // 2
        sample = data[middle : middle + _SAMPLE]
        if len(zlib.compress(sample, 9)) * len(data) > len(best) * len(sample):
            return best
    return min(best, bytes([coding]) + zlib.compress(data, 9), key=len)


def inflate(body: bytes, size: int, what: str, dictionary: bytes = b"") -> bytes:
    """Exactly `size` bytes from a zlib stream; never more are unpacked.

    Raises:
        StorageError: damaged, of another size, or followed by something.
    """
    unpack = zlib.decompressobj(zdict=dictionary) if dictionary else zlib.decompressobj()
    try:
        out = unpack.decompress(body, size + 1)
    except zlib.error as error:
        raise StorageError(f"{what} is damaged: {error}") from error
    if len(out) != size or not unpack.eof or unpack.unused_data:
        raise StorageError(f"{what} does not unpack to {size} bytes")
    return out
