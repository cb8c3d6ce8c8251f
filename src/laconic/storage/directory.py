"""The header's lists: tensors, inputs, signature; each entry checked before it is believed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.errors import StorageError
from laconic.program.signature import Signature
from laconic.storage import codecs
from laconic.storage.limits import Limits

Json = Any
KINDS = ("p", "f", "b")
_FORMATS = {
    "channels_last": (4, torch.channels_last),
    "channels_last_3d": (5, torch.channels_last_3d),
}
_STRUCTURES = ("tensor", "constant", "tuple", "list", "dict", "record")
_LARGEST_SIZE = 1 << 48
_LARGEST_RANK = 64


@dataclass(frozen=True)
class Entry:
    """One stored tensor.

    Attributes:
        name: its path in the Program.
        kind: "p" a parameter, "f" a parameter that takes no gradient, "b" a buffer.
        dtype: of its elements.
        shape: of the tensor.
        size: bytes of its data in the file.
        role: form and part, for example "affine.codes"; "dense" for the tensor itself.
        layout: memory format, or None for row-major.
    """

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int
    role: str
    layout: str | None

    @property
    def decoded(self) -> int:
        """Bytes in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


def encode(name: str, tensor: Tensor, role: str, axis: int) -> tuple[list[Json], bytes]:
    """The directory's row and the data of one tensor.

    Raises:
        StorageError: a dtype, layout or name that cannot be stored.
    """
    check_name(name)
    try:
        data = codecs.encode(tensor, axis)
    except StorageError as error:
        raise StorageError(error.message, where=name, hint=error.hint) from error
    kind = "b"
    if isinstance(tensor, nn.Parameter):
        kind = "p" if tensor.requires_grad else "f"
    dtype = str(tensor.dtype).removeprefix("torch.")
    row: list[Json] = [name, kind, dtype, list(tensor.shape), len(data)]
    layout = _layout(tensor)
    if role != "dense" or layout:
        row.append(role)
    return [*row, layout] if layout else row, data


def _layout(tensor: Tensor) -> str | None:
    if tensor.is_contiguous():
        return None
    for name, (rank, form) in _FORMATS.items():
        if tensor.ndim == rank and tensor.is_contiguous(memory_format=form):
            return name
    return None


def read(content: Mapping[str, Json], data: int, limits: Limits) -> list[Entry]:
    """The stored tensors.

    Raises:
        StorageError: malformed, or beyond a limit.
    """
    rows, nodes = content["tensors"], content["nodes"]
    if len(rows) > limits.tensors:
        raise StorageError(f"holds {len(rows)} tensors, the limit is {limits.tensors}")
    if len(nodes) > limits.nodes:
        raise StorageError(f"holds {len(nodes)} nodes, the limit is {limits.nodes}")
    entries = [_entry(row) for row in rows]
    if len({entry.name for entry in entries}) != len(entries):
        raise StorageError("two tensors have the same name")
    found = sum(entry.size for entry in entries)
    if found != data:
        raise StorageError(f"the tensors take {found} bytes, the file holds {data}")
    return entries


def _entry(row: Sequence[Json]) -> Entry:
    name, kind, dtype, shape, size, *more = row
    check_name(name)
    role: Json = more[0] if more else "dense"
    layout: Json = more[1] if len(more) > 1 else None
    good = kind in KINDS and isinstance(role, str) and type(size) is int and size >= 0
    if not good or dtype not in codecs.DTYPES or layout not in (None, *_FORMATS):
        raise StorageError(f"malformed entry {str(row)[:200]}", where=name)
    entry = Entry(name, kind, codecs.DTYPES[dtype], sizes(shape), size, role, layout)
    if layout and len(entry.shape) != _FORMATS[layout][0]:
        raise StorageError(f"{layout} for a tensor of rank {len(entry.shape)}", where=name)
    if kind == "p" and not (entry.dtype.is_floating_point or entry.dtype.is_complex):
        raise StorageError(f"a trained parameter of {entry.dtype}", where=name)
    return entry


def check_name(name: Json) -> None:
    """Refuse what cannot be the path of a tensor: it becomes part of Python source.

    Raises:
        StorageError: not a path of plain words.
    """
    parts = name.split(".") if isinstance(name, str) and len(name) <= 1000 else [""]
    plain = all(part and part.isprintable() and not set(part) & set("\"'\\{}") for part in parts)
    if not plain or any(part.startswith("__") for part in parts):
        raise StorageError(f"{str(name)[:80]!r} is not a name for a tensor")


def sizes(shape: Json) -> tuple[int, ...]:
    """A shape, checked.

    Raises:
        StorageError: not a list of sizes, or beyond all reason.
    """
    good = isinstance(shape, list) and len(shape) <= _LARGEST_RANK
    if not good or not all(type(n) is int and n >= 0 for n in shape):
        raise StorageError(f"{str(shape)[:80]} is not a shape")
    if math.prod(max(1, n) for n in shape) > _LARGEST_SIZE:
        raise StorageError(f"a shape of {shape} elements is beyond all reason")
    return tuple(shape)


def decode(entry: Entry, data: bytes) -> Tensor:
    """One tensor from its data.

    Raises:
        StorageError: the data are not those of such a tensor; names it.
    """
    try:
        if data:
            codecs.check_size(len(data), data[0], entry.decoded)
        tensor = codecs.decode(data, entry.dtype, entry.shape)
    except StorageError as error:
        raise StorageError(error.message, where=entry.name, hint=error.hint) from error
    if entry.layout:
        tensor = tensor.contiguous(memory_format=_FORMATS[entry.layout][1])
    return tensor


def inputs(rows: Sequence[Json], limits: Limits) -> list[Tensor]:
    """Example inputs: zeros of the stored shapes.

    Raises:
        StorageError: not shapes and dtypes, or beyond the limit.
    """
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
    for shape, dtype in rows:
        if dtype not in codecs.DTYPES:
            raise StorageError(f"unknown dtype {str(dtype)[:80]!r} of an input")
        shapes.append((sizes(shape), codecs.DTYPES[dtype]))
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
    if total > limits.input_bytes:
        raise StorageError(f"example inputs of {total} bytes, the limit is {limits.input_bytes}")
    return [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]


def dynamic(data: Mapping[str, Json], places: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Which dimensions of which inputs may change.

    Raises:
        StorageError: an input or dimension that is not there.
    """
    found: dict[str, dict[int, str]] = {}
    for name, dims in data.items():
        given = {int(dim): str(word) for dim, word in dims.items()}
        if name not in places or any(not 0 <= dim < places[name].ndim for dim in given):
            raise StorageError(f"dynamic dimensions {given} of {name!r}, which has no such ones")
        found[name] = given
    return found


def aliases(data: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Other names of tied tensors.

    Raises:
        StorageError: a name that is taken, or of a tensor that is not there.
    """
    for alias, name in data.items():
        check_name(alias)
        if name not in tensors or alias in tensors:
            raise StorageError(f"{alias!r} cannot stand for {str(name)[:80]!r}")
    return dict(data)


def check_signature(signature: Signature, inputs: int, outputs: int) -> None:
    """Refuse a signature whose structures are malformed or name tensors that are not there.

    Raises:
        StorageError: says which.
    """
    if signature.inputs != inputs:
        raise StorageError(f"a signature of {signature.inputs} inputs for {inputs}")
    for structure in signature.arguments.values():
        _check_structure(structure, inputs)
    _check_structure(signature.output, outputs)
    if not all(isinstance(name, str) for name in signature.positional):
        raise StorageError("positional names that are not text")


def _check_structure(structure: Json, tensors: int) -> None:
    kind = next(
        (k for k in ("tensor", "constant", "tuple", "list", "dict", "record") if k in structure),
        None,
    )
    inner: Json = structure[kind] if kind else None
    if kind == "tensor":
        if type(inner) is not int or not 0 <= inner < tensors:
            raise StorageError(f"the signature names tensor {inner} of {tensors}")
    elif kind in ("tuple", "list", "dict", "record"):
        if kind == "record" and not isinstance(structure["class"], str):
            raise StorageError("a record without the name of its class")
        for item in inner.values() if kind in ("dict", "record") else inner:
            _check_structure(item, tensors)
    elif kind != "constant" or isinstance(inner, (list, dict)):
        raise StorageError(f"the signature holds {str(structure)[:80]}")
