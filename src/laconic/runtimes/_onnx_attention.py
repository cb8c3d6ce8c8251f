"""Scaled dot product attention as runtimes like it.

torch's own translation scales q and k apart (which parts them from their quantisation), reshapes
them, and guards the probabilities against NaN; no runtime fuses that. Here the scale follows the
first product, and rows that see nothing, NaN on the way, are set to zero at the end as torch does,
where it costs one small operator.
"""

from typing import Any

_IR = Any  # values of onnx_ir: loose stubs


def modules() -> tuple[Any, Any]:
    """ONNX operators as functions, taking Python values as constants, and `onnx_ir`."""
    import onnx_ir
    from onnxscript import opset20

    return opset20, onnx_ir


def attention(
    q: _IR,
    k: _IR,
    v: _IR,
    mask: _IR | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _IR:
    """`aten.scaled_dot_product_attention` for q [..., L, d], k [..., S, d], v [..., S, e]."""
    op, ir = modules()

    del dropout  # an exported graph is in eval mode
    heads, last = q.shape[-3:-2], len(q.shape) - 1
    factor = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    boolean = causal or (mask is not None and mask.dtype == ir.DataType.BOOL)
    if causal:
        mask = _triangle(q, k)
    grouped = enable_gqa and heads != k.shape[-3:-2]
    if grouped:  # the query heads of one key head become a dimension of their own
        pair = [k.shape[-3], heads[0] // k.shape[-3]]
        if mask is not None and len(mask.shape or ()) > 2:
            alike = mask.shape[-3] == 1
            mask = op.Unsqueeze(mask, [-3]) if alike else _with_heads(mask, -3, pair)
        q = _with_heads(q, -3, pair)
        k, v, last = op.Unsqueeze(k, [-3]), op.Unsqueeze(v, [-3]), last + 1
    turned = op.Transpose(k, perm=[*range(last - 1), last, last - 1])
    scores = op.Mul(op.MatMul(q, turned), op.CastLike(factor, q))
    seen = None
    if mask is not None:
        added, seen = _added(mask, q, boolean)
        seen = None if causal else seen
        scores = op.Add(scores, added)
    made = op.MatMul(op.Softmax(scores, axis=-1), v)
    if seen is not None:
        made = op.Where(seen, made, op.CastLike(0.0, q))
    return _with_heads(made, -4, [heads[0]]) if grouped else made


def _with_heads(x: _IR, start: int, heads: list[int]) -> _IR:
    """`x` with its dimensions from `start` to the last two written as `heads`."""
    op, _ = modules()
    before = op.Shape(x, end=start)
    sizes = op.Concat(before, op.Constant(value_ints=heads), op.Shape(x, start=-2), axis=0)
    return op.Reshape(x, sizes)


def _triangle(q: _IR, k: _IR) -> _IR:
    """True [L, S] where a query may look."""
    op, ir = modules()

    sizes = [op.Slice(op.Shape(x), [-2], [-1], [0]) for x in (q, k)]
    ones = op.Expand(op.Constant(value_ints=[1]), op.Concat(*sizes, axis=0))
    return op.Cast(op.Trilu(ones, upper=0), to=ir.DataType.BOOL)


def _added(mask: _IR, like: _IR, boolean: bool) -> tuple[_IR, _IR]:
    """What is added to the scores, and the rows [..., 1] that see anything."""
    op, ir = modules()

    blind = op.Constant(value_float=float("-inf"))
    best = op.ReduceMax(op.Cast(mask, to=ir.DataType.FLOAT), [-1], keepdims=1)
    if not boolean:
        return mask, op.Greater(best, blind)
    added = op.Where(mask, op.CastLike(0.0, like), op.CastLike(blind, like))
    return added, op.Greater(best, op.Constant(value_float=0.0))
