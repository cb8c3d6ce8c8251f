"""OpenVINO on the CPU: fp32, bf16 and int8; on x86 usually the fastest of the three runtimes.

It reads the ONNX file (it is never let to trace a module) and can be given fixed shapes, for which
it compiles faster code. Integer kernels need quantisation nodes where OpenVINO expects them: on
the inputs of convolutions, matrix products and residual additions. bf16 files store their weights
in 16 bits. The package reports its import to its makers unless told not to; here it is kept from
loading the module that does so, and nothing on disk is changed.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from laconic.core.errors import ExportError
from laconic.core.whole_files import whole_file
from laconic.program.program import Program
from laconic.runtimes._onnx import write_onnx
from laconic.runtimes._onnx_operators import refusals
from laconic.runtimes.base import (
    Array,
    Precision,
    Runner,
    Runtime,
    Shapes,
    check_precision,
    checked,
    cores,
)

COMPILED = ".blob"
_LEAN = {"CACHE_MODE": "OPTIMIZE_SIZE"}  # compiled code without weights
_TELEMETRY = "openvino_telemetry"


def openvino() -> Any:
    """The package, imported without its telemetry (it has a stub for a missing module)."""
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    blocked: dict[str, Any] = sys.modules
    before = blocked.get(_TELEMETRY)
    blocked[_TELEMETRY] = None  # makes `import openvino_telemetry` an ImportError
    try:
        return importlib.import_module("openvino")
    finally:
        del blocked[_TELEMETRY]
        if before is not None:
            blocked[_TELEMETRY] = before


@cache
def core() -> Any:
    """The one `Core` of this process.

    On CPUs with AMX a Core gives the thread a signal stack of its own, and takes it away in the
    wrong order when several are alive: Ctrl-C then ends in a segmentation fault. One is never
    taken away (OpenVINO 2026.4; seen with sigaltstack).
    """
    return openvino().Core()


class OpenVino(Runtime):
    """See the module's docstring."""

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "bf16", "int8")

    def check(self, program: Program, precision: Precision = "fp32") -> list[str]:
        found = check_precision(self, program, precision) + refusals(program)
        if precision == "bf16" and "BF16" not in _property("OPTIMIZATION_CAPABILITIES"):
            found.append(f"this CPU has no bf16 instructions ({_property('FULL_DEVICE_NAME')})")
        return found

    def write(
        self,
        program: Program,
        path: Path,
        precision: Precision = "fp32",
        *,
        branches: bool = False,
    ) -> Path:
        """Write `path` (.xml) and its weights beside it (.bin).

        With `branches` the graph leaves out what no row of a batch needs.
        """
        self.demand(program, precision)
        ov = openvino()
        path = path.with_suffix(self.suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            source = write_onnx(program, Path(folder) / "model.onnx", branches)
            target = Path(folder) / path.name
            model = self._read(core(), source)
            try:
                ov.save_model(model, str(target), compress_to_fp16=precision == "bf16")
                target.with_suffix(".bin").replace(path.with_suffix(".bin"))
                target.replace(path)
            except (OSError, RuntimeError) as error:
                raise ExportError(f"cannot write: {error}", where=str(path)) from error
        return path

    def load(
        self,
        path: Path,
        precision: Precision = "fp32",
        threads: int | None = None,
        shapes: Shapes | None = None,
        code: Path | None = None,
    ) -> Runner:
        """Compile an .xml or .onnx file for this CPU.

        `code` is what `write_compiled` wrote for this file and these shapes; it is opened instead
        where it was made by this version, on such a CPU, and for as many threads.
        """
        settings = _settings(precision, threads)
        found = None if code is None else _imported(path, code, settings)
        compiled = found or self._compile(path, shapes, settings)
        inputs = tuple(value.get_any_name() for value in compiled.inputs)
        conditions = {
            "runtime": self.name,
            "version": openvino().get_version().split("-")[0],
            "precision": precision,
            "float": settings["INFERENCE_PRECISION_HINT"],
            "threads": settings["INFERENCE_NUM_THREADS"],
        }
        return _Runner(compiled, inputs, conditions)

    def write_compiled(
        self,
        path: Path,
        target: Path,
        precision: Precision,
        threads: int | None,
        shapes: Shapes | None,
    ) -> Path:
        """Compile `path` for `shapes` and write what came of it, without the weights, to `target`.

        The weights stay in the .bin beside `path`, which has to be the same when it is opened.

        Raises:
            ExportError: it cannot be written, or this version of OpenVINO has none without weights.
        """
        settings = _settings(precision, threads)
        try:
            if "ENABLE_WEIGHTLESS" not in _property("SUPPORTED_PROPERTIES"):
                raise RuntimeError("no compiled code without weights in this version")
            held = self._compile(path, shapes, settings | _LEAN).export_model()
            held = held.getvalue() if hasattr(held, "getvalue") else held
            with whole_file(target) as unfinished:
                unfinished.write_bytes(_origin(settings) + held)
        except (OSError, RuntimeError) as error:
            raise ExportError(f"cannot write: {_reason(error)}", where=str(target)) from error
        return target

    def _compile(self, path: Path, shapes: Shapes | None, settings: Mapping[str, Any]) -> Any:
        model = self._read(core(), path)
        try:
            if shapes:
                names = [value.get_any_name() for value in model.inputs]
                model.reshape({name: list(shapes[name]) for name in names if name in shapes})
            return _compiled(model, settings)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO refuses it: {_reason(error)}", where=str(path)) from error

    def files(self, path: Path) -> list[Path]:
        weights = path.with_suffix(".bin")
        return [path, weights] if path.suffix == self.suffix and weights.exists() else [path]

    @staticmethod
    def _read(core: Any, path: Path) -> Any:
        if not path.exists():
            raise ExportError("no such file", where=str(path))
        try:
            return core.read_model(str(path))
        except RuntimeError as error:
            raise ExportError(
                f"not a model OpenVINO can read: {_reason(error)}", where=str(path)
            ) from error


class _Runner(Runner):
    def __init__(self, compiled: Any, inputs: tuple[str, ...], conditions: dict[str, Any]) -> None:
        self.compiled = compiled
        self.inputs = inputs
        self.conditions = conditions
        self._request = compiled.create_infer_request()
        self._count = len(compiled.outputs)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        feed = dict(zip(self.inputs, map(np.ascontiguousarray, inputs), strict=True))
        try:
            found = self._request.infer(feed, share_inputs=True)
        except RuntimeError as error:
            raise ExportError(f"refuses the inputs: {_reason(error)}", where="openvino") from error
        return checked([found[position] for position in range(self._count)], "openvino")


def _settings(precision: Precision, threads: int | None) -> dict[str, Any]:
    """What a file is compiled and opened with."""
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or cores(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}.get(precision)
        or _native(core()),
    }
    if threads and threads < cores():
        # it pins its threads to the first cores, in every process the same ones: two processes
        # that ask for a part of the machine would share that part
        settings["ENABLE_CPU_PINNING"] = False
    if precision != "int8":
        # products with integer weights would otherwise put their inputs on 8 bits in silence
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    return settings


def _origin(settings: Mapping[str, Any]) -> bytes:
    """The first line of compiled code: what has to be the same where it is opened."""
    cpu = [_property("FULL_DEVICE_NAME"), *sorted(_property("OPTIMIZATION_CAPABILITIES"))]
    about = {"version": openvino().get_version(), "cpu": cpu, **settings}
    return json.dumps(about, sort_keys=True).encode() + b"\n"


def _imported(path: Path, code: Path, settings: Mapping[str, Any]) -> Any | None:
    """The compiled code of `path`; None where it was made for something else."""
    origin = _origin(settings)
    weights = {"WEIGHTS_PATH": str(path.with_suffix(".bin"))}
    try:
        held = code.read_bytes()
        if not held.startswith(origin):
            return None
        return core().import_model(held[len(origin) :], "CPU", {**settings, **_LEAN, **weights})
    except (RuntimeError, OSError):
        return None


def _compiled(model: Any, settings: Mapping[str, Any]) -> Any:
    """The model compiled, without fused loops where those are beyond OpenVINO.

    In 2026.4 that is an attention of its own boolean mask, as in a text model of one layer.
    """
    try:
        return core().compile_model(model, "CPU", dict(settings))
    except RuntimeError as error:
        if "loop IDs" not in str(error):
            raise
        return core().compile_model(model, "CPU", {**settings, "SNIPPETS_MODE": "DISABLE"})


def _native(core: Any) -> str:
    """The float type OpenVINO itself chooses on this CPU ("bf16" or "f32")."""
    kind = core.get_property("CPU", "INFERENCE_PRECISION_HINT")
    return kind.get_type_name() if hasattr(kind, "get_type_name") else str(kind)


def _property(name: str) -> Any:
    return core().get_property("CPU", name)


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message; the first ones name its source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
