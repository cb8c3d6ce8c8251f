"""Which nodes of a graph are affine maps of an earlier node, and how such a map is written down.

For every node the ways are listed in which it is an affine map of a node before it: itself, its
operator alone, its operator behind those of its input, sums of two maps of one source. Shapes are
all that is computed here, so that the list is cheap; `solvers/layers/affine.py` has the arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.program.equations import arguments, operator_name
from laconic.program.program import Program
from laconic.solvers.layers import affine
from laconic.solvers.layers.affine import Affine
from laconic.solvers.recalibrate import Norm, norms
from laconic.statistics.layers import Layer, layers

_MOST = 16  # ways that are followed for each node
_WRITTEN: dict[int, Any] = {
    0: torch.ops.aten.linear.default,
    1: torch.ops.aten.conv1d.default,
    2: torch.ops.aten.conv2d.default,
}
_POOLS = {"aten.avg_pool1d": 1, "aten.avg_pool2d": 2}
_Change = Callable[[Affine], "Affine | str"]


@dataclass(frozen=True)
class Way:
    """A node as `map` of `source`.

    Attributes:
        nodes: the operators that the map stands for.
        layers: those of them that have a weight.
    """

    source: fx.Node
    map: Affine
    nodes: frozenset[fx.Node] = frozenset()
    layers: frozenset[fx.Node] = frozenset()


@dataclass
class Ways:
    """All ways of all nodes of a program.

    Attributes:
        of: node → its ways, the nearest source first.
        layers: node → the layer it is.
        refused: (weight, weight or other node, reason) where two maps in a row are not one.
    """

    of: dict[fx.Node, list[Way]]
    layers: dict[fx.Node, Layer]
    refused: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])


def ways(program: Program, *, batch_norm: bool = True) -> Ways:
    """The ways of every node; shapes have to be propagated.

    Args:
        program: in eval mode.
        batch_norm: whether batch norm counts as an affine map.
    """
    known = {layer.node: layer for layer in layers(program)}
    found = Ways({}, known)
    scales = {norm.node: norm for norm in norms(program)} if batch_norm else {}
    for node in program.graph.nodes:
        itself = _itself(node)
        found.of[node] = itself
        if node.op != "call_function" or not itself:
            continue
        made = _sum(node, found) if _is_sum(node) else _chain(program, node, found, scales)
        found.of[node] = [*itself, *made[:_MOST]]
    return found


def _itself(node: fx.Node) -> list[Way]:
    """A node as the identity of itself, over its last dimension and over its image channels."""
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    if node.op == "get_attr" or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return []
    if not shape:
        return []
    spaces = [0, len(shape) - 2] if len(shape) in (3, 4) else [0]
    return [Way(node, affine.identity(shape[len(shape) - 1 - s], s)) for s in spaces]


def _chain(program: Program, node: fx.Node, found: Ways, scales: dict[fx.Node, Norm]) -> list[Way]:
    """Ways through an operator of one input."""
    layer = found.layers.get(node)
    source: Any = layer.source if layer is not None else node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return []
    if layer is not None:
        change = None if layer.shared else _behind(_of_layer(program, layer))
    elif node in scales:
        space = max(len(node.meta["shape"]) - 2, 0)
        change = _behind(affine.diagonal(*scales[node].affine(program), space))
    else:
        change = _of_pool(node, source) or _of_constant(program, node)
    if change is None:
        return []
    made: list[Way] = []
    own = frozenset([node])
    for way in found.of.get(source, []):
        result = change(way.map)
        if isinstance(result, Affine):
            heavy = way.layers | (own if layer is not None else frozenset[fx.Node]())
            made.append(Way(way.source, result, way.nodes | own, heavy))
        elif len(way.layers) == 1 and layer is not None and len(way.nodes) == 1:
            (before,) = way.layers
            found.refused.append((layer.weight, found.layers[before].weight, result))
    return made


def _behind(second: Affine) -> _Change:
    return lambda first: affine.compose(second, first)


def _of_layer(program: Program, layer: Layer) -> Affine:
    def build() -> tuple[Tensor, Tensor]:
        weight = program.tensor(layer.weight).detach()
        held = weight if layer.space else layer.matrix(weight)
        bias = weight.new_zeros(len(held)) if layer.bias is None else program.tensor(layer.bias)
        return held.double(), bias.detach().double()

    shape = program.tensor(layer.weight).shape
    outputs, inputs = shape[layer.out_dim], shape[layer.in_dim] * layer.groups
    biased = layer.bias is not None and bool(program.tensor(layer.bias).any())
    return Affine(
        inputs, outputs, layer.kernel, layer.stride, layer.dilation, layer.padding, layer.groups,
        biased, build,
    )  # fmt: skip


def _of_pool(node: fx.Node, source: fx.Node) -> _Change | None:
    """Average pooling as a convolution of each channel with equal weights."""
    space = _POOLS.get(operator_name(node))
    if space is None or len(source.meta["shape"]) != space + 2:
        return None
    a = arguments(node)
    kernel = _each(a["kernel_size"], space)
    stride = _each(a["stride"], space) or kernel
    padding = _each(a["padding"], space)
    if a["ceil_mode"] or (any(padding) and not a["count_include_pad"]):
        return None
    channels = source.meta["shape"][1]
    share = 1.0 / (a.get("divisor_override") or math.prod(kernel))
    weight = torch.full((channels, 1, *kernel), share, dtype=torch.float64)
    one, pads = (1,) * space, tuple((p, p) for p in padding)
    zeros = torch.zeros(channels, dtype=torch.float64)
    return _behind(
        Affine(channels, channels, kernel, stride, one, pads, channels, False,
               lambda: (weight, zeros))
    )  # fmt: skip


def _each(value: Sequence[int] | int, space: int) -> tuple[int, ...]:
    held = (value,) if isinstance(value, int) else tuple(value)
    return held * space if len(held) == 1 else held


# sums and constants -------------------------------------------------------------------------


def _is_sum(node: fx.Node) -> bool:
    two = len(node.args) == 2 and all(isinstance(a, fx.Node) and a.op != "get_attr"
                                      for a in node.args)  # fmt: skip
    return operator_name(node) in ("aten.add", "aten.sub") and two


def _sum(node: fx.Node, found: Ways) -> list[Way]:
    """Ways through a sum or difference of two maps of one source."""
    left: Any = node.args[0]
    right: Any = node.args[1]
    if not left.meta.get("shape") == right.meta.get("shape") == node.meta["shape"]:
        return []
    alpha: Any = arguments(node).get("alpha")
    factor = torch.tensor(1.0 if alpha is None else float(alpha))
    factor = -factor if operator_name(node) == "aten.sub" else factor
    made: list[Way] = []
    for one in found.of.get(left, []):
        for two in found.of.get(right, []):
            if one.source is not two.source:
                continue
            other = two.map if float(factor) == 1.0 else affine.scaled(two.map, factor)
            result = affine.total(one.map, other)
            if isinstance(result, Affine):
                nodes = one.nodes | two.nodes | {node}
                made.append(Way(one.source, result, nodes, one.layers | two.layers))
    return made


def _of_constant(program: Program, node: fx.Node) -> _Change | None:
    """Multiplication by, or addition of, a number or a stored value for each channel."""
    name = operator_name(node).removeprefix("aten.")
    if name == "neg":
        return lambda one: affine.scaled(one, torch.tensor(-1.0))
    if name not in ("mul", "div", "add", "sub") or len(node.args) != 2 or node.kwargs:
        return None
    first: Any = node.args[0]
    if first.meta.get("shape") != node.meta["shape"]:
        return None
    value = _value(program, node.args[1])
    if value is None:
        return None
    if name == "div":
        value = 1.0 / value
    if name == "sub":
        value = -value
    held = value

    def change(one: Affine) -> Affine | str:
        vector = _along_channels(held, one)
        if vector is None or not bool(torch.isfinite(vector).all()):
            return "the constant is not one value for each channel"
        work = affine.scaled if name in ("mul", "div") else affine.shifted
        return work(one, vector)

    return change


def _value(program: Program, value: Any) -> Tensor | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    if isinstance(value, fx.Node) and value.op == "get_attr" and len(value.users) == 1:
        held = program.tensor(str(value.target)).detach()
        return held.double() if held.is_floating_point() else None
    return None


def _along_channels(value: Tensor, one: Affine) -> Tensor | None:
    """A constant as `[outputs]` or a single number, if it varies along channels only."""
    if value.numel() == 1:
        return value.reshape(())
    axis = value.ndim - 1 - one.space
    fits = axis >= 0 and value.shape[axis] == value.numel() == one.outputs
    return value.flatten() if fits else None


# writing ------------------------------------------------------------------------------------


def write(program: Program, node: fx.Node, way: Way, known: dict[fx.Node, Layer]) -> str:
    """Let one linear layer or convolution do the work of `node`; returns its weight's name.

    The weight takes the name of the largest one it stands for. Call `surgery.remove_dead` and
    `propagate` afterwards.
    """
    weight, bias = way.map.build()
    model = max(
        (known[n] for n in program.graph.nodes if n in way.layers),
        key=lambda layer: program.tensor(layer.weight).numel(),
    )
    old = program.tensor(model.weight)
    program.set_tensor(model.weight, weight.to(old).contiguous())
    inputs: list[Any] = [way.source]
    with program.graph.inserting_before(node):
        inputs.append(_holder(program, model.weight, node))
        inputs.append(_bias(program, model, bias.to(old), node) if way.map.biased else None)
        options: list[Any] = []
        if way.map.space:
            before = [pair[0] for pair in way.map.padding]
            options = [list(way.map.stride), before, list(way.map.dilation), way.map.groups]
        made = program.graph.call_function(_WRITTEN[way.map.space], (*inputs, *options))
    made.meta = {**node.meta, "origin": model.node.meta.get("origin", "")}
    node.replace_all_uses_with(made)
    return model.weight


def _holder(program: Program, name: str, like: fx.Node) -> fx.Node:
    made = program.graph.get_attr(name)
    tensor = program.tensor(name)
    made.meta = {"origin": like.meta.get("origin", ""), "shape": tuple(tensor.shape),
                 "dtype": tensor.dtype}  # fmt: skip
    return made


def _bias(program: Program, model: Layer, value: Tensor, node: fx.Node) -> fx.Node:
    """A node for the bias, under the name the layer's own has or would have."""
    readers = [
        user
        for n in program.graph.nodes
        if n.op == "get_attr" and n.target == model.bias
        for user in n.users
    ]
    if model.bias is not None and len(readers) == 1:
        program.set_tensor(model.bias, value)
        return _holder(program, model.bias, node)
    path, _, _ = model.weight.rpartition(".")
    trains = program.tensor(model.weight).requires_grad
    held = nn.Parameter(value, requires_grad=trains)
    return _holder(program, program.add_tensor(f"{path}.bias" if path else "bias", held), node)
