"""Vectors: runs of elements as numbers of a few short vectors, one list for one tensor or several.

Product quantisation (Jégou et al. 2011) of weights, as in Stock et al., "And the bit goes down"
(arXiv 1907.05686): the rows of a weight are cut into runs of equal length, each run is stored as
the number of the vector that stands for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.forms.base import Form

_PIECE = 1 << 22  # distances that are held at once


@dataclass(frozen=True)
class Vectors(Form):
    """Integer codes that point into a list of vectors.

    Attributes:
        codes: `[rows, runs]`, uint8 (int16 where the numbers do not fit), from 0 on.
        values: float `[count, length]`.
        shape: of the tensor; `rows` is its size on `axis`, `runs * length` everything else.
        axis: the axis whose slices are the rows, their elements in row-major order.
    """

    kind: ClassVar[str] = "vectors"

    codes: Tensor
    values: Tensor
    shape: tuple[int, ...]
    axis: int

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "values": self.values}

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "axis": self.axis}

    def decode(self) -> Tensor:
        return decode(self.codes, self.values, self.shape, self.axis)

    def nbytes(self) -> int:
        bits = max(1, math.ceil(math.log2(max(len(self.values), 1))))
        packed = (self.codes.numel() * bits + 7) // 8
        return packed + self.values.numel() * self.values.element_size()

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Vectors":
        return cls(tensors["codes"], tensors["values"], tuple(meta["shape"]), meta["axis"])


def fits(codes: Tensor, values: Tensor, shape: Sequence[int], axis: int) -> str:
    """What is wrong with the shapes of the parts, in words; empty if nothing is."""
    if not -len(shape) <= axis < len(shape):
        return f"axis {axis} for a tensor of shape {list(shape)}"
    if codes.ndim != 2 or values.ndim != 2:
        return f"codes and vectors of shapes {list(codes.shape)}, {list(values.shape)}"
    rows, found = shape[axis], (codes.shape[0], codes.shape[1] * values.shape[1])
    if found == (rows, math.prod(shape) // max(rows, 1)):
        return ""
    return f"{list(codes.shape)} runs of {values.shape[1]} for a tensor of shape {list(shape)}"


def runs_of(x: Tensor, length: int, axis: int) -> Tensor:
    """`[rows, runs, length]`, in the order of the codes."""
    return x.movedim(axis, 0).reshape(x.shape[axis], -1, length)


def _from_runs(runs: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    others = [size for place, size in enumerate(shape) if place != axis % len(shape)]
    return runs.reshape(shape[axis], *others).movedim(0, axis).contiguous()


def decode(codes: Tensor, values: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """The tensor, in the dtype of `values`."""
    found = values.index_select(0, codes.reshape(-1).long())
    return _from_runs(found, shape, axis)


def gradient(grad: Tensor, codes: Tensor, values: Tensor, axis: int) -> Tensor:
    """The gradient of `values`: of each vector, the sum over the runs that point to it."""
    runs = runs_of(grad, values.shape[1], axis).reshape(-1, values.shape[1])
    summed = torch.zeros(values.shape, dtype=grad.dtype, device=grad.device)
    return summed.index_add_(0, codes.reshape(-1).long(), runs)


def nearest(runs: Tensor, values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The number of the closest vector of every run: int64 `[runs]`.

    Args:
        runs: `[runs, length]`.
        values: `[count, length]`.
        weights: what a squared error counts, `[runs, length]`; None: all alike.
    """
    length = -1 if weights is None else runs.shape[1]
    step = max(1, _PIECE // max(1, len(values) * abs(length)))
    found: list[Tensor] = []
    for start in range(0, len(runs), step):
        x = runs[start : start + step]
        if weights is None:
            cost = values.square().sum(1) - 2 * (x @ values.T)
        else:
            w = weights[start : start + step]
            cost = w @ values.square().T - 2 * ((w * x) @ values.T)
        found.append(cost.argmin(1))
    return torch.cat(found) if found else runs.new_zeros(0, dtype=torch.int64)


def code_type(count: int) -> torch.dtype:
    """The smallest type for numbers below `count`."""
    return torch.uint8 if count <= 256 else torch.int16 if count <= 32768 else torch.int32
