"""Uniform integer grid: `value = (code - zero_point) * scale`, per tensor or per slice of an axis.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (arXiv 1712.05877); the gradient of the scale is LSQ's (Esser et al., arXiv 1902.08153).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.forms.base import Form


@dataclass(frozen=True)
class Affine(Form):
    """Integer codes on a uniform grid.

    Attributes:
        codes: any shape, int8 (int32 where the grid does not fit), values in [qmin, qmax].
        scale: float32, `[]` for the whole tensor or `[codes.shape[axis]]`; positive.
        zero_point: int32, the shape of `scale`.
        axis: the axis the scales belong to, or None.
        qmin: lowest code.
        qmax: highest code.
    """

    kind: ClassVar[str] = "affine"

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    qmin: int
    qmax: int

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}

    def meta(self) -> dict[str, Any]:
        return {"axis": self.axis, "qmin": self.qmin, "qmax": self.qmax}

    def decode(self) -> Tensor:
        return decode(self.codes, self.scale, self.zero_point, self.axis)

    def nbytes(self) -> int:
        bits = max(1, math.ceil(math.log2(self.qmax - self.qmin + 1)))
        packed = (self.codes.numel() * bits + 7) // 8
        zero_points = self.zero_point.numel() if bool(self.zero_point.any()) else 0
        return packed + 4 * self.scale.numel() + zero_points

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Affine":
        return cls(
            tensors["codes"],
            tensors["scale"],
            tensors["zero_point"],
            meta["axis"],
            meta["qmin"],
            meta["qmax"],
        )


def along(side: Tensor, axis: int | None, ndim: int) -> Tensor:
    """`side` of shape `[n]` or `[]`, shaped to broadcast along `axis` of a tensor of that rank."""
    if axis is None:
        return side.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return side.reshape(shape)


def encode(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    """Codes of `x`, rounded half to even, clamped: int8 where [qmin, qmax] fits, else int32."""
    s, z = along(scale, axis, x.ndim), along(zero_point, axis, x.ndim)
    codes = (torch.round(x / s) + z).clamp(qmin, qmax)
    return codes.to(torch.int8 if qmin >= -128 and qmax <= 127 else torch.int32)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """`(codes - zero_point) * scale` in the dtype of `scale`."""
    s, z = along(scale, axis, codes.ndim), along(zero_point, axis, codes.ndim)
    return (codes.to(scale.dtype) - z.to(scale.dtype)) * s
