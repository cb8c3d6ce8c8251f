"""ONNX Runtime on the CPU: portable, quick to load, small in memory; fp32 and int8, no bf16.

Files are ONNX with QuantizeLinear/DequantizeLinear, which every vendor's runtime reads. Integer
kernels are used where a convolution or matrix product has DequantizeLinear on both inputs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from laconic.core.errors import ExportError
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


class OnnxRuntime(Runtime):
    """See the module's docstring."""

    name: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "int8")

    def check(self, program: Program, precision: Precision = "fp32") -> list[str]:
        if precision == "bf16":
            return ["ONNX Runtime has no bf16 kernels for CPUs: use openvino or inductor"]
        return check_precision(self, program, precision) + refusals(program)

    def write(
        self,
        program: Program,
        path: Path,
        precision: Precision = "fp32",
        *,
        branches: bool = False,
    ) -> Path:
        """Write `path`; with `branches` the graph leaves out what no row of a batch needs."""
        self.demand(program, precision)
        return write_onnx(program, path, branches)

    def load(
        self,
        path: Path,
        precision: Precision = "fp32",
        threads: int | None = None,
        shapes: Shapes | None = None,
    ) -> Runner:
        """Open an ONNX file; `shapes` are not needed: kernels take any size at no cost."""
        import onnxruntime as ort

        del shapes
        ort.disable_telemetry_events()  # does nothing on Linux, where there is none
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or cores()
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if precision != "int8":
            # products with integer weights would otherwise put their inputs on 8 bits in silence
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  onnxruntime's errors share no public base
            first = str(error).strip().splitlines()[0]
            raise ExportError(f"ONNX Runtime refuses it: {first}", where=str(path)) from error
        conditions = {
            "runtime": self.name,
            "version": ort.__version__,
            "precision": precision,
            "threads": options.intra_op_num_threads,
        }
        return _Runner(session, conditions)


class _Runner(Runner):
    def __init__(self, session: Any, conditions: dict[str, Any]) -> None:
        self.session = session
        self.inputs = tuple(value.name for value in session.get_inputs())
        self.conditions = conditions

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        feed = dict(zip(self.inputs, inputs, strict=True))
        try:
            return checked(self.session.run(None, feed), "onnxruntime")
        except Exception as error:  # noqa: BLE001  see load
            first = str(error).strip().splitlines()[0]
            raise ExportError(f"refuses the inputs: {first}", where="onnxruntime") from error
