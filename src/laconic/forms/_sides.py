"""Where the scales of a tensor stand: for all of it, along an axis, or for runs of elements.

The shape of a scale says which: `[]` the whole tensor; `[n]` one for each index of `axis`; `[n, g]`
one for each of `g` equal runs of a slice of `axis`, the slice's elements in row-major order.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fits(shape: Sequence[int], side: Sequence[int], axis: int | None) -> str:
    """What is wrong with a scale of shape `side` for a tensor of `shape`, in words; or nothing."""
    said = f"a scale of shape {list(side)} for a tensor of shape {list(shape)}"
    if axis is None:
        return "" if math.prod(side) == 1 else f"{said} without an axis"
    if not -len(shape) <= axis < len(shape):
        return f"axis {axis} for a tensor of shape {list(shape)}"
    if len(side) not in (1, 2) or side[0] not in (1, shape[axis]):
        return f"{said}, axis {axis}"
    if len(side) == 2 and (side[0] != shape[axis] or slice_size(shape, axis) % max(side[1], 1)):
        return f"{said}: slices of {slice_size(shape, axis)} elements cut into {side[1]} runs"
    return ""


def slice_size(shape: Sequence[int], axis: int) -> int:
    """How many elements one index of `axis` has."""
    return math.prod(size for place, size in enumerate(shape) if place != axis % len(shape))


def spread(side: Tensor, axis: int | None, shape: Sequence[int]) -> Tensor:
    """`side` of shape `[]`, `[n]` or `[n, g]`, shaped to broadcast against a tensor of `shape`.

    Raises:
        ValueError: it does not fit.
    """
    if side.ndim < 2 or axis is None:
        if axis is None:
            return side.reshape(())
        wide = [1] * len(shape)
        wide[axis] = -1
        return side.reshape(wide)
    wrong = fits(shape, side.shape, axis)
    if wrong:
        raise ValueError(wrong)
    n, g = side.shape
    others = [size for place, size in enumerate(shape) if place != axis % len(shape)]
    run = math.prod(others) // max(g, 1)
    return side[..., None].expand(n, g, run).reshape(n, *others).movedim(0, axis)


def summed(x: Tensor, side: Sequence[int], axis: int | None) -> Tensor:
    """The sums of `x` over the elements that share a scale of shape `side`: the gradient of it."""
    if axis is None or math.prod(side) == 1:
        return x.sum().reshape(side)
    rows = x.movedim(axis, 0)
    return rows.reshape(*side, slice_size(x.shape, axis) // max(math.prod(side[1:]), 1)).sum(-1)


def scale_bytes(scale: Tensor) -> int:
    """Bytes of scales: one each where all are powers of two (the exponent says it), else theirs."""
    mantissa, _ = torch.frexp(scale.detach().float())
    return scale.numel() * (1 if bool((mantissa == 0.5).all()) else scale.element_size())
