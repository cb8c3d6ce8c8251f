"""Hashed: every position of a tensor falls into one of a few buckets, which hold the values.

Chen et al., "Compressing Neural Networks with the Hashing Trick" (arXiv 1504.04788): a hash of the
position chooses the bucket and a sign, so nothing is stored but the buckets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.forms.base import Form

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
SHARING = 1 << 16
"""Most positions a bucket, on the average: a few bytes cannot ask for a tensor of any size."""


@dataclass(frozen=True)
class Hashed(Form):
    """Bucket values; where each is used follows from the shape and the seed.

    Attributes:
        values: float `[buckets]`.
        shape: of the tensor.
        seed: of the hash, 0 to 2^32 - 1.
    """

    kind: ClassVar[str] = "hashed"

    values: Tensor
    shape: tuple[int, ...]
    seed: int

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "seed": self.seed}

    def decode(self) -> Tensor:
        return decode(self.values, self.shape, self.seed)

    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Hashed":
        return cls(tensors["values"], tuple(meta["shape"]), meta["seed"])


def fits(values: Tensor, shape: Sequence[int], seed: int) -> str:
    """What is wrong with the parts, in words; empty if nothing is."""
    if values.ndim != 1 or not 1 <= values.numel() <= _MASK:
        return f"buckets of shape {list(values.shape)}, expected [buckets]"
    if math.prod(shape) > SHARING * values.numel():
        return f"{values.numel()} buckets for a shape of {list(shape)}, at least 1 in {SHARING}"
    return "" if 0 <= seed <= _MASK else f"a seed of {seed}, expected 0 to {_MASK}"


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 (Appleby, public domain), 32 bits held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def places(
    count: int, buckets: int, seed: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Bucket and sign of the positions 0 to `count` - 1: int64 and truth values (negative)."""
    position = torch.arange(count, device=device)
    drawn = _mixed(_mixed((position + (_GOLDEN * (seed + 1) & _MASK)) & _MASK) ^ seed)
    # the highest bits choose the bucket, without division: floor(drawn * buckets / 2^32)
    high, low = drawn >> 16, drawn & 0xFFFF
    bucket = (high * buckets + ((low * buckets) >> 16)) >> 16
    return bucket, (_mixed(drawn ^ _GOLDEN) & 1).bool()


def decode(values: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """The tensor, in the dtype of `values`."""
    bucket, negative = places(math.prod(shape), values.numel(), seed, values.device)
    found = values.index_select(0, bucket)
    return torch.where(negative, -found, found).reshape(list(shape))


def gathered(x: Tensor, buckets: int, seed: int) -> Tensor:
    """Of every bucket the signed sum of the elements of `x` that fall into it: `[buckets]`."""
    bucket, negative = places(x.numel(), buckets, seed, x.device)
    flat = x.reshape(-1)
    summed = torch.zeros(buckets, dtype=x.dtype, device=x.device)
    return summed.index_add_(0, bucket, torch.where(negative, -flat, flat))


def fitted(x: Tensor, buckets: int, seed: int, weights: Tensor | None = None) -> Tensor:
    """The values with the least (weighted) squared distance from `x`; 0 in empty buckets."""
    counted = torch.ones_like(x, dtype=torch.float64) if weights is None else weights.double()
    bucket, _ = places(x.numel(), buckets, seed, x.device)
    mass = torch.zeros(buckets, dtype=torch.float64, device=x.device)
    mass.index_add_(0, bucket, counted.reshape(-1))
    total = gathered(x.double() * counted, buckets, seed)
    return torch.where(mass > 0, total / mass.clamp(min=1e-300), 0.0).to(x.dtype)
