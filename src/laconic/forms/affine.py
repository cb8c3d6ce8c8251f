"""Uniform integer grid: `value = (code - zero_point) * scale`, per tensor, slice or run of a slice.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (arXiv 1712.05877); the gradient of the scale is LSQ's (Esser et al., arXiv 1902.08153).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.core.errors import StorageError
from laconic.forms._sides import scale_bytes, spread
from laconic.forms._sides import slice_size as slice_size
from laconic.forms.base import Form


@dataclass(frozen=True)
class Affine(Form):
    """Integer codes on a uniform grid.

    Attributes:
        codes: any shape, int8 (int16, int32 where the grid does not fit), values in [qmin, qmax].
        scale: float32, `[]` for the whole tensor, `[codes.shape[axis]]`, or `[n, g]` for `g`
            equal runs of each slice of `axis`; positive.
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
        zero_points = self.zero_point.numel() * bits if bool(self.zero_point.any()) else 0
        return packed + scale_bytes(self.scale) + (zero_points + 7) // 8

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


def encode(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    """Codes of `x`, rounded half to even, clamped, in the smallest signed type.

    Raises:
        StorageError: a value is NaN or infinite.
    """
    if not bool(torch.isfinite(x).all()):
        raise StorageError("NaN or infinite values have no code")
    s, z = spread(scale, axis, x.shape), spread(zero_point, axis, x.shape)
    codes = (torch.round(x / s) + z).clamp(qmin, qmax)
    return codes.to(code_type(qmin, qmax))


def grid_of(x: Tensor, bits: int, per_token: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32, of the unsigned grid over the range of `x`, zero included.

    `x` has elements. One range, or with `per_token` one for each run of the last dimension.
    """
    dims = [x.ndim - 1] if per_token else list(range(x.ndim))
    low, high = (x.float().amin(dims, True), x.float().amax(dims, True)) if dims else (x, x)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low).float() / (2**bits - 1)
    scale = torch.where(step == 0, 1.0, step)  # a range of denormals has no step either
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def code_type(qmin: int, qmax: int) -> torch.dtype:
    """The smallest signed type that holds [qmin, qmax]."""
    for kind in (torch.int8, torch.int16):
        if qmin >= torch.iinfo(kind).min and qmax <= torch.iinfo(kind).max:
            return kind
    return torch.int32


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """`(codes - zero_point) * scale` in the dtype of `scale`."""
    s, z = spread(scale, axis, codes.shape), spread(zero_point, axis, codes.shape)
    return (codes.to(scale.dtype) - z.to(scale.dtype)) * s
