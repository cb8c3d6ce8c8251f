"""Samples of a batch: picked, padded to a shape, cut back, and put together again."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from laconic.engine.buckets import Sizes
from laconic.runtimes.base import Array
from laconic.solvers.dynamic.padding import BATCH


def shaped(array: Array, shape: Sequence[Any], rows: Array | None, wanted: Sizes) -> Array:
    """Some samples of an input, cut and padded: zeros, and the last sample again."""
    if rows is not None and BATCH in shape:
        array = array.take(rows, axis=shape.index(BATCH))
    target = tuple(wanted[size] if isinstance(size, str) else size for size in shape)
    if array.shape == target:
        return array
    kept = tuple(map(min, zip(array.shape, target, strict=True)))
    part = tuple(map(slice, kept))
    made = np.zeros(target, array.dtype)
    made[part] = array[part]
    if BATCH in shape:
        axis = shape.index(BATCH)
        if kept[axis] < target[axis]:
            above = (slice(None),) * axis
            made[*above, kept[axis] :] = made[*above, kept[axis] - 1 : kept[axis]]
    return made


def cut(array: Array, dims: Mapping[int, str], sizes: Sizes) -> Array:
    """An output without what padding added."""
    if all(array.shape[dim] == sizes[name] for dim, name in dims.items()):
        return array
    return array[tuple(slice(sizes.get(dims.get(dim, ""))) for dim in range(array.ndim))]


def axis_of(dims: Mapping[int, str]) -> int:
    """Where the batch is."""
    return next(dim for dim, name in dims.items() if name == BATCH)


def joined(parts: Sequence[Array], rows: Sequence[Array], axis: int) -> Array:
    """Samples of several parts, back at their places."""
    shape = list(parts[0].shape)
    shape[axis] = sum(map(len, rows))
    made = np.empty(shape, parts[0].dtype)
    for part, row in zip(parts, rows, strict=True):
        made[(slice(None),) * axis + (row,)] = part
    return made
