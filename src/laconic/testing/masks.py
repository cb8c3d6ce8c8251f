"""How masks of living elements pass through operators; the rules of the masked reference.

A rule gets the run, the operator's values and the masks beside them, both by argument name, and
returns the value and its mask. Dead elements are zero in the values it gets; what it leaves in dead
places does not matter. These rules are written without a look at how surgery treats an operator.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, fx

from laconic.program.equations import operator_name

Arguments: TypeAlias = dict[str, Any]


class Living(Protocol):
    """What a rule may ask of the run."""

    node: fx.Node

    def again(self, changed: Arguments | None = None) -> Any:
        """The operator of the current node once more, with some arguments exchanged."""
        ...


Rule: TypeAlias = Callable[[Living, Arguments, Arguments], tuple[Any, Any]]


def all_alive(value: Any) -> Any:
    """Masks that say everything is alive, nested as the value is."""
    if isinstance(value, Tensor):
        return torch.ones(value.shape, dtype=torch.bool)
    if isinstance(value, (tuple, list)):
        return [all_alive(item) for item in value]
    return None


def whole(mask: Any) -> bool:
    """Whether nothing is dead."""
    if isinstance(mask, list):
        return all(whole(item) for item in mask)
    return mask is None or bool(mask.all())


def _masks_in(masks: Arguments) -> list[Tensor]:
    found: list[Tensor] = []
    for mask in masks.values():
        found += [m for m in (mask if isinstance(mask, (list, tuple)) else [mask]) if _is(m)]
    return found


def _is(mask: Any) -> bool:
    return isinstance(mask, Tensor)


def _elementwise(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    """Alive where all operands are."""
    del v
    value = run.again()
    alive = torch.ones(value.shape, dtype=torch.bool)
    for mask in _masks_in(m):
        alive = alive & mask
    return value, alive


def _first(run: Living, _: Arguments, m: Arguments) -> tuple[Any, Any]:
    """Alive as the first operand is."""
    return run.again(), next(iter(m.values()))


def _combined(run: Living, _: Arguments, m: Arguments) -> tuple[Any, Any]:
    """Alive where the tensors of the basis are: every one of them lost the same slices."""
    return run.again(), m["basis_"].all(0)


def _chosen(run: Living, _: Arguments, m: Arguments) -> tuple[Any, Any]:
    """One of several models: alive as its rows are, and what is added to them."""
    alive = run.again({"rows": m["rows"].float(), "base": None}) > 0
    base = m.get("base")
    return run.again(), alive & base if _is(base) else alive


def _moved(*names: str) -> Rule:
    """Elements change places only: masks move as the values do."""

    def rule(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
        name = next(name for name in names if name in v)
        mask = m[name]
        several = isinstance(mask, (list, tuple))
        moving = [one.float() for one in mask] if several else mask.float()
        moved = run.again({name: moving})
        back = [one > 0 for one in moved] if isinstance(moved, (list, tuple)) else moved > 0
        return run.again(), back

    return rule


def _padded(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    """What is padded to a line is alive where anything on the line is."""
    mask, sides = m["self"], v["pad"]
    last = mask.ndim - 1
    dims = [last - place // 2 for place, side in enumerate(sides) if side]
    value = run.again()
    fixed = {"mode": "constant", "value": 0.0} if "mode" in v else {"value": 0.0}
    inside = run.again({"self": mask.float()} | fixed) > 0
    outside = run.again({"self": torch.ones(mask.shape)} | fixed) == 0
    line = mask.any(dim=tuple(set(dims)), keepdim=True) if dims else mask
    return value, inside | (outside & line)


def _rows(run: Living, _: Arguments, m: Arguments) -> tuple[Any, Any]:
    """linear: alive where the row of the weight is, and where there is a living input."""
    rows, inputs = m["weight"].any(-1), m["input"].any(-1)
    value = run.again()
    return value, (inputs[..., None] & rows if rows.ndim else inputs & rows)


def _convolved(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    """Convolution: an output channel is alive where its filter is."""
    value, weight = run.again(), m["weight"]
    space = weight.ndim - 2
    if "output_padding" in v and v.get("transposed", True):
        grouped = weight.flatten(2).any(2).view(v["groups"], -1, weight.shape[1])
        channels = grouped.any(1).flatten()
    else:
        channels = weight.flatten(1).any(1)
    return value, channels.view(-1, *[1] * space).expand(value.shape)


def _product(run: Living, _: Arguments, m: Arguments) -> tuple[Any, Any]:
    """Matrix products: alive where any of the products that are summed is."""
    masks = {k: _numbers(mask) for k, mask in m.items() if _is(mask) or _is_list(mask)}
    extra = masks.pop("self", None) if "mat1" in m or "batch1" in m else None
    if extra is not None:
        alive = run.again(masks | {"self": torch.zeros_like(extra), "beta": 1, "alpha": 1}) > 0
        return run.again(), alive & (extra > 0)
    return run.again(), run.again(masks) > 0


def _is_list(mask: Any) -> bool:
    return isinstance(mask, (list, tuple)) and any(_is(one) for one in mask)


def _numbers(mask: Any) -> Any:
    return [one.float() for one in mask] if isinstance(mask, (list, tuple)) else mask.float()


def _attention(run: Living, _: Arguments, m: Arguments) -> tuple[Any, Any]:
    """Dead heads, and dead places in a head, are zero; the scale is that of the full head."""
    query = m["query"].any(-1, keepdim=True)
    value = m["value"].any(-2, keepdim=True)
    if value.shape[-3] != query.shape[-3]:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    result = run.again()
    return result, (query & value).expand(result.shape)


def _over_space(run: Living, _: Arguments, m: Arguments) -> tuple[Any, Any]:
    """Pooling and resampling: a channel is dead everywhere or nowhere."""
    mask = next(iter(m.values()))
    name = operator_name(run.node)
    space = next(int(name[i - 1]) for i in range(len(name), 0, -1) if name[i - 1].isdigit())
    value = run.again()
    channels = mask.flatten(-space).any(-1)
    several = isinstance(value, (tuple, list))
    shape = value[0].shape if several else value.shape
    alive = channels[(...,) + (None,) * space].expand(shape)
    return value, [alive, alive] if several else alive


def _dims(v: Arguments, count: int) -> list[int]:
    asked = v.get("dim")
    if asked is None or asked == []:
        return list(range(count))
    return [d % count for d in ([asked] if isinstance(asked, int) else asked)]


def _mean(_: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    x, mask = v["self"], m["self"]
    dims, keep = _dims(v, x.ndim), bool(v.get("keepdim"))
    count = mask.sum(dims, keepdim=keep)
    return x.sum(dims, keepdim=keep) / count.clamp(min=1), count > 0


def _variance(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    x, mask = v["self"], m["self"]
    dims, keep = _dims(v, x.ndim), bool(v.get("keepdim"))
    correction = v["correction"] if "correction" in v else int(v.get("unbiased", True))
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = x.sum(dims, keepdim=True) / count
    square = torch.where(mask, (x - mean) ** 2, 0.0).sum(dims, keepdim=keep)
    total = mask.sum(dims, keepdim=keep)
    found = square / (total - (1 if correction is None else correction)).clamp(min=1)
    root = "std" in operator_name(run.node)
    return (found.sqrt() if root else found), total > 0


def _filled(fill: float) -> Rule:
    """Reductions that have a neutral element: the dead take it."""

    def rule(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
        x, mask = v["self"], m["self"]
        value = run.again({"self": x if whole(mask) else torch.where(mask, x, fill)})
        alive = mask.any(dim=tuple(_dims(v, x.ndim)), keepdim=bool(v.get("keepdim")))
        several = isinstance(value, (tuple, list))
        return value, [alive for _ in value] if several else alive

    return rule


def _extreme(fill: float) -> Rule:
    """max, min: of two tensors, or reductions for which the dead take `fill`."""

    def rule(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
        return _elementwise(run, v, m) if "other" in v else _filled(fill)(run, v, m)

    return rule


def _grouped(run: Living, _: Arguments, m: Arguments) -> tuple[Any, Any]:
    """A matrix of a stack for every run of rows: alive where the row and the column are."""
    rows, weight = (mask for mask in list(m.values())[:2])
    return run.again(), rows.any(-1)[:, None] & weight.flatten(0, 1).any(0)


def _softmax(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    x, mask = v["self"], m["self"]
    value = run.again({"self": x if whole(mask) else torch.where(mask, x, float("-inf"))})
    return value.nan_to_num(), mask


def _normed(x: Tensor, mask: Tensor, dims: list[int], eps: float, centre: bool) -> Tensor:
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = x.sum(dims, keepdim=True) / count if centre else 0.0
    centred = torch.where(mask, x - mean, 0.0)
    return centred / (centred.square().sum(dims, keepdim=True) / count + eps).sqrt()


def _layer_norm(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    x, mask = v["input"], m["input"]
    if m["weight"] is not None:  # padding is alive until a parameter says which of it was dropped
        mask = mask & m["weight"]
        x = torch.where(mask, x, 0.0)
    dims = list(range(x.ndim - len(v["normalized_shape"]), x.ndim))
    centre = "rms" not in operator_name(run.node)
    eps = torch.finfo(x.dtype).eps if v["eps"] is None else v["eps"]
    value = _normed(x, mask, dims, eps, centre)
    value = value if v["weight"] is None else value * v["weight"]
    return (value if v.get("bias") is None else value + v["bias"]), mask


def _group_norm(_: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    x, mask, groups = v["input"], m["input"], v["num_groups"]
    if m["weight"] is not None:
        mask = mask & m["weight"].view([1, -1] + [1] * (x.ndim - 2))
        x = torch.where(mask, x, 0.0)
    shape = (x.shape[0], groups, -1)
    value = _normed(x.reshape(shape), mask.reshape(shape), [2], v["eps"], True).view(x.shape)
    line = [1, -1] + [1] * (x.ndim - 2)
    value = value if v["weight"] is None else value * v["weight"].view(line)
    return (value if v["bias"] is None else value + v["bias"].view(line)), mask


def _batch_norm(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    x, mask = v["input"], m["input"]
    if v["running_mean"] is not None or "instance" in operator_name(run.node):
        return run.again(), mask
    dims = [d for d in range(x.ndim) if d != 1]  # statistics of the batch itself
    line = [1, -1] + [1] * (x.ndim - 2)
    value = _normed(x, mask, dims, v["eps"], True)
    value = value if v["weight"] is None else value * v["weight"].view(line)
    return (value if v["bias"] is None else value + v["bias"].view(line)), mask


def _glu(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    one, other = m["self"].chunk(2, v["dim"])
    return run.again(), one & other


def _recurrent(run: Living, v: Arguments, m: Arguments) -> tuple[Any, Any]:
    """Alive where the units are that the states come from; dead ones start at zero and stay."""
    units = m["params"][1].any(0)
    outputs, *states = run.again()
    alive = units.repeat(1 + bool(v["bidirectional"])).expand(outputs.shape)
    return [outputs, *states], [alive, *(units.expand(state.shape) for state in states)]


def _made(run: Living, *_: Arguments) -> tuple[Any, Any]:
    value = run.again()
    return value, all_alive(value)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of an operator, or None if nobody has written one."""
    name = operator_name(node).removeprefix("aten.")
    tags = getattr(node.target, "tags", ())
    if name in _RULES:
        return _RULES[name]
    if torch.Tag.pointwise in tags:
        return _elementwise
    pools = ("pool", "upsample", "reflection_pad", "replication_pad")
    return _over_space if any(word in name for word in pools) else None


def _table() -> dict[str, Rule]:
    moved = (
        "view reshape _unsafe_view flatten unflatten permute transpose swapaxes t numpy_T mT "
        "movedim squeeze unsqueeze expand broadcast_to repeat tile repeat_interleave pixel_shuffle "
        "pixel_unshuffle channel_shuffle split split_with_sizes chunk tensor_split unbind slice "
        "narrow select index index_select gather roll flip unfold im2col "
        "col2im expand_as view_as reshape_as adjoint unsafe_chunk"
    )
    first = (
        "dropout feature_dropout clone contiguous to _to_copy alias detach lift_fresh_copy type_as "
        "cumsum tril triu zeros_like ones_like full_like bucketize"
    )
    pointwise = (
        "where masked_fill multiply subtract divide negative __and__ __or__ hardswish "
        "hardsigmoid hardtanh relu6 mish _weight_norm"
    )
    table: dict[str, Rule] = {name: _moved("self") for name in moved.split()}
    table |= {name: _first for name in first.split()}
    table |= {name: _elementwise for name in pointwise.split()}
    table |= {name: _moved("tensors") for name in ("cat", "concat", "stack")}
    table |= {
        name: _product for name in ("matmul", "mm", "bmm", "mv", "einsum", "addmm", "baddbmm")
    }
    table |= {f"conv{n}d": _convolved for n in (1, 2, 3)}
    table |= {f"conv_transpose{n}d": _convolved for n in (1, 2, 3)}
    table |= {name: _filled(0.0) for name in ("sum", "linalg_vector_norm", "norm", "any")}
    table |= {name: _filled(float("-inf")) for name in ("amax", "logsumexp", "argmax")}
    table |= {"amin": _filled(float("inf")), "prod": _filled(1.0), "all": _filled(1.0)}
    table |= {name: _variance for name in ("var", "std")}
    table |= {name: _softmax for name in ("softmax", "_softmax", "log_softmax")}
    return table | {
        "max": _extreme(float("-inf")),
        "min": _extreme(float("inf")),
        "_grouped_mm": _grouped,
        "transformers.grouped_mm_fallback": _grouped,
        "pad": _padded,
        "constant_pad_nd": _padded,
        "linear": _rows,
        "embedding": _moved("weight"),
        "convolution": _convolved,
        "scaled_dot_product_attention": _attention,
        "mean": _mean,
        "layer_norm": _layer_norm,
        "rms_norm": _layer_norm,
        "group_norm": _group_norm,
        "batch_norm": _batch_norm,
        "instance_norm": _batch_norm,
        "glu": _glu,
        "lstm": _recurrent,
        "gru": _recurrent,
        "rnn_tanh": _recurrent,
        "rnn_relu": _recurrent,
        "prelu": _first,
        "laconic.fake_quantize": _first,
        "laconic.dequantize": _first,
        "laconic.fake_levels": _first,
        "laconic.dynamic_quantize": _first,
        "laconic.levels": _first,
        "laconic.lookup": _first,
        "laconic.combine": _combined,
        "laconic.vectors": _made,
        "laconic.hashed": _made,
        "laconic.member": _chosen,
        "full": _made,
        "arange": _made,
    }


_RULES = _table()
