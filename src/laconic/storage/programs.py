"""A Program to a `.laconic` file and back."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.errors import LaconicError, StorageError
from laconic.forms import levels
from laconic.forms.operators import STORED
from laconic.program.program import (
    COMBINE,
    DEQUANTIZE,
    HASHED,
    LEVELS,
    LOOKUP,
    VECTORS,
    Program,
)
from laconic.program.signature import Signature
from laconic.storage import codecs, container, directory, graphs, shapes
from laconic.storage.directory import Entry
from laconic.storage.limits import DEFLATE_EXPANSION, Limits

Json = Any
_MALFORMED = (
    KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RuntimeError,
    RecursionError, SyntaxError, AssertionError,
)  # fmt: skip
_TOTAL_SLACK = 64 << 20
# operator that stands for a form → the roles of its tensors, and where its axis stands, if it does
_PARTS: dict[Any, tuple[tuple[str, ...], int | None]] = {
    DEQUANTIZE: (("affine.codes", "affine.scale", "affine.zero_point"), 3),
    LEVELS: (("levels.codes", "levels.scale"), 2),
    LOOKUP: (("codebook.codes", "codebook.values"), 2),
    COMBINE: (("basis.coefficients", "basis.basis"), None),
    VECTORS: (("vectors.codes", "vectors.values"), None),
    HASHED: (("hashed.values",), None),
}


@dataclass(frozen=True)
class SizeReport:
    """What a Program takes on disk, in bytes; exact.

    Attributes:
        tensors: name → bytes of its data.
        header: everything that is not tensor data: prelude, graph and names, checksums.
        total: the whole file.
    """

    tensors: Mapping[str, int]
    header: int
    total: int


def save(
    program: Program, path: str | os.PathLike[str], *, extra: Mapping[str, Json] | None = None
) -> int:
    """Write a Program as one file, whole or not at all.

    Integer weights (a frozen Program) are entropy-coded; floats are kept bit for bit. What is
    read back is in eval mode; gradients and the values of the example inputs are not stored.

    Args:
        program: left as it is.
        path: an earlier file there is replaced once the new one is complete.
        extra: plain JSON to keep with it; `read_header(path)["extra"]` gives it back.

    Returns:
        bytes on disk, the same as `predict(program, extra=extra).total`.

    Raises:
        StorageError: an operator that is not on the list, a tensor without plain bytes, or a
            disk that is full; the earlier file is then untouched.
    """
    content, data = _compose(program, extra)
    return container.write(Path(path), container.assemble(content, data, codecs.version(data)))


def predict(program: Program, *, extra: Mapping[str, Json] | None = None) -> SizeReport:
    """The bytes that `save` would write, by doing everything but writing.

    Raises:
        StorageError: as `save`.
    """
    content, data = _compose(program, extra)
    parts = container.assemble(content, data, codecs.version(data))
    total = sum(len(part) for part in parts)
    sizes = {row[0]: len(part) for row, part in zip(content["tensors"], data, strict=True)}
    return SizeReport(sizes, total - sum(sizes.values()), total)


def read_header(path: str | os.PathLike[str], *, limits: Limits | None = None) -> dict[str, Json]:
    """The header of a file as plain data, after its checksum; `docs/format.md` lists the fields.

    Raises:
        StorageError: not such a file, truncated, altered, or beyond a limit.
    """
    try:
        with Path(path).open("rb") as file:
            return container.read_prelude(file, limits or Limits())[0]
    except LaconicError as error:
        raise _at(path, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def load(path: str | os.PathLike[str], *, limits: Limits | None = None) -> Program:
    """A Program from its file; computes nothing of it and needs none of the model's source code.

    The example inputs are zeros of the stored shapes. Record classes come back as
    `signature.Record`.

    Raises:
        StorageError: not such a file, of another version, truncated, altered, beyond a limit, or
            with an operator that is not on the list.
    """
    limits = limits or Limits()
    try:
        with Path(path).open("rb") as file:
            content, layout = container.read_prelude(file, limits)
            entries = directory.read(content, layout.data, limits)
            _check_total(entries, layout.total, limits)
            container.verify(file, layout, [(e.name, e.size) for e in entries])
            file.seek(layout.start)
            tensors = {
                entry.name: directory.decode(entry, file.read(entry.size)) for entry in entries
            }
        return _program(content, entries, tensors, limits)
    except LaconicError as error:
        raise _at(path, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except MemoryError as error:
        raise StorageError("does not fit into memory", where=str(path)) from error
    except _MALFORMED as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise StorageError(f"the header is malformed ({what})", where=str(path)) from error


def _at(path: str | os.PathLike[str], error: LaconicError) -> StorageError:
    place = f"{path}: {error.where}" if error.where else str(path)
    return StorageError(error.message, where=place, hint=error.hint)


def _unreadable(path: str | os.PathLike[str], error: OSError) -> StorageError:
    return StorageError(f"cannot be read: {error.strerror or error}", where=str(path))


def _check_total(entries: list[Entry], file_bytes: int, limits: Limits) -> None:
    total = sum(entry.decoded for entry in entries)
    if total > limits.decoded_bytes:
        raise StorageError(
            f"the tensors take {total} bytes, the limit is {limits.decoded_bytes}",
            hint="pass larger limits if you trust the file",
        )
    if total > DEFLATE_EXPANSION * file_bytes + _TOTAL_SLACK:
        raise StorageError(f"{file_bytes} bytes claim to hold {total}: a decompression bomb")


def _compose(
    program: Program, extra: Mapping[str, Json] | None
) -> tuple[dict[str, Json], list[bytes]]:
    """The header's content, and the data of each tensor."""
    tensors = dict(program.tensors())
    graph = graphs.to_json(program.graph, list(tensors))
    roles = _roles(program)
    rows: list[list[Json]] = []
    data: list[bytes] = []
    for name, tensor in tensors.items():
        role, axis = roles.get(name, ("dense", 0))
        row, coded = directory.encode(name, tensor, role, axis)
        rows.append(row)
        data.append(coded)
    content = {
        "laconic": _version(),
        **graph,
        "tensors": rows,
        "inputs": [[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in program.example],
        "signature": program.signature.to_json(),
        "dynamic": {name: dict(dims) for name, dims in program.dynamic.items()},
        "aliases": dict(program.aliases),
        "lost": list(program.lost),
        "extra": dict(extra or {}),
    }
    if program.sparse:
        content["sparse"] = sorted(program.sparse)
    return content, data


def _version() -> str:
    """Of the Laconic that writes; "unknown" where it runs without being installed."""
    try:
        return version("laconic")
    except PackageNotFoundError:
        return "unknown"


def _roles(program: Program) -> dict[str, tuple[str, int]]:
    """What part of which form a tensor is, and the axis of its scales."""
    roles: dict[str, tuple[str, int]] = {}
    for node in program.graph.nodes:
        if node.target not in _PARTS:
            continue
        parts, place = _PARTS[node.target]
        axis: object = 0
        if place is not None:
            axis = node.args[place] if len(node.args) > place else node.kwargs.get("axis")
        for source, part in zip(node.args, parts, strict=False):
            if isinstance(source, torch.fx.Node) and source.op == "get_attr":
                roles[str(source.target)] = (part, axis if isinstance(axis, int) else 0)
    return roles


def _sparse(names: Json, held: Mapping[str, Tensor]) -> list[str]:
    """Names of sparse tensors, each one a stored tensor.

    Raises:
        StorageError: a name that the file holds no tensor of.
    """
    for name in names:
        if name not in held:
            raise StorageError(f"the sparse tensor {str(name)[:80]!r} is not in the file")
    return list(names)


def _program(
    content: Mapping[str, Json],
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    limits: Limits,
) -> Program:
    graph = graphs.from_json(content, list(tensors))
    held: dict[str, Tensor] = {}
    for entry in entries:
        tensor = tensors[entry.name]
        if entry.kind != "b":
            tensor = nn.Parameter(tensor, requires_grad=entry.kind == "p")
        held[entry.name] = tensor
    example = directory.inputs(content["inputs"], limits)
    places = [node.name for node in graph.nodes if node.op == "placeholder"]
    if len(places) != len(example):
        raise StorageError(f"{len(places)} placeholders, {len(example)} inputs")
    signature = Signature.from_json(content["signature"])
    outputs = len(graph.output_node().args[0])  # type: ignore[arg-type]
    directory.check_signature(signature, len(example), outputs)
    program = Program(
        graph,
        held,
        signature,
        example,
        dynamic=directory.dynamic(content["dynamic"], dict(zip(places, example, strict=True))),
        aliases=directory.aliases(content["aliases"], held),
        lost=[str(note) for note in content["lost"]],
        sparse=_sparse(content.get("sparse", []), held),
    )
    shapes.propagate(program)
    _check_made(program, sum(entry.decoded for entry in entries), limits)
    _check_codes(program)
    program.recompile()
    return program


def _check_made(program: Program, stored: int, limits: Limits) -> None:
    """Refuse forms that stand for more than a file may hold decoded.

    Raises:
        StorageError: names the node that goes beyond the limit.
    """
    total = stored
    for node in program.graph.nodes:
        if node.target in STORED:
            total += math.prod(node.meta["shape"]) * node.meta["dtype"].itemsize
            if total > limits.decoded_bytes:
                raise StorageError(
                    f"the tensors and what they stand for take {total} bytes and more, the limit "
                    f"is {limits.decoded_bytes}",
                    where=node.name,
                    hint="pass larger limits if you trust the file",
                )


def _check_codes(program: Program) -> None:
    """Refuse numbers that point beyond what they choose from.

    Raises:
        StorageError: names the tensor, what was found and what there is.
    """
    for node in program.graph.nodes:
        if node.target not in (LEVELS, LOOKUP, VECTORS) or any(
            s.op != "get_attr" for s in node.args[:2]
        ):
            continue
        codes, values = (program.tensor(str(source.target)) for source in node.args[:2])
        first = 0
        if node.target is LEVELS:
            count = len(levels.values(str(node.args[3])))
        else:
            count = len(values)
        if node.target is LOOKUP:
            first, count = int(node.args[4]), values.shape[-1]
            codes = codes[codes != 0] if node.args[5] else codes
        if not codes.numel():
            continue
        least, most = int(codes.min()), int(codes.max())
        if least < first or most >= first + count:
            raise StorageError(
                f"numbers from {least} to {most} of values that are numbered "
                f"{first} to {first + count - 1}",
                where=str(node.args[0].target),
            )
