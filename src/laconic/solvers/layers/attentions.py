"""Queries, keys and values of the attentions in a graph, by the names of their nodes."""

from dataclasses import dataclass

import torch
from torch import fx

from laconic.program.program import Program

_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default)
_BETWEEN = ("mul", "div", "add", "sub", "masked_fill", "where", "dropout", "clone", "to", "clamp")


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        name: of the node that gives its output.
        values: names of the nodes of query, key and value, each `[batch, heads, tokens, width]`, or
            `[batch, tokens, width]` without heads.
        heads: the most heads that all three have.
        widths: of each of the three, over all heads.
    """

    name: str
    values: tuple[str, str, str]
    heads: int
    widths: tuple[int, ...]


def attentions(program: Program) -> list[Attention]:
    """All attentions that see as many keys as queries, in graph order; shapes are propagated.

    Written as one operator, or as two products with a softmax between them.
    """
    found: list[Attention] = []
    for node in program.graph.nodes:
        nodes = _parts(node)
        if nodes is None:
            continue
        shapes = [value.meta["shape"] for value in nodes]
        ranks = {len(shape) for shape in shapes}
        if ranks not in ({3}, {4}) or len({shape[-2] for shape in shapes}) != 1:
            continue
        heads = [shape[1] if len(shape) == 4 else 1 for shape in shapes]
        widths = tuple(h * shape[-1] for h, shape in zip(heads, shapes, strict=True))
        query, key, value = nodes
        names = (query.name, key.name, value.name)
        found.append(Attention(node.name, names, min(heads), widths))
    return found


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Query, key and value of the attention that ends in `node`."""
    if node.target == _aten.scaled_dot_product_attention.default:
        query, key, value, *_ = node.args
    elif node.target in _PRODUCTS:
        value = node.args[1]
        share = _back(node.args[0], _SOFTMAX)
        scores = _back(share.args[0], _PRODUCTS) if share is not None else None
        if scores is None:
            return None
        query, key = scores.args[0], _upright(scores.args[1])
    else:
        return None
    if isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node):
        return query, key, value
    return None


def _back(start: object, targets: tuple[object, ...]) -> fx.Node | None:
    """The operator of these kinds that a value comes from by pointwise operators alone."""
    node = start
    while isinstance(node, fx.Node):
        if node.target in targets:
            return node
        if node.op != "call_function" or _base(node) not in _BETWEEN:
            return None
        shape = node.meta["shape"]
        same = [n for n in node.all_input_nodes if n.meta.get("shape") == shape]
        node = next((n for n in same if n.op == "call_function"), None)
    return None


def _upright(value: object) -> fx.Node | None:
    """What a value is the transpose of in its last two dimensions."""
    if not isinstance(value, fx.Node) or _base(value) not in ("transpose", "permute", "mT", "t"):
        return None
    source = value.all_input_nodes[0]
    turned, shape = value.meta["shape"], source.meta["shape"]
    return source if (*shape[:-2], shape[-1], shape[-2]) == tuple(turned) else None


def _base(node: fx.Node) -> str:
    target = node.target
    name = target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else ""
    return name.rstrip("_")
