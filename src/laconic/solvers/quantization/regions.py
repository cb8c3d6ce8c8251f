"""Parts of a network that hang together by one tensor at either end: residual blocks, for one.

Going through the graph, a *cut* is a place where a single tensor carries all that later nodes need
to know of the layers so far; masks and position tables, which no layer has touched, do not count.
What lies between two cuts and holds layers is a region: a residual block, a layer with its
activation function in a chain, a transformer's attention or its feed-forward part. Where there are
no cuts, as in a dense network, each layer is a region of its own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from laconic.program.program import Program
from laconic.statistics.layers import Layer
from laconic.statistics.walk import Order, Walk

MOST = 12
"""Layers of a region: longer ones, where nothing can be cut, are taken layer by layer."""


@dataclass(frozen=True)
class Region:
    """A part of a graph that computes `target` from `source`.

    Attributes:
        source, target: nodes of the tensors that enter and leave.
        nodes: all that have to run, in order.
        layers: those of them that apply weights, in order.
        sides: what they read besides, which no layer has touched.
    """

    source: fx.Node
    target: fx.Node
    nodes: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]
    sides: tuple[fx.Node, ...]


def regions(program: Program, layers: Sequence[Layer]) -> list[Region]:
    """Regions that together hold all `layers`, in graph order.

    Args:
        program: its shapes are known.
        layers: of the program, in graph order.
    """
    if not layers:
        return []
    order, readers = Order(program), {layer.node: layer for layer in layers}
    touched = _touched(order, readers, layers[0].source)
    cuts = _cuts(order, touched, readers, layers[0].source)
    found: list[Region] = []
    for source, target in zip(cuts, cuts[1:], strict=False):
        made = _region(order, touched, readers, source, target)
        if len(made.layers) <= MOST:
            found.append(made)
    held = {layer.node for region in found for layer in region.layers}
    found += [
        _region(order, touched, readers, layer.source, layer.node)
        for layer in layers if layer.node not in held
    ]  # fmt: skip
    return sorted(found, key=lambda region: order.place[region.layers[0].node])


def _touched(order: Order, readers: Collection[fx.Node], first: fx.Node) -> set[fx.Node]:
    """What depends on a layer, and the first layer's input with all that depends on it."""
    found = {first}
    for node in order.nodes:
        if node in readers or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _cuts(
    order: Order, touched: set[fx.Node], readers: Collection[fx.Node], first: fx.Node
) -> list[fx.Node]:
    """The nodes at the last cut in front of each layer that has one, and at the last of all."""
    live: set[fx.Node] = set()
    found, latest = [first], first
    for place, node in enumerate(order.nodes):
        if node.op == "output":
            break
        if node in readers and latest is not found[-1]:
            found.append(latest)
        live = {n for n in (*live, node) if n in touched and order.last_use[n] > place}
        if len(live) == 1 and order.place[node] > order.place[first]:
            (only,) = live
            latest = only if _is_float(only) else latest
    return found if latest is found[-1] else [*found, latest]


def _is_float(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _region(
    order: Order,
    touched: set[fx.Node],
    readers: Mapping[fx.Node, Layer],
    source: fx.Node,
    target: fx.Node,
) -> Region:
    """All between two nodes that the second needs, weights computed on the way included."""
    inside: set[fx.Node] = set()
    sides: set[fx.Node] = set()
    left = [target]
    while left:
        node = left.pop()
        if node in inside or node in sides or node is source or node.op == "get_attr":
            continue
        if node in touched or _from_stored(node):
            inside.add(node)
            left += node.all_input_nodes
        else:
            sides.add(node)
    nodes = tuple(sorted(inside, key=order.place.__getitem__))
    held = tuple(readers[node] for node in nodes if node in readers)
    return Region(source, target, nodes, held, tuple(sorted(sides, key=order.place.__getitem__)))


def _from_stored(node: fx.Node) -> bool:
    """Whether a node computes something from stored tensors alone."""
    left = [node]
    while left:
        one = left.pop()
        if one.op == "placeholder":
            return False
        left += one.all_input_nodes
    return True


def run(
    program: Program,
    order: Order,
    region: Region,
    inputs: Mapping[fx.Node, Tensor],
    replaced: Mapping[str, Tensor],
) -> Tensor:
    """What a region gives, with some of the program's tensors replaced; gradients flow.

    Args:
        program: whose graph the region belongs to.
        order: of its nodes.
        region: the part to run.
        inputs: values of its source and its sides.
        replaced: stored tensor's name → what is used in its place.
    """
    swap = {id(program.tensor(name)): tensor for name, tensor in replaced.items()}

    def enter(node: fx.Node, args: tuple[object, ...]) -> tuple[object, ...]:
        del node
        return tuple(swap.get(id(arg), arg) for arg in args)

    walk = Walk(program, program.example, order, enter=enter)
    walk.values.update(inputs)
    for node in region.nodes:
        walk.next = order.place[node]
        walk.run(walk.next + 1, hold=region.nodes)
    return walk.values[region.target]
