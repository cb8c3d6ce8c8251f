"""Where the time goes, layer by layer, as the runtime itself measures it.

Runtimes fuse operators and rename them. What they report is traced back to a node of the Program by
the names in the ONNX file: its values are called after the Program's nodes. What belongs to no node
(reorders, converted inputs) is counted under `OTHER`.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from laconic import runtimes
from laconic.core.errors import ExportError
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.runtimes.base import Precision, batch_of, cores, fixed_shapes

OTHER = "other"
_RUNS = 12
_WARM = 3
_HEAVY = ("conv", "matmul", "gemm", "fullyconnected", "attention", "sdpa")
_SUFFIX = re.compile(r"(_nchwc|_quant|_kernel_time|/WithoutBiases|/fq_.*|_fused.*)$")


def layer_times(
    program: Program,
    runtime: str,
    precision: Precision = "fp32",
    *,
    batch: int = 1,
    threads: int | None = None,
) -> dict[str, float]:
    """Median milliseconds by node name, `OTHER` included.

    Raises:
        ExportError: the runtime cannot run the Program, or reports no times (Inductor).
    """
    if runtime not in ("openvino", "onnxruntime"):
        raise ExportError("reports no times per layer", where=runtime, hint="use openvino")
    names = _Names(program)
    with tempfile.TemporaryDirectory(prefix="laconic-") as folder:
        path = runtimes.get("onnxruntime").write(
            program, Path(folder) / "model.onnx", "int8" if precision == "int8" else "fp32"
        )
        names.read(path)
        measure = _openvino if runtime == "openvino" else _onnxruntime
        rounds = measure(program, path, precision, batch, threads or cores())
        found = [names.gather(each) for each in rounds]
    nodes = dict.fromkeys(name for each in found for name in each)
    return {name: float(np.median([each.get(name, 0.0) for each in found])) for name in nodes}


class _Names:
    """From a runtime's name for a piece of work to a node of the Program."""

    def __init__(self, program: Program) -> None:
        self.heavy = {row.node for row in cost(program).rows if row.macs}
        self.nodes: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes}
        self._known: dict[str, str] = {}
        flat: Any = program.output_node.args[0]
        for place, node in enumerate(flat):
            if isinstance(node, fx.Node):
                self._known["output" if len(flat) == 1 else f"output_{place}"] = node.name

    def read(self, path: Path) -> None:
        """Learn the names of an ONNX file's nodes from the values they give."""
        import onnx

        for node in onnx.load(str(path), load_external_data=False).graph.node:
            for value in node.output:
                owner = self._known.get(value, value)
                if owner in self.nodes:
                    self._known[node.name] = self._known[value] = owner

    def gather(self, pieces: Iterable[tuple[str, str, float]]) -> dict[str, float]:
        """Sum `(names, kind, milliseconds)` by node."""
        total: dict[str, float] = {}
        for text, kind, milliseconds in pieces:
            place = self._place(text.split(","), kind)
            total[place] = total.get(place, 0.0) + milliseconds
        return total

    def _place(self, words: list[str], kind: str) -> str:
        nodes = [self.nodes[owner] for word in words if (owner := self._owner(word))]
        for node in nodes:
            if node.name in self.heavy:
                return node.name
        if nodes and any(part in kind.lower() for part in _HEAVY):
            return self._above(nodes[0])
        return nodes[0].name if nodes else OTHER

    def _owner(self, word: str) -> str:
        for _ in range(4):
            for name in (word, word.removeprefix("node_")):
                if name in self._known:
                    return self._known[name]
                if name in self.nodes:
                    return name
            shorter = _SUFFIX.sub("", word)
            if shorter == word:
                return ""
            word = shorter
        return ""

    def _above(self, node: fx.Node) -> str:
        """The convolution or product that an activation was fused into."""
        current = node
        for _ in range(8):
            if current.name in self.heavy:
                return current.name
            above = [n for n in current.all_input_nodes if n.op == "call_function"]
            if not above:
                break
            current = above[0]
        return node.name


def _openvino(
    program: Program, path: Path, precision: Precision, batch: int, threads: int
) -> list[list[tuple[str, str, float]]]:
    from laconic.runtimes.openvino import core

    model = core().read_model(str(path))
    inputs = [value.get_any_name() for value in model.inputs]
    shapes = fixed_shapes(program, batch)
    settings: dict[str, Any] = {
        "PERF_COUNT": True,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    if precision != "int8":
        settings["INFERENCE_PRECISION_HINT"] = {"fp32": "f32"}.get(precision, precision)
    try:
        model.reshape({name: list(shapes[name]) for name in inputs})
        compiled = core().compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO refuses it: {error}", where="openvino") from error
    request = compiled.create_infer_request()
    feed = dict(zip(inputs, batch_of(program, batch), strict=True))
    fused: dict[str, str] = {}
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        if "originalLayersNames" in info:
            fused[op.get_friendly_name()] = _text(info["originalLayersNames"])
    rounds: list[list[tuple[str, str, float]]] = []
    for number in range(_WARM + _RUNS):
        request.infer(feed)
        if number >= _WARM:
            rounds.append(
                [
                    (fused.get(i.node_name, "") or i.node_name, i.node_type, 1e3 * seconds)
                    for i in request.profiling_info
                    if (seconds := i.real_time.total_seconds())
                ]
            )
    return rounds


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value.astype(str))


def _onnxruntime(
    program: Program, path: Path, precision: Precision, batch: int, threads: int
) -> list[list[tuple[str, str, float]]]:
    import onnxruntime as ort

    del precision
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_name("times"))
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = dict(zip(names, batch_of(program, batch), strict=True))
    for _ in range(_WARM + _RUNS):
        session.run(None, feed)
    events: list[Mapping[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    rounds: list[list[tuple[str, str, float]]] = []
    for event in events:
        if event.get("name") == "model_run":
            continue
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = str(event["args"].get("op_name", ""))
            piece = (str(event["name"]), kind, event["dur"] / 1e3)
            if not rounds or piece[0] in {held[0] for held in rounds[-1]}:
                rounds.append([])
            rounds[-1].append(piece)
    return rounds[_WARM:]


def weight_of(program: Program, tensors: Iterable[str]) -> Tensor | None:
    """The largest stored tensor of a row: what a person calls the layer's weight."""
    held = [program.tensor(name) for name in tensors]
    return max(held, key=torch.numel) if held else None
