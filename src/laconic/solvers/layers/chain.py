"""Put a chain of smaller layers in the place of one."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.program.cost import depends_on_batch
from laconic.program.equations import arguments
from laconic.program.program import Program
from laconic.solvers.sharing.low_rank import Shape, Stage
from laconic.statistics.layers import Layer

aten = torch.ops.aten
_PLAIN: dict[int, Any] = {1: aten.conv1d.default, 2: aten.conv2d.default}
_WORDS: dict[int, Any] = {1: aten.conv1d.padding, 2: aten.conv2d.padding}


def shape_of(program: Program, layer: Layer) -> Shape:
    """What the cost of a layer depends on; positions are per sample."""
    weight = program.tensor(layer.weight)
    given, made = layer.source.meta["shape"], layer.node.meta["shape"]
    batch = program.batch_size() if layer.node in depends_on_batch(program) else 1
    if not layer.space:
        places = prod(made[:-1]) // batch
        out, into = weight.shape[layer.out_dim], weight.shape[layer.in_dim]
        return Shape(out, into, (), (places, places, places))
    samples = given[0]
    extents = given[2:], (made[2], *given[3:]), made[2:]
    first, middle, last = (samples * prod(extent) // batch for extent in extents)
    return Shape(weight.shape[0], weight.shape[1], layer.kernel, (first, middle, last))


def replace(
    program: Program, layer: Layer, chain: Sequence[Stage], factors: Sequence[Tensor]
) -> list[str]:
    """Replace a layer by a chain, in place; the bias stays with the last one.

    The new weights stand beside the old one: `conv1.weight` gives `conv1.reduce.weight` and so on.

    Args:
        program: recompile it, propagate and drop what is unused afterwards.
        layer: whose weight nobody else reads.
        chain: the operators.
        factors: their weights.

    Returns:
        the names of the new weights.
    """
    old = program.tensor(layer.weight)
    value, names = _source(layer.node), list[str]()
    origin = {"origin": layer.node.meta.get("origin", "")}
    for number, (stage, factor) in enumerate(zip(chain, factors, strict=True)):
        weight = nn.Parameter(factor.to(old).contiguous(), requires_grad=old.requires_grad)
        names.append(program.add_tensor(_name(layer.weight, stage.name), weight))
        bias = arguments(layer.node).get("bias", None) if layer.bias is not None else None
        if layer.bias is not None and bias is None:
            bias = arguments(layer.node)["self"]  # addmm calls it so
        with program.graph.inserting_before(layer.node):
            held = program.graph.get_attr(names[-1])
            ends = bias if number == len(chain) - 1 else None
            value = _operator(program.graph, layer, stage, value, held, ends)
        held.meta, value.meta = dict(origin), dict(origin)
    value.meta = dict(layer.node.meta)
    layer.node.replace_all_uses_with(value)
    program.graph.erase_node(layer.node)
    return names


def _source(node: fx.Node) -> fx.Node:
    """What a layer reads by now: the layer before it may have been replaced since it was found."""
    given = arguments(node)
    source: Any = given.get("mat1") or given.get("input") or node.args[0]
    return source


def _operator(
    graph: fx.Graph, layer: Layer, stage: Stage, x: fx.Node, weight: fx.Node, bias: Any
) -> fx.Node:
    if not layer.space:
        return graph.call_function(aten.linear.default, (x, weight, bias))
    given = arguments(layer.node)["padding"]
    own = [dim in stage.owns for dim in range(layer.space)]
    stride = [layer.stride[d] if held else 1 for d, held in enumerate(own)]
    dilation = [layer.dilation[d] if held else 1 for d, held in enumerate(own)]
    if isinstance(given, str):  # "same" of an even kernel has no pair of numbers
        target, padding = _WORDS[layer.space], given
    else:
        target = _PLAIN[layer.space]
        padding = [layer.padding[d][0] if held else 0 for d, held in enumerate(own)]
    return graph.call_function(target, (x, weight, bias, stride, padding, dilation, stage.groups))


def _name(weight: str, stage: str) -> str:
    """`conv1.weight` → `conv1.reduce.weight`; a parameter `mixing` → `mixing_reduce.weight`."""
    if weight == "weight" or weight.endswith(".weight"):
        return f"{weight.removesuffix('weight')}{stage}.weight"
    return f"{weight}_{stage}.weight"
