"""Inductor: the Program compiled ahead of time to machine code in a torch package (.pt2).

For staying inside torch, and for operators that ONNX lacks. fp32, bf16 (autocast; weights are
stored in 16 bits) and int8: convolutions and linear layers between quantisation nodes run on
oneDNN's integer kernels, the rest in fp32. In fp32 and bf16 quantisation nodes are computed in
float. Layers whose weights and inputs are signs run on a kernel of ours. A package holds one thread
count and one batch size, or any batch at some cost in speed; building needs a C++ compiler and
takes about ten seconds for a small network.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from laconic.core.errors import ExportError, first_line
from laconic.forms import affine, levels
from laconic.program.program import (
    DEQUANTIZE,
    DYNAMIC_QUANTIZE,
    FAKE_LEVELS,
    FAKE_QUANTIZE,
    Program,
)
from laconic.runtimes._binary_graph import replace_binary
from laconic.runtimes._export import attribute, export, fetch, is_tensor, lower_weights
from laconic.runtimes._inductor_int8 import missing, spell_activation, spell_weight
from laconic.runtimes._inductor_range import spell_out_range
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


class Inductor(Runtime):
    """See the module's docstring."""

    name: ClassVar[str] = "inductor"
    suffix: ClassVar[str] = ".pt2"
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "bf16", "int8")

    def check(self, program: Program, precision: Precision = "fp32") -> list[str]:
        found = check_precision(self, program, precision)
        if precision == "int8" and missing():
            found.append(missing())
        compiler = os.environ.get("CXX", "g++")
        if not any(shutil.which(name) for name in (compiler, "g++", "clang++", "cl")):
            found.append("building needs a C++ compiler (g++ or clang++), and none is installed")
        return found

    def write(
        self,
        program: Program,
        path: Path,
        precision: Precision = "fp32",
        threads: int | None = None,
        shapes: Shapes | None = None,
    ) -> Path:
        """Compile `program`; see `Runtime.write`.

        Args:
            program: what to compile.
            path: the package, .pt2.
            precision: fp32, bf16, or int8.
            threads: the thread count compiled in; None means all cores. Loading with another
                count is refused, because the code would be slow.
            shapes: fixed input shapes, for faster code; None keeps dynamic dimensions dynamic.
        """
        self.demand(program, precision)
        path = path.with_suffix(self.suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        threads = threads or cores()
        about = {"threads": threads, "precision": precision, "inputs": _names(program)}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            target = Path(folder) / path.name
            exported = _exported(program, precision, shapes, threads)
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch._inductor.aoti_compile_and_package(
                        exported,
                        package_path=str(target),
                        inductor_configs={
                            "freezing": True,
                            "cpp.threads": threads,
                            "aot_inductor.metadata": {"laconic": json.dumps(about)},
                        },
                    )
                target.replace(path)
            except (OSError, RuntimeError, AssertionError, TypeError, ValueError) as error:
                reason = first_line(error)
                raise ExportError(f"Inductor cannot build it: {reason}", where=str(path)) from error
        return path

    def load(
        self,
        path: Path,
        precision: Precision = "fp32",
        threads: int | None = None,
        shapes: Shapes | None = None,
    ) -> Runner:
        """Load a package; precision, threads and shapes are what it was built for.

        Raises:
            ExportError: it was built for another thread count or precision, or is no package.
        """
        del shapes
        try:
            package = torch._inductor.aoti_load_package(str(path))
            about = json.loads(package.get_metadata()["laconic"])
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            reason = first_line(error)
            raise ExportError(f"no Inductor package: {reason}", where=str(path)) from error
        wanted = {"precision": precision, "threads": threads or about["threads"]}
        for key, value in wanted.items():
            if about[key] != value:
                raise ExportError(
                    f"built for {key} {about[key]}, asked for {value}",
                    where=str(path),
                    hint="write the package again for it",
                )
        conditions = {"runtime": self.name, "version": str(torch.__version__), **wanted}
        return _Runner(package, tuple(about["inputs"]), conditions)


class _Runner(Runner):
    def __init__(self, package: Any, inputs: tuple[str, ...], conditions: dict[str, Any]) -> None:
        self.package = package
        self.inputs = inputs
        self.conditions = conditions

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
        try:
            with torch.no_grad():
                outputs: Any = self.package(*tensors)
        except RuntimeError as error:
            reason = first_line(error)
            raise ExportError(f"refuses the inputs: {reason}", where="inductor") from error
        every = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return checked([output.numpy() for output in every], "inductor")


def _names(program: Program) -> list[str]:
    return [node.name for node in program.placeholders]


def _exported(program: Program, precision: Precision, shapes: Shapes | None, threads: int) -> Any:
    module = lower_weights(program, lambda graph: replace_binary(graph, threads))
    for node in list(module.graph.nodes):
        if node.target is DEQUANTIZE:
            if precision != "int8" or not spell_weight(module, node):
                _constant(module, node)
        elif node.target is FAKE_QUANTIZE:
            if precision != "int8" or not spell_activation(module, node):
                _spell_out(module.graph, node)
        elif node.target is FAKE_LEVELS:
            _spell_out_levels(module, node)
        elif node.target is DYNAMIC_QUANTIZE:
            spell_out_range(module.graph, node)
    if precision == "bf16":
        _halve(module.graph, program)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    if shapes is None:
        return export(module, program)
    return export(module, program, [tuple(shapes[name]) for name in _names(program)])


def _constant(module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a `dequantize` of stored codes by its value; of computed codes by aten operators."""
    sources: Any = node.args[:3]
    axis: Any = node.args[3]
    if not all(is_tensor(source) for source in sources):
        raise ExportError("codes are computed in the graph", where=node.name)
    codes, scale, zero_point = (fetch(module, source.target) for source in sources)
    value = affine.decode(codes, scale.detach(), zero_point, axis)
    with module.graph.inserting_before(node):
        made = attribute(module, f"{sources[0].target}_decoded", value)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _spell_out(graph: fx.Graph, node: fx.Node) -> None:
    """Fake quantisation in aten operators, which Inductor fuses; opaque it would stand apart."""
    aten = torch.ops.aten
    arguments: Any = node.args
    x, scale, zero_point, axis, low, high = arguments
    with graph.inserting_before(node):
        if axis is not None:
            shape = [1] * len(node.meta["shape"])
            shape[axis] = -1
            scale = graph.call_function(aten.reshape.default, (scale, shape))
            zero_point = graph.call_function(aten.reshape.default, (zero_point, shape))
        zero_point = graph.call_function(aten.to.dtype, (zero_point, torch.float32))
        made = graph.call_function(aten.div.Tensor, (x, scale))
        made = graph.call_function(aten.round.default, (made,))
        made = graph.call_function(aten.add.Tensor, (made, zero_point))
        made = graph.call_function(aten.clamp.default, (made, low, high))
        made = graph.call_function(aten.sub.Tensor, (made, zero_point))
        made = graph.call_function(aten.mul.Tensor, (made, scale))
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _spell_out_levels(module: fx.GraphModule, node: fx.Node) -> None:
    """The nearest of fixed levels in aten operators."""
    aten, graph = torch.ops.aten, module.graph
    arguments: Any = node.args
    x, scale, axis, name = arguments
    with graph.inserting_before(node):
        if axis is not None:
            shape = [1] * len(node.meta["shape"])
            shape[axis] = -1
            scale = graph.call_function(aten.reshape.default, (scale, shape))
        tables = [
            attribute(module, f"levels_{name}_{kind}", torch.tensor(values))
            for kind, values in (("edges", levels.borders(name)), ("values", levels.values(name)))
        ]
        place = graph.call_function(aten.div.Tensor, (x, scale))
        code = graph.call_function(aten.bucketize.Tensor, (place, tables[0]), {"right": True})
        made = graph.call_function(aten.index.Tensor, (tables[1], [code]))
        made = graph.call_function(aten.mul.Tensor, (made, scale))
    node.replace_all_uses_with(made)
    graph.erase_node(node)


_HEAVY = {
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum",
    "scaled_dot_product_attention",
}  # fmt: skip


def _halve(graph: fx.Graph, program: Program) -> None:
    """bf16 for convolutions, matrix products and attention, as autocast does it.

    What follows takes what it gets and promotes; outputs go back to their captured types.
    """
    cast = torch.ops.aten.to.dtype

    def half(node: fx.Node) -> fx.Node:
        if node.meta.get("dtype", torch.float32) is not torch.float32:
            return node
        return graph.call_function(cast, (node, torch.bfloat16))

    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "").split(".")[0]
        if node.op == "call_function" and name in _HEAVY:
            with graph.inserting_before(node):
                node.args = fx.map_arg(node.args, half)
                node.kwargs = fx.map_arg(node.kwargs, half)
    program.propagate()
    outputs = graph.output_node()
    captured: Any = program.output_node.args[0]
    kinds = [node.meta["dtype"] for node in captured]
    with graph.inserting_before(outputs):
        flat: Any = outputs.args[0]
        outputs.args = (
            tuple(
                graph.call_function(cast, (node, kind))
                for node, kind in zip(flat, kinds, strict=True)
            ),
        )
