"""The attentions in a graph: what looks at what, through which masks.

Written as one operator, or as two products with a softmax between them (transformers' "eager").
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from laconic.program.equations import arguments, operator_name
from laconic.program.program import Program
from laconic.program.rewrites import set_argument

FUSED = "aten.scaled_dot_product_attention"
SOFTMAX = ("aten.softmax", "aten._softmax")
_PRODUCTS = ("aten.matmul", "aten.bmm")
_BETWEEN = (
    *("aten.mul", "aten.div", "aten.add", "aten.sub", "aten.masked_fill", "aten.where", "aten.to"),
    *("aten._to_copy", "aten.dropout", "aten.clone", "aten.clamp", "aten.maximum"),
    "aten.contiguous",
)


@dataclass(frozen=True)
class Mask:
    """What is added to the products of an attention, or says which of them count.

    Attributes:
        value: `[..., queries, keys]`, added, or bool: True where a product counts.
        reader: the operator that applies it: the attention itself, or a sum.
        bare: what the sum would be without it; None where the attention applies it.
    """

    value: fx.Node
    reader: fx.Node
    bare: fx.Node | None = None

    def take(self) -> None:
        """Take it from its attention, in place."""
        if self.bare is None:
            set_argument(self.reader, "attn_mask", None)
        else:
            self.reader.replace_all_uses_with(self.bare)
            self.reader.graph.erase_node(self.reader)


@dataclass(frozen=True)
class Attention:
    """One attention. What is not found in one that is written out is None.

    Attributes:
        core: its operator, or its softmax.
        sizes: how many queries look at how many keys.
        query: `[..., queries, width]`.
        key: `[..., keys, width]`, of fewer heads where queries share them.
        value: `[..., keys, width]`.
        output: `[..., queries, width]`.
        scale: what products of queries and keys are multiplied by.
        masks: what they are masked with.
    """

    core: fx.Node
    sizes: tuple[int, int]
    query: fx.Node | None
    key: fx.Node | None
    value: fx.Node | None
    output: fx.Node | None
    scale: float
    masks: tuple[Mask, ...]


def attentions(program: Program) -> list[Attention]:
    """All attentions, in graph order; shapes have to be propagated."""
    found = (_fused(node) or _written_out(node) for node in program.graph.nodes)
    return [one for one in found if one is not None]


def _fused(node: fx.Node) -> Attention | None:
    if operator_name(node) != FUSED:
        return None
    see = arguments(node)
    query, key, held = see["query"], see["key"], see["attn_mask"]
    scale = query.meta["shape"][-1] ** -0.5 if see["scale"] is None else float(see["scale"])
    masks = (Mask(held, node),) if isinstance(held, fx.Node) else ()
    sizes = query.meta["shape"][-2], key.meta["shape"][-2]
    return Attention(node, sizes, query, key, see["value"], node, scale, masks)


def _written_out(node: fx.Node) -> Attention | None:
    shape = node.meta.get("shape", ())
    if operator_name(node) not in SOFTMAX or len(shape) < 3:
        return None
    if int(arguments(node)["dim"]) not in (-1, len(shape) - 1):
        return None
    query = key = None
    scale, masks, way = 1.0, tuple[Mask, ...](), _way(node)
    if way:
        product: Any = way[-1]
        query, key = product.args[0], _upright(product.args[1])
        scale = _scale(way, query.meta["shape"][-1])
        masks = tuple(_masks(way))
    end: Any = _end(node)
    value = None if end is None else end.args[1]
    return Attention(node, (shape[-2], shape[-1]), query, key, value, end, scale, masks)


def _way(softmax: fx.Node) -> list[fx.Node]:
    """From the softmax back to the product of queries and keys, both included; [] if unseen."""
    shape = tuple(softmax.meta["shape"])
    ways = [[softmax]]
    while ways:
        way = ways.pop()
        for source in way[-1].all_input_nodes:
            if tuple(_shape(source)) != shape:
                continue
            if operator_name(source) in _PRODUCTS:
                return [*way, source]
            if operator_name(source) in _BETWEEN:
                ways.append([*way, source])
    return []


def _scale(way: list[fx.Node], width: int) -> float:
    """What numbers multiply the product on its way; the paper's where it is no number."""
    found = 1.0
    for node in way:
        name = operator_name(node)
        if name in ("aten.mul", "aten.div"):
            other = node.args[1]
            if not isinstance(other, (int, float)):
                return float(width) ** -0.5
            found *= other if name == "aten.mul" else 1 / other
    return found


def _masks(way: list[fx.Node]) -> Iterator[Mask]:
    for node, bare in zip(way, way[1:], strict=False):
        if operator_name(node) == "aten.add" and arguments(node).get("alpha") in (None, 1):
            for other in node.args:
                if isinstance(other, fx.Node) and other is not bare:
                    yield Mask(other, node, bare)


def _end(softmax: fx.Node) -> fx.Node | None:
    """The product of shares and values."""
    shape, stack = _shape(softmax), [softmax]
    while stack:
        node = stack.pop()
        for user in node.users:
            if operator_name(user) in _PRODUCTS and user.args[0] is node:
                return user
            if operator_name(user) in _BETWEEN and _shape(user) == shape:
                stack.append(user)
    return None


def _upright(node: fx.Node) -> fx.Node | None:
    """What a value is the transpose of in its last two dimensions."""
    if operator_name(node) not in ("aten.transpose", "aten.permute", "aten.mT", "aten.t"):
        return None
    source, turned = node.all_input_nodes[0], _shape(node)
    straight = _shape(source)
    return source if (*straight[:-2], straight[-1], straight[-2]) == tuple(turned) else None


def _shape(node: fx.Node) -> tuple[int, ...]:
    found = node.meta.get("shape", ())
    return found if isinstance(found, tuple) else ()
