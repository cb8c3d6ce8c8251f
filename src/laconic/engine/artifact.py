"""Open any file that Laconic writes, and run it: one door for every runtime."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laconic import runtimes, storage
from laconic.core.errors import DataError, ExportError, first_line
from laconic.core.suggest import nearest
from laconic.engine import buckets, dispatch
from laconic.engine.files import as_precision
from laconic.program.program import Program
from laconic.runtimes import _chain
from laconic.runtimes.base import Array, Precision, Runner, Runtime, Shapes, batch_of
from laconic.runtimes.openvino import core

EAGER = "eager"
_SEVERAL = (_chain.SUFFIX, buckets.SUFFIX)
"""Files that name others, which lie beside them."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file ready to run.

    Attributes:
        path: the file.
        inputs: names of its inputs, in order.
        outputs: names of its outputs, in order; empty where only running it tells how many.
        run: arrays in the order of `inputs` → arrays in the order of the outputs.
        conditions: runtime, precision, threads.
        program: the Program, for a `.laconic` file.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[Sequence[Array]], list[Array]]
    conditions: Mapping[str, Any]
    program: Program | None = None


def suffixes() -> dict[str, Runtime]:
    """File suffix → the runtime that writes it."""
    return {engine.suffix: engine for engine in map(runtimes.get, runtimes.names())}


def open_artifact(
    path: Path,
    *,
    runtime: str | None = None,
    precision: Precision = "fp32",
    threads: int | None = None,
    shapes: Shapes | None = None,
) -> Artifact:
    """Open a `.laconic`, `.onnx`, `.xml`, `.pt2`, `.chain` or `.buckets` file.

    Args:
        path: the file, or a folder with one `.chain` or `.buckets` file.
        runtime: which runtime runs it; by default the one that writes such files.
        precision: of float operators; a `.laconic` file always runs in fp32, a chain and
            buckets in what they were written for.
        threads: of the runtime.
        shapes: fixed input shapes by name.

    Raises:
        ExportError: no such file, an unknown suffix, or a file the runtime cannot open.
        StorageError: a `.laconic` file that is truncated or altered.
    """
    path = in_folder(path)
    if not path.exists():
        raise ExportError("no such file", where=str(path))
    if path.suffix == ".laconic":
        return of_program(storage.load(path), path)
    if path.suffix == _chain.SUFFIX:
        engine = runtimes.get(runtime or _chain.read(path).runtime)
        runner = _chain.load(path, engine, threads, shapes)
        return _running(runner, path)
    if path.suffix == buckets.SUFFIX:
        return _running(dispatch.load(path, threads), path)
    known = suffixes()
    if path.suffix not in known:
        raise ExportError(
            f"is of no known kind {path.suffix!r}",
            where=str(path),
            hint=nearest(path.suffix, [*known, ".laconic", *_SEVERAL]),
        )
    engine = runtimes.get(runtime) if runtime else known[path.suffix]
    return _running(engine.load(path, precision, threads, shapes), path)


def in_folder(path: Path) -> Path:
    """The file that says how the others of a folder belong together; a file is itself.

    Raises:
        ExportError: a folder with none, or several.
    """
    if not path.is_dir():
        return path
    found = [file for file in sorted(path.iterdir()) if file.suffix in _SEVERAL]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or f"no file ending in {_SEVERAL}"
        raise ExportError(f"is a folder with {names}: name the file", where=str(path))
    return found[0]


def _running(runner: Runner, path: Path) -> Artifact:
    return Artifact(
        path=path, inputs=runner.inputs, outputs=(), run=runner.run, conditions=runner.conditions
    )


def of_program(program: Program, path: Path) -> Artifact:
    """A Program itself, run by torch."""
    names = tuple(node.name for node in program.placeholders)

    def run(inputs: Sequence[Array]) -> list[Array]:
        try:
            with torch.no_grad():
                outputs = program.run_flat(*map(torch.from_numpy, inputs))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = first_line(error)
            raise DataError(f"the inputs do not fit: {reason}", where=str(path)) from error
        return [output.detach().numpy() for output in outputs]

    conditions = {"runtime": EAGER, "precision": "fp32", "threads": torch.get_num_threads()}
    return Artifact(
        path=path,
        inputs=names,
        outputs=output_names(program.signature.output),
        run=run,
        conditions=conditions,
        program=program,
    )


def output_names(structure: Mapping[str, Any]) -> tuple[str, ...]:
    """A name for every tensor of an output structure: the keys on the way to it."""
    found: dict[int, str] = {}
    _name_outputs(structure, "", found)
    return tuple(found[index] or "output" for index in sorted(found))


def _name_outputs(structure: Mapping[str, Any], path: str, found: dict[int, str]) -> None:
    if "tensor" in structure:
        found[structure["tensor"]] = path
        return
    nest = next((structure[k] for k in ("tuple", "list", "dict", "record") if k in structure), ())
    pairs = nest.items() if isinstance(nest, Mapping) else enumerate(nest)
    for key, item in pairs:
        own = f"output_{key}" if isinstance(key, int) else str(key)
        _name_outputs(item, f"{path}.{key}" if path else own, found)


def arrange(given: Mapping[str, Array], artifact: Artifact) -> list[Array]:
    """Named arrays in the order of the artifact's inputs.

    Raises:
        DataError: names that do not fit; with as many arrays as inputs and none of the names,
            they are taken in order.
    """
    wanted = artifact.inputs
    if all(name in given for name in wanted):
        return [np.ascontiguousarray(given[name]) for name in wanted]
    if len(given) == len(wanted) and not any(name in given for name in wanted):
        return [np.ascontiguousarray(array) for array in given.values()]
    missing = next(name for name in wanted if name not in given)
    raise DataError(
        f"has no array {missing!r}; {artifact.path.name} takes {', '.join(wanted)}",
        where="inputs",
        hint=nearest(missing, given) if given else "the file is empty",
    )


def declared_inputs(path: Path, batch: int) -> dict[str, Array]:
    """Noise of the shapes a file declares, its dynamic dimensions set to `batch`.

    Raises:
        DataError: the file does not say (a .pt2); give real inputs.
    """
    draw, path = np.random.default_rng(0), in_folder(path)
    if path.suffix == ".laconic":
        program = storage.load(path)
        names = [node.name for node in program.placeholders]
        pairs = zip(names, batch_of(program, batch), strict=True)
        return {name: _noise(draw, array.shape, array.dtype) for name, array in pairs}
    if path.suffix == _chain.SUFFIX:
        return _declared_by_chain(path, batch, draw)
    if path.suffix == buckets.SUFFIX:
        return buckets.read(path).declared(batch)
    if path.suffix not in (".onnx", ".xml"):
        raise DataError("does not say what inputs it takes", where=str(path), hint="give --input")
    if not path.exists():
        raise ExportError("no such file", where=str(path))
    try:
        model = core().read_model(str(path))
    except RuntimeError as error:
        raise ExportError("cannot be read", where=str(path)) from error
    found: dict[str, Array] = {}
    for value in model.inputs:
        sizes = [batch if dim.is_dynamic else dim.get_length() for dim in value.partial_shape]
        kind = np.dtype(value.element_type.to_dtype())
        found[value.get_any_name()] = _noise(draw, tuple(sizes), kind)
    return found


def _declared_by_chain(path: Path, batch: int, draw: np.random.Generator) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, declared in _chain.read(path).inputs.items():
        if declared is None:
            raise DataError(f"does not say what {name!r} is", where=str(path), hint="give --input")
        sizes = [batch if isinstance(size, str) else size for size in declared["shape"]]
        found[name] = _noise(draw, tuple(sizes), declared["dtype"])
    return found


def _noise(draw: np.random.Generator, shape: tuple[int, ...], kind: Any) -> Array:
    if np.dtype(kind).kind == "f":
        return draw.standard_normal(shape).astype(kind)
    return np.ones(shape, kind)


def every_way(
    path: Path,
    inputs: Mapping[str, Array],
    engines: Sequence[str] | None,
    kinds: Sequence[str] | None,
    threads: int | None,
) -> list[tuple[str, Artifact]]:
    """A file in each of its runtimes and precisions, compiled for the shapes of `inputs`.

    Raises:
        ExportError: it cannot be opened in any of them.
    """
    path = in_folder(path)
    if path.suffix == ".laconic":
        return [(f"{path} {EAGER}", open_artifact(path))]
    shapes = {name: array.shape for name, array in inputs.items()}
    able = list(engines) if engines and path.suffix == ".onnx" else [None]
    made: list[tuple[str, Artifact]] = []
    for engine in able:
        for kind in map(as_precision, kinds) if kinds else _kinds(path, engine):
            held = open_artifact(
                path, runtime=engine, precision=kind, threads=threads, shapes=shapes
            )
            made.append((f"{path} {held.conditions['runtime']} {kind}", held))
    return made


def _kinds(path: Path, engine: str | None) -> list[Precision]:
    """The precisions that make a difference for a file: int8 where it holds integers."""
    if path.suffix == _chain.SUFFIX:
        return [_chain.read(path).precision]
    if path.suffix == buckets.SUFFIX:
        return [buckets.read(path).precision]
    runtime = runtimes.get(engine) if engine else suffixes().get(path.suffix)
    if runtime is None or path.suffix == ".pt2":
        return ["fp32"]
    model = core().read_model(str(path))
    kinds = {op.get_type_name() for op in model.get_ops()}
    if kinds & {"FakeQuantize", "QuantizeLinear", "DequantizeLinear"}:
        return ["int8"]
    return [kind for kind in runtime.precisions if kind != "int8"]


def shipped_bytes(path: Path) -> int:
    """Bytes of a file and of what has to ship with it."""
    engine = suffixes().get(path.suffix)
    files = engine.files(path) if engine else [path]
    if path.suffix == _chain.SUFFIX:
        files = _chain.files(path)
    elif path.suffix == buckets.SUFFIX:
        files = buckets.read(path).files()
    return sum(file.stat().st_size for file in files)


def cosine(first: Array, other: Array) -> str:
    """Cosine between two outputs, for people; a dash where shapes differ."""
    if first.shape != other.shape:
        return "-"
    a, b = first.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return f"{float(a @ b) / length:.6f}" if length else "-"
