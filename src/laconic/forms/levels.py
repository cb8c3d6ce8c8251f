"""Levels: every element is the number of one of a few fixed values, times a scale.

What the uniform grid cannot say: two values (binary), the quantiles of a normal distribution (nf4:
Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E), and small floating-point formats, which are
fine near zero and coarse far from it: fp8 (Micikevicius et al., arXiv 2209.05433), fp4 (with a
scale that is a power of two for every 32 elements this is the MX format: Rouhani et al.,
"Microscaling data formats", arXiv 2310.10537). Codes number the levels upwards, so that their order
is that of the values; codes of a hardware format are one look-up away.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.core.errors import StorageError
from laconic.core.suggest import nearest
from laconic.forms._sides import scale_bytes, spread
from laconic.forms.base import Form


@dataclass(frozen=True)
class Levels(Form):
    """Numbers of fixed levels.

    Attributes:
        codes: any shape, uint8, the number of a level, the lowest being 0.
        scale: float, `[]` for the whole tensor, `[codes.shape[axis]]`, or `[n, g]` for `g` equal
            runs of each slice of `axis`; positive.
        axis: the axis the scales belong to, or None.
        name: of the levels, a key of `NAMES`.
    """

    kind: ClassVar[str] = "levels"

    codes: Tensor
    scale: Tensor
    axis: int | None
    name: str

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}

    def meta(self) -> dict[str, Any]:
        return {"axis": self.axis, "name": self.name}

    def decode(self) -> Tensor:
        return decode(self.codes, self.scale, self.axis, self.name)

    def nbytes(self) -> int:
        packed = (self.codes.numel() * bits(self.name) + 7) // 8
        return packed + scale_bytes(self.scale)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Levels":
        return cls(tensors["codes"], tensors["scale"], meta["axis"], meta["name"])


def _small_floats(exponent: int, mantissa: int, bias: int, largest: float) -> list[float]:
    """Every finite value of a floating-point format, ascending, zero once."""
    found = {0.0}
    for power in range(2**exponent):
        for part in range(2**mantissa):
            lead = 1 if power else 0
            value = math.ldexp(lead + part / 2**mantissa, max(power, 1) - bias)
            if value <= largest:
                found |= {value, -value}
    return sorted(found)


_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
_FLOATS = {
    "fp4_e2m1": (2, 1, 1, 6.0),
    "fp8_e4m3": (4, 3, 7, 448.0),
    "fp8_e5m2": (5, 2, 15, 57344.0),
}
NAMES = ("binary", "nf4", *_FLOATS)
"""The levels there are."""


@cache
def values(name: str) -> tuple[float, ...]:
    """The levels called `name`, ascending; exact in float32.

    Raises:
        StorageError: there are no such levels; names the nearest.
    """
    if name in _FLOATS:
        return tuple(_small_floats(*_FLOATS[name]))
    if name not in NAMES:
        raise StorageError(f"no levels named {name!r}", hint=nearest(name, NAMES))
    return tuple(_NF4) if name == "nf4" else (-1.0, 1.0)


@cache
def borders(name: str) -> tuple[float, ...]:
    """From where on the next level is nearer: `x` belongs to level `i` if `i` borders are ≤ `x`.

    A value in the middle goes to the upper level; of a floating-point format to the one whose last
    bit is 0, as hardware rounds.
    """
    found: list[float] = []
    held = values(name)
    for low, high in zip(held, held[1:], strict=False):
        middle = torch.tensor((low + high) / 2)
        if name in _FLOATS and _is_even(low, name):
            middle = torch.nextafter(middle, torch.tensor(math.inf))
        found.append(float(middle))
    return tuple(found)


def _is_even(value: float, name: str) -> bool:
    """Whether the last bit of the mantissa is 0."""
    _, mantissa, bias, _ = _FLOATS[name]
    _, power = math.frexp(value)
    last = math.ldexp(1.0, max(power - 1, 1 - bias) - mantissa)
    return (abs(value) / last) % 2 == 0


def bits(name: str) -> int:
    """Of a code, packed."""
    return max(1, math.ceil(math.log2(len(values(name)))))


def table(name: str, like: Tensor) -> Tensor:
    """The levels in the dtype and on the device of `like`."""
    return torch.tensor(values(name), dtype=like.dtype, device=like.device)


def positions(x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """`x / scale`: where the elements stand among the levels."""
    return x / spread(scale, axis, x.shape).to(x.dtype)


def numbers(position: Tensor, name: str) -> Tensor:
    """The number of the level next to each position, uint8; beyond the ends the end's.

    A NaN has no level; it gets any.
    """
    if len(values(name)) == 2:
        return (position >= borders(name)[0]).to(torch.uint8)
    wanted = position if position.dtype is torch.float64 else position.float()
    edges = torch.tensor(borders(name), dtype=wanted.dtype, device=wanted.device)
    return torch.bucketize(wanted.contiguous(), edges, out_int32=True, right=True).to(torch.uint8)


def encode(x: Tensor, scale: Tensor, axis: int | None, name: str) -> Tensor:
    """The codes of `x`, uint8.

    Raises:
        StorageError: a value is NaN or infinite.
    """
    if not bool(torch.isfinite(x).all()):
        raise StorageError("NaN or infinite values have no code")
    return numbers(positions(x, scale, axis), name)


def decode(codes: Tensor, scale: Tensor, axis: int | None, name: str) -> Tensor:
    """`levels[codes] * scale` in the dtype of `scale`."""
    return table(name, scale)[codes.int()] * spread(scale, axis, codes.shape)
