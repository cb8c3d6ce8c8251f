"""Activations as what they are between: which layers meet when one of them becomes linear.

An activation is an operator that changes every value by itself. The linear function that takes its
place is `slope * x + shift` for each channel, fitted by least squares over the data: the slope is
cov(x, f(x)) / var(x), the shift mean(f(x)) - slope * mean(x).
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from laconic.core.errors import DataError
from laconic.program import surgery
from laconic.program.equations import arguments, operator_name
from laconic.program.program import Program
from laconic.solvers.layers.affine_nodes import Way, Ways, ways, write
from laconic.solvers.recalibrate import norms
from laconic.statistics.base import Statistic, finite
from laconic.statistics.layers import Layer, layers

aten = torch.ops.aten
_NAMES = {
    f"aten.{word}"
    for word in (
        "relu", "gelu", "silu", "hardtanh", "relu6", "hardswish", "leaky_relu", "elu", "sigmoid",
        "tanh", "mish", "softplus", "hardsigmoid", "selu", "prelu", "celu",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two layers that meet when the activations between them are linear.

    Attributes:
        first, second: the layers.
        macs: multiply-adds per sample of the two apart, and as one.
    """

    first: Layer
    second: Layer
    macs: tuple[int, int]


@dataclass(frozen=True)
class Activation:
    """An activation.

    Attributes:
        name: of its node: what sites and `drop` say.
        axis: the channels' dimension.
        pair: the layers that would meet, if there are such.
    """

    node: fx.Node
    name: str
    axis: int
    pair: Pair | None


class LinearFit(Statistic):
    """Least squares of `f(x)` on `x` for each channel, in float64.

    Attributes:
        axis: the channels' dimension.
    """

    def __init__(self, node: fx.Node, axis: int) -> None:
        self.axis = axis
        self._node = node
        self._count = 0
        self._sums = torch.zeros(4, 1, dtype=torch.float64)  # x, y, xx, xy

    def update(self, tensor: Tensor) -> None:
        """Take inputs of the activation in."""
        x = finite(tensor)
        target: Any = self._node.target
        y = target(x, *self._node.args[1:], **self._node.kwargs)
        a, b = (v.movedim(self.axis, 0).flatten(1).double() for v in (x, y))
        found = torch.stack([a.sum(1), b.sum(1), a.square().sum(1), (a * b).sum(1)]).cpu()
        if self._count and found.shape != self._sums.shape:
            raise DataError(f"{found.shape[1]} channels after {self._sums.shape[1]}")
        self._sums = self._sums + found
        self._count += a.shape[1]

    def merge(self, other: Self) -> None:
        """Take in what another one has seen."""
        if other._count:
            self._sums = self._sums + other._sums
            self._count += other._count

    def line(self) -> tuple[Tensor, Tensor]:
        """Slope and shift `[channels]`; a channel that never moves is its mean."""
        x, y, xx, xy = self._sums / max(self._count, 1)
        variance = (xx - x * x).clamp(min=0)
        moves = variance > 1e-12 * xx
        slope = torch.where(moves, (xy - x * y) / variance.clamp(min=1e-300), 0.0)
        return slope, y - slope * x


def activations(program: Program) -> list[Activation]:
    """All activations in graph order; shapes have to be propagated."""
    known = {layer.node: layer for layer in layers(program)}
    passing = {norm.node for norm in norms(program)}
    batch = program.batch_size()
    found: list[Activation] = []
    for node in program.graph.nodes:
        if node.op != "call_function" or operator_name(node) not in _NAMES:
            continue
        source: Any = node.args[0]
        if not isinstance(source, fx.Node) or any(n.op == "get_attr" for n in node.all_input_nodes):
            continue
        before, after = _up(source, known, passing), _down(node, known, passing)
        pair = _pair(before, after, batch) if before and after else None
        rank = len(node.meta["shape"])
        neighbour = before or after
        space = neighbour.space if neighbour else max(rank - 2, 0) if rank == 4 else 0
        found.append(Activation(node, node.name, rank - 1 - space, pair))
    return found


def _up(node: fx.Node, known: dict[fx.Node, Layer], passing: set[fx.Node]) -> Layer | None:
    """The layer that `node` is, or is an affine function by channels of."""
    while len(node.users) == 1:
        if node in known:
            return known[node]
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not (node in passing or _is_scaling(node)):
            return None
        node = source
    return None


def _down(node: fx.Node, known: dict[fx.Node, Layer], passing: set[fx.Node]) -> Layer | None:
    """The only layer that reads `node`."""
    while len(node.users) == 1:
        (reader,) = node.users
        if reader in known:
            return known[reader] if known[reader].source is node else None
        if not (reader in passing or _is_scaling(reader)) or reader.args[0] is not node:
            return None
        node = reader
    return None


def _is_scaling(node: fx.Node) -> bool:
    if operator_name(node) not in ("aten.mul", "aten.add") or len(node.args) != 2:
        return False
    other = node.args[1]
    return not isinstance(other, fx.Node) or other.op == "get_attr"


def _pair(first: Layer, second: Layer, batch: int) -> Pair | None:
    """The two as one, if a single layer can do what they do."""
    plain = first.space == second.space and first.groups == second.groups == 1
    gaps = set(first.dilation) | set(second.dilation)
    if not plain or first.shared or second.shared or gaps - {1}:
        return None
    given, made = first.node.meta["shape"], second.node.meta["shape"]
    axis = len(made) - 1 - first.space
    into, between, out = first.source.meta["shape"][axis], given[axis], made[axis]
    places = [math.prod(shape) // shape[axis] // batch for shape in (given, made)]
    kernel = [k + (m - 1) * s for k, m, s in zip(first.kernel, second.kernel, first.stride,
                                                 strict=True)]  # fmt: skip
    apart = places[0] * into * between * first.taps + places[1] * between * out * second.taps
    return Pair(first, second, (apart, places[1] * into * out * math.prod(kernel)))


def linearise(
    program: Program, node: fx.Node, axis: int, line: tuple[Tensor, Tensor] | None
) -> None:
    """Replace an activation by the identity, or by slope and shift; then propagate, recompile."""
    source: Any = node.args[0]
    rank = len(node.meta["shape"])
    value: fx.Node = source
    if line is not None:
        for target, word, held in zip(
            (aten.mul.Tensor, aten.add.Tensor), ("slope", "shift"), line, strict=True
        ):
            shape = (-1, *(1,) * (rank - 1 - axis))
            vector = held.reshape(shape).to(node.meta["dtype"]).to(_device(program)).contiguous()
            name = program.add_tensor(f"linear.{node.name}.{word}", nn.Parameter(vector))
            with program.graph.inserting_before(node):
                stored = program.graph.get_attr(name)
                value = program.graph.call_function(target, (value, stored))
            stored.meta = {"shape": tuple(vector.shape), "dtype": vector.dtype}
            value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    program.graph.erase_node(node)


def _device(program: Program) -> torch.device:
    return next((tensor.device for _, tensor in program.tensors()), torch.device("cpu"))


def merge(program: Program, pair: Pair) -> tuple[Program, str, bool] | None:
    """A copy in which one layer does what two with only scaling and batch norm between do.

    Where the second one pads, the first one pads for both: the outermost values then come from
    beyond the border instead of being zero.

    Returns:
        the copy, the merged weight's name, and whether the border changed; None where one layer
        cannot do it.
    """
    made = program.clone()
    made.propagate()
    held = {layer.node.name: layer for layer in layers(made)}
    one, two = held[pair.first.node.name], held[pair.second.node.name]
    border = any(side for sides in two.padding for side in sides)
    if border and not _pads_ahead(one, two):
        return None
    made.propagate()
    found = ways(made)
    best = _widest(found, one.node, two.node)
    if best is None:
        return None
    name = write(made, *best, found.layers)
    surgery.remove_dead(made)
    made.propagate()
    made.recompile()
    return made, name, border


def _pads_ahead(one: Layer, two: Layer) -> bool:
    """Let `one` pad for `two` as well; both have to pad the same before and after."""
    if any(before != after for before, after in (*one.padding, *two.padding)):
        return False
    ahead = [a[0] + s * b[0] for a, b, s in zip(one.padding, two.padding, one.stride, strict=True)]
    for layer, padding in ((one, ahead), (two, [0] * two.space)):
        given = arguments(layer.node)
        layer.node.target = aten.conv2d.default if layer.space == 2 else aten.conv1d.default
        layer.node.args = (
            given["input"], given["weight"], given["bias"], list(layer.stride), padding,
            list(layer.dilation), layer.groups,
        )  # fmt: skip
        layer.node.kwargs = {}
    return True


def _widest(found: Ways, first: fx.Node, second: fx.Node) -> tuple[fx.Node, Way] | None:
    """The way through both layers, and no other, that takes in the most operators around them."""
    best: tuple[fx.Node, Way] | None = None
    for node, listed in found.of.items():
        for way in listed:
            if set(way.layers) != {first, second} or any(b != a for b, a in way.map.padding):
                continue
            inner = all(u in way.nodes for n in way.nodes if n is not node for u in n.users)
            if inner and (best is None or len(way.nodes) > len(best[1].nodes)):
                best = node, way
    return best
