"""Bounds on every value of a network that hold for every input.

Interval arithmetic, node by node (Gowal et al. 2018, arXiv 1810.12715): an operator that never
falls when its input rises gives its bounds from those of its input; an affine one from the positive
and the negative part of its weights; any other one is unbounded. Model inputs are unbounded unless
their range is given. Bounds are for real arithmetic in float64.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from laconic.program.equations import operator_name
from laconic.program.program import Program
from laconic.solvers.recalibrate import Norm, norms
from laconic.statistics.layers import Layer, layers
from laconic.statistics.walk import Order

Bounds = tuple[Tensor, Tensor]

_HUGE = 1e150  # stands for infinity, so that a zero weight takes it to zero
_UNBOUNDED = 1e60  # larger than any float32 network's values
_RISING = {
    "relu", "relu6", "sigmoid", "tanh", "hardtanh", "hardsigmoid", "clamp", "clamp_min",
    "clamp_max", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t",
    "unsqueeze", "squeeze", "expand", "contiguous", "clone", "dropout", "feature_dropout",
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "mean", "amax", "constant_pad_nd", "slice", "select", "softplus", "exp",
}  # fmt: skip
_LEAST: dict[str, float] = {"gelu": -0.1701, "silu": -0.2785, "mish": -0.3089, "hardswish": -0.375}


def bounds(
    program: Program,
    inputs: tuple[float, float] | None = None,
    wanted: Iterable[fx.Node] | None = None,
) -> dict[fx.Node, Bounds]:
    """Lowest and highest value of floating nodes, shaped like their value for the example.

    Args:
        program: in eval mode, shapes propagated.
        inputs: range of all floating model inputs; None is unbounded.
        wanted: nodes to give; None gives all.

    Returns:
        node → (low, high), float64 on the CPU; infinite where nothing is known. Nodes that are not
        floating are left out.
    """
    work, order = _Work(program, inputs), Order(program)
    asked = set(order.nodes if wanted is None else wanted)
    found: dict[fx.Node, Bounds] = {}
    for place, node in enumerate(order.nodes):
        low, high = work.visit(node)
        if node in asked and node in work.held:
            found[node] = (_shown(low), _shown(high))
        for dead in order.dead_after.get(place, ()):
            work.held.pop(dead, None)
    return found


def _shown(value: Tensor) -> Tensor:
    huge = value.abs() > _UNBOUNDED
    return torch.where(huge, value.sign() * torch.inf, value)


class _Work:
    """One pass over a graph."""

    def __init__(self, program: Program, inputs: tuple[float, float] | None) -> None:
        self.program, self.inputs = program, inputs
        self.layers: dict[fx.Node, Layer] = {layer.node: layer for layer in layers(program)}
        self.norms: dict[fx.Node, Norm] = {norm.node: norm for norm in norms(program)}
        self.held: dict[fx.Node, Bounds] = {}

    def visit(self, node: fx.Node) -> Bounds:
        dtype = node.meta.get("dtype")
        if node.op == "output" or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            return torch.empty(0), torch.empty(0)
        low, high = self._find(node)
        self.held[node] = (_capped(low, -_HUGE), _capped(high, _HUGE))
        return self.held[node]

    def _find(self, node: fx.Node) -> Bounds:
        shape = node.meta["shape"]
        if node.op == "placeholder" and self.inputs is not None:
            low, high = self.inputs
            return torch.full(shape, low).double(), torch.full(shape, high).double()
        if node.op == "get_attr":
            held = self.program.tensor(str(node.target)).detach().double().cpu()
            return held, held
        if node.op != "call_function":
            return _unknown(shape)
        name = operator_name(node).removeprefix("aten.")
        known = [self.held[s] for s in node.all_input_nodes if s in self.held]
        if not known:
            return _unknown(shape)
        if node in self.layers:
            return self._layer(node, self.layers[node])
        if node in self.norms:
            return self._norm(self.norms[node], self.held[self.norms[node].source])
        return self._plain(node, name, known)

    def _plain(self, node: fx.Node, name: str, known: list[Bounds]) -> Bounds:
        plain = len(node.args) == 2 and not node.kwargs
        if name in ("add", "sub") and plain and all(n in self.held for n in node.all_input_nodes):
            return self._sum(node, name)
        first = node.args[0] if node.args else None
        others = [n for n in node.all_input_nodes if n is not first and n.meta.get("dtype")]
        if others or not isinstance(first, fx.Node) or first not in self.held:
            return _unknown(node.meta["shape"])  # beside its input it may only read sizes
        low, high = self._monotone(node, name, *known[0])
        tags = getattr(node.target, "tags", ())
        if torch.Tag.pointwise in tags and bool((known[0][0] == known[0][1]).any()):
            exact = self._run(node, known[0][0])  # a constant stays one, whatever the operator
            same = known[0][0] == known[0][1]
            low, high = torch.where(same, exact, low), torch.where(same, exact, high)
        return low, high

    def _monotone(self, node: fx.Node, name: str, low: Tensor, high: Tensor) -> Bounds:
        if name in _LEAST:
            return torch.full_like(low, _LEAST[name]), high.clamp(min=0)
        rising = name in _RISING or (name == "leaky_relu" and _slope(node) >= 0)
        if not rising or not isinstance(node.target, torch._ops.OpOverload):
            return _unknown(node.meta["shape"])
        return self._run(node, low), self._run(node, high)

    def _sum(self, node: fx.Node, name: str) -> Bounds:
        (a, b), (c, d) = (self._operand(node.args[i]) for i in (0, 1))
        low, high = (a + c, b + d) if name == "add" else (a - d, b - c)
        return torch.broadcast_tensors(low, high)[0], high

    def _operand(self, value: Any) -> Bounds:
        if isinstance(value, fx.Node):
            return self.held[value]
        held = torch.tensor(float(value), dtype=torch.float64)
        return held, held

    def _layer(self, node: fx.Node, layer: Layer) -> Bounds:
        weight = self.program.tensor(layer.weight).detach().double().cpu()
        held = self.held.get(layer.source)
        if held is None:
            return _unknown(node.meta["shape"])
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        low = _apply(layer, held[0], up) + _apply(layer, held[1], down)
        high = _apply(layer, held[1], up) + _apply(layer, held[0], down)
        if layer.bias is not None:
            bias = self.program.tensor(layer.bias).detach().double().cpu()
            bias = bias.reshape(-1, *[1] * layer.space)
            low, high = low + bias, high + bias
        return low, high

    def _norm(self, norm: Norm, held: Bounds) -> Bounds:
        scale, shift = (t.cpu() for t in norm.affine(self.program))
        shape = (1, -1, *[1] * (held[0].ndim - 2))
        ends = [end * scale.reshape(shape) + shift.reshape(shape) for end in held]
        return torch.minimum(*ends), torch.maximum(*ends)

    def _run(self, node: fx.Node, value: Tensor) -> Tensor:
        target: Any = node.target
        first = node.args[0]
        rest: Any = map_arg(
            node.args[1:], lambda symbol: value if symbol is first else symbol.meta["shape"]
        )
        return target(value, *rest, **node.kwargs)


def _apply(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer without its bias on a float64 value."""
    if not layer.space:
        return x @ (weight.T if layer.in_dim == 1 else weight)
    pads = [side for pair in reversed(layer.padding) for side in pair]
    padded = torch.nn.functional.pad(x, pads)
    work: Any = torch.nn.functional.conv1d if layer.space == 1 else torch.nn.functional.conv2d
    return work(padded, weight, None, layer.stride, 0, layer.dilation, layer.groups)


def _unknown(shape: Any) -> Bounds:
    return (
        torch.full(tuple(shape), -_HUGE, dtype=torch.float64),
        torch.full(tuple(shape), _HUGE, dtype=torch.float64),
    )


def _capped(value: Tensor, unknown: float) -> Tensor:
    """Everything beyond the values of a float32 network is as good as infinite."""
    value = torch.where(value.abs() > _UNBOUNDED, value.sign() * _HUGE, value)
    return torch.where(value.isnan(), unknown, value)


def _slope(node: fx.Node) -> float:
    slope: Any = node.args[1] if len(node.args) > 1 else 0.01
    return float(slope)
