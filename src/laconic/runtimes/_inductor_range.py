"""Quantisation over a tensor's own range, in operators that Inductor fuses."""

from typing import Any

import torch
from torch import fx


def spell_out_range(graph: fx.Graph, node: fx.Node) -> None:
    """A grid over the tensor's own range in aten operators."""
    aten = torch.ops.aten
    arguments: Any = node.args
    x, bits, per_token = arguments
    dims, most = [-1] if per_token else list(range(len(node.meta["shape"]))), 2**bits - 1

    def call(target: Any, *given: Any) -> fx.Node:
        return graph.call_function(target, given)

    with graph.inserting_before(node):
        low = call(aten.clamp_max.default, call(aten.amin.default, x, dims, True), 0)
        high = call(aten.clamp_min.default, call(aten.amax.default, x, dims, True), 0)
        wide = call(aten.sub.Tensor, high, low)
        empty = call(aten.eq.Scalar, wide, 0)
        scale = call(aten.add.Tensor, call(aten.div.Tensor, wide, most), empty)
        zero = call(aten.round.default, call(aten.div.Tensor, call(aten.neg.default, low), scale))
        zero = call(aten.clamp.default, zero, 0, most)
        made = call(aten.round.default, call(aten.div.Tensor, x, scale))
        made = call(aten.clamp.default, call(aten.add.Tensor, made, zero), 0, most)
        made = call(aten.mul.Tensor, call(aten.sub.Tensor, made, zero), scale)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
