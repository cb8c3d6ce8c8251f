"""Scaled dot product attention as one operator."""

from torch import fx

from laconic.program.axes import Atom, product
from laconic.program.equations import Arguments, Dims, Equations, Row
from laconic.program.rewrites import Pin


def attention(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Query [..., h, n, e], key [..., h, m, e], value [..., h, m, v], mask [..., n, m].

    The scale that follows from the head size is pinned to its original value. With `enable_gqa`,
    query heads = key heads x queries per key. Multiply-adds: both products; the softmax is free.
    """
    query, key, value = (see.dims(a[name]) for name in ("query", "key", "value"))
    heads = query[-3:-2]
    if a["enable_gqa"] and query[-3].size != key[-3].size:
        shared = Atom(query[-3].size // key[-3].size, hint="heads_per_kv")
        see.hint(key[-3], "heads")
        see.same(query[-3], product(key[-3], shared), node)
        see.same(key[-3], value[-3], node)
        batch = (*see.broadcast(node, query[:-3], key[:-3], value[:-3]), *heads)
    else:
        batch = see.broadcast(node, query[:-2], key[:-2], value[:-2])
    see.same(query[-1], key[-1], node)
    see.same(key[-2], value[-2], node)
    if see.dims(a["attn_mask"]):
        see.broadcast(node, (*batch, query[-2], key[-2]), see.dims(a["attn_mask"]))
    if a["is_causal"]:
        see.freeze(node, "causal order", query[-2], key[-2])
    if len(batch) > 1:
        see.hint(batch[-1], "heads", "heads_per_kv")
    see.hint(query[-1], "head_dim")
    see.hint(value[-1], "head_dim")
    see.rewrite(Pin(node, "scale", query[-1].size ** -0.5, query[-1]))
    see.count(node, *batch, query[-2], key[-2], query[-1])
    see.count(node, *batch, query[-2], key[-2], value[-1])
    return (*batch, query[-2], value[-1])


ROWS: dict[str, Row] = {"aten.scaled_dot_product_attention": attention}
