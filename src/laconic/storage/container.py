"""The file: a prelude, the header, the tensors' data, checksums; written whole or not at all."""

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from laconic.core.errors import StorageError
from laconic.core.whole_files import whole_file
from laconic.storage import header
from laconic.storage.limits import Limits

MAGIC = b"\x93LACONIC"
VERSIONS = (1, 2)
CHUNK = 1 << 14
PRELUDE = struct.Struct("<8sHBxIIIQ32s")
_UNHASHED = 32
_CHECKSUM = 4
_PIECE = CHUNK << 6


@dataclass(frozen=True)
class Layout:
    """Where the parts of a file lie, in bytes.

    Attributes:
        header_stored: length of the header.
        data: length of all tensors' data.
    """

    header_stored: int
    data: int

    @property
    def start(self) -> int:
        """Where the data begin."""
        return PRELUDE.size + self.header_stored

    @property
    def chunks(self) -> int:
        """How many checksums follow the data."""
        return -(-self.data // CHUNK)

    @property
    def total(self) -> int:
        """Length of the file."""
        return self.start + self.data + _CHECKSUM * self.chunks


def assemble(content: dict[str, Any], data: Sequence[bytes], version: int = 1) -> list[bytes]:
    """The parts of a file, in order.

    Args:
        content: the header.
        data: the tensors' bytes in the order of the header.
        version: of the format: the lowest that has all there is in the file.
    """
    coding, stored, size = header.pack(content)
    body = b"".join(data)
    checksums = b"".join(
        struct.pack("<I", zlib.crc32(body[at : at + CHUNK])) for at in range(0, len(body), CHUNK)
    )
    prelude = PRELUDE.pack(
        MAGIC, version, coding, len(stored), size, zlib.crc32(stored), len(body), bytes(32)
    )[:_UNHASHED]
    digest = hashlib.sha256()
    for part in (prelude, stored, body, checksums):
        digest.update(part)
    return [prelude, digest.digest(), stored, body, checksums]


def write(path: Path, parts: Iterable[bytes]) -> int:
    """Write a file whole or not at all; whatever stood at `path` stays until the new one is whole.

    Returns:
        bytes written.

    Raises:
        StorageError: the disk is full, or the folder is missing or not writable.
    """
    try:
        with whole_file(path) as unfinished, unfinished.open("xb") as file:
            size = sum(file.write(part) for part in parts)
        _sync_folder(path.parent)
    except OSError as error:
        kept = " the earlier file is untouched;" if path.exists() else ""
        raise StorageError(
            f"could not be written: {error.strerror or error};{kept} nothing is left half-written",
            where=str(path),
            hint="free some space or choose another place",
        ) from error
    return size


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, where the system allows it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_prelude(file: BinaryIO, limits: Limits) -> tuple[dict[str, Any], Layout]:
    """The header of an open file, and where its parts lie.

    Raises:
        StorageError: not such a file, of another version, truncated, altered, beyond a limit.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    raw = file.read(PRELUDE.size)
    if raw[: len(MAGIC)] != MAGIC[: len(raw)] or not raw:
        raise StorageError("is not a .laconic file", hint=f"it begins with {raw[:8]!r}")
    if len(raw) < PRELUDE.size:
        raise _truncated(length, f"at least {PRELUDE.size}")
    _, version, coding, stored, size, checksum, data, _ = PRELUDE.unpack(raw)
    if version not in VERSIONS:
        raise StorageError(
            f"is of format version {version}, this Laconic reads 1 to {VERSIONS[-1]}",
            hint="open it with the version of Laconic that wrote it",
        )
    layout = Layout(stored, data)
    if stored > limits.header_bytes:
        raise StorageError(f"the header claims {stored} bytes, the limit is {limits.header_bytes}")
    if length < layout.total:
        raise _truncated(length, str(layout.total))
    if length > layout.total:
        raise StorageError(f"has {length - layout.total} bytes behind its end")
    packed = file.read(stored)
    if zlib.crc32(packed) != checksum:
        raise StorageError(f"altered: the header (bytes 64 to {layout.start - 1}) is damaged")
    return header.unpack(coding, packed, size, limits), layout


def _truncated(found: int, expected: str) -> StorageError:
    return StorageError(
        f"truncated: found {found} bytes, expected {expected}", hint="copy or save it again"
    )


def verify(file: BinaryIO, layout: Layout, tensors: Sequence[tuple[str, int]]) -> None:
    """Compare every byte with the hash; the tensors are (name, bytes) in the order of the data.

    Raises:
        StorageError: names the damaged stretch and the tensors in it.
    """
    file.seek(0)
    prelude = file.read(PRELUDE.size)
    digest = hashlib.sha256(prelude[:_UNHASHED])
    digest.update(file.read(layout.header_stored))
    found: list[int] = []
    left = layout.data
    while left:
        piece = file.read(min(left, _PIECE))
        if not piece:
            raise _truncated(file.tell(), str(layout.total))
        digest.update(piece)
        found += [zlib.crc32(piece[at : at + CHUNK]) for at in range(0, len(piece), CHUNK)]
        left -= len(piece)
    table = file.read(_CHECKSUM * layout.chunks)
    digest.update(table)
    if digest.digest() == prelude[_UNHASHED:]:
        return
    expected = [value for (value,) in struct.iter_unpack("<I", table)]
    bad = [i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    place = _place(bad[0], layout, tensors) if bad else "prelude or checksums"
    raise StorageError(f"altered: {place} does not match the hash", hint="copy or save it again")


def _place(chunk: int, layout: Layout, tensors: Sequence[tuple[str, int]]) -> str:
    first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, layout.data)
    names: list[str] = []
    at = 0
    for name, size in tensors:
        if at < last and at + size > first:
            names.append(name)
        at += size
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"the data in bytes {layout.start + first} to {layout.start + last - 1} ({shown})"
