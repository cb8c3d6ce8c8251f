"""From a Program to the graph that exporters take: eval mode, weights as codes, exported anew."""

import logging
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram

from laconic.core.errors import ExportError, first_line
from laconic.forms import affine
from laconic.program.choices import CHOOSE, spell_out
from laconic.program.members import alone
from laconic.program.program import DEQUANTIZE, FAKE_LEVELS, FAKE_QUANTIZE, STORED, Program


def lower_weights(
    program: Program, before: Callable[[fx.GraphModule], object] | None = None
) -> fx.GraphModule:
    """A flat eval-mode graph ready for a runtime.

    Every fake-quantised *weight* becomes codes and `dequantize`; codes and zero points of every
    quantisation node get the 8-bit type their range asks for. Codebooks and other forms that no
    runtime knows become the tensors they stand for: exact, as large as before in the file. Of
    several models that are stored together the chosen one is lowered. A choice by row becomes a
    `where`. `before` may take out what a runtime does have kernels for.
    """
    module = alone(program).clone().as_graph_module()
    if before is not None:
        before(module)
    for node in list(module.graph.nodes):
        if node.op == "placeholder":
            node.target = node.name  # they differ where an argument is called like a builtin
        if node.target is CHOOSE:
            spell_out(module.graph, node)
            continue
        sources: Any = node.args[:3]
        stored = all(is_tensor(source) for source in sources)
        levels = node.target is FAKE_LEVELS and is_tensor(node.args[0])
        if node.target in STORED or levels:
            _decode(module, node)
            continue
        if node.target is FAKE_QUANTIZE and stored:
            node = _store(module, node)
        if node.target is FAKE_QUANTIZE:
            _retype(module, node, 2, code_type(*node.args[4:6]))
        elif node.target is DEQUANTIZE and stored:
            node = _whole_rows(module, node)
            sources = node.args[:3]
            if fetch(module, sources[0].target).is_floating_point():
                continue  # fp8, which has no zero point
            values = [fetch(module, sources[i].target) for i in (0, 2)]
            ends = [int(end) for tensor in values if tensor.numel() for end in tensor.aminmax()]
            kind = code_type(min(ends, default=0), max(ends, default=0))
            _retype(module, node, 0, kind)
            _retype(module, node, 2, kind)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _decode(module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a form that has no runtime by the tensor it stands for."""
    sources: Any = node.all_input_nodes
    if not all(is_tensor(source) for source in sources):
        raise ExportError("codes are computed in the graph", where=node.name)
    target: Any = node.target
    with torch.no_grad(), module.graph.inserting_before(node):
        value = target(
            *(fetch(module, source.target) for source in sources), *node.args[len(sources) :]
        )
        made = attribute(module, f"{sources[0].target}_decoded", value)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _store(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Replace the fake quantisation of a weight by stored codes and `dequantize`."""
    sources: Any = node.args[:3]
    weight, scale, zero_point = (fetch(module, source.target) for source in sources)
    rest: Any = node.args[3:]
    with torch.no_grad():
        codes = affine.encode(weight, scale, zero_point, *rest)
    with module.graph.inserting_before(node):
        stored = attribute(module, f"{sources[0].target}_codes", codes)
        made = module.graph.call_function(DEQUANTIZE, (stored, *sources[1:], rest[0]))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    return made


def _whole_rows(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Where scales belong to runs of elements, make every run a row with a scale, then reshape.

    Codes `[n * g, run]` with a scale for each row are what every runtime can decode.
    """
    sources: Any = node.args[:3]
    codes, *sides = (fetch(module, source.target) for source in sources)
    axis: Any = node.args[3]
    if sides[0].ndim < 2:
        return node
    moved = codes.detach().movedim(axis, 0)
    count = sides[0].numel()
    order = list(range(codes.ndim))
    order.insert(axis % codes.ndim, order.pop(0))
    aten = torch.ops.aten
    with module.graph.inserting_before(node):
        stored = [attribute(module, f"{sources[0].target}_rows",
                            moved.reshape(count, codes.numel() // max(count, 1)))]  # fmt: skip
        stored += [
            attribute(module, f"{source.target}_rows", side.detach().reshape(-1))
            for source, side in zip(sources[1:], sides, strict=True)
        ]
        made = module.graph.call_function(DEQUANTIZE, (*stored, 0))
        turned = module.graph.call_function(aten.reshape.default, (made, list(moved.shape)))
        if order != sorted(order):
            turned = module.graph.call_function(aten.permute.default, (turned, order))
    made.meta, turned.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(turned)
    module.graph.erase_node(node)
    return made


def code_type(low: Any, high: Any) -> torch.dtype:
    """The 8-bit type that holds the range [low, high]; int32 where none does."""
    if low >= -128 and high <= 127:
        return torch.int8
    return torch.uint8 if low >= 0 and high <= 255 else torch.int32


def _retype(module: fx.GraphModule, node: fx.Node, position: int, dtype: torch.dtype) -> None:
    source: Any = node.args[position]
    tensor = fetch(module, source.target)
    if tensor.dtype != dtype:
        with module.graph.inserting_before(node):
            name = f"{source.target}_{str(dtype).removeprefix('torch.')}"
            node.update_arg(position, attribute(module, name, tensor.detach().to(dtype)))


def attribute(module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    flat = name.replace(".", "_")
    while flat in dict(module.named_buffers(recurse=False)):
        flat += "_"
    module.register_buffer(flat, tensor)
    return module.graph.get_attr(flat)


def export(
    module: fx.GraphModule,
    program: Program,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> ExportedProgram:
    """`torch.export` of a flat graph, with the Program's dynamic dimensions or of fixed `shapes`.

    Raises:
        ExportError: torch refuses; its first line is passed on.
    """
    example = tuple(program.example)
    dims: dict[str, Any] = {}
    dynamic: Any = None
    if shapes is not None:
        example = tuple(_resized(t, shape) for t, shape in zip(example, shapes, strict=True))
    elif any(program.dynamic.values()):
        dynamic = {
            node.name: {
                dim: dims.setdefault(name, Dim(name, min=1))
                for dim, name in program.dynamic.get(node.name, {}).items()
            }
            for node in program.placeholders
        }
    try:
        with torch.no_grad(), quiet():
            try:
                return torch.export.export(module, example, dynamic_shapes=dynamic)
            except UserError:
                # a dimension with limits of its own (a table of positions): let torch find them
                found = {n: dict.fromkeys(held, Dim.AUTO) for n, held in (dynamic or {}).items()}
                return torch.export.export(module, example, dynamic_shapes=found or None)
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
        reason = first_line(error)
        raise ExportError(f"torch.export refuses the program: {reason}", where="export") from error


def _resized(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` repeated or cut to `shape`."""
    for dim, size in enumerate(shape):
        tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
    return tensor


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def fetch(module: torch.nn.Module, name: Any) -> Tensor:
    *path, leaf = str(name).split(".")
    return getattr(module.get_submodule(".".join(path)), leaf)


@contextmanager
def quiet() -> Generator[None]:
    """No warnings and no log lines of torch's exporter (a missing torchvision, renamed classes)."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
