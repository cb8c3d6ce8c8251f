"""Codebook: every element is the number of one of a few values, for the tensor or a run of slices.

Han et al., "Deep Compression" (arXiv 1510.00149). Codes are numbered outwards from the value next
to zero, so that code 0 stands in the middle of the codes as 0 stands in the middle of the weights:
that is what a coder of integers predicts best. The exact zeros of a sparse tensor are code 0 and
stay zero whatever happens to the values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.forms.base import Form


@dataclass(frozen=True)
class Codebook(Form):
    """Integer codes that point into a list of values.

    Attributes:
        codes: any shape, int8 (int16 where the numbers do not fit), from `low` on.
        values: float, `[width]` for the whole tensor, or `[books, width]`, one row for every
            `group` slices of `axis`; ascending, padded with zeros where a row has fewer.
        axis: the axis the rows belong to, or None.
        group: how many slices of `axis` share a row; the last row may have fewer.
        low: the code of the first value of a row.
        zero: code 0 means exactly 0, whatever stands at its place, and takes no gradient.
    """

    kind: ClassVar[str] = "codebook"

    codes: Tensor
    values: Tensor
    axis: int | None
    group: int
    low: int
    zero: bool

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "values": self.values}

    def meta(self) -> dict[str, Any]:
        return {"axis": self.axis, "group": self.group, "low": self.low, "zero": self.zero}

    def decode(self) -> Tensor:
        return decode(self.codes, self.values, self.axis, self.group, self.low, self.zero)

    def nbytes(self) -> int:
        bits = max(1, math.ceil(math.log2(max(self.values.shape[-1], 1))))
        packed = (self.codes.numel() * bits + 7) // 8
        return packed + self.values.numel() * self.values.element_size()

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Codebook":
        held = meta["axis"], meta["group"], meta["low"], meta["zero"]
        return cls(tensors["codes"], tensors["values"], *held)


def fits(codes: Tensor, values: Tensor, axis: int | None, group: int) -> str:
    """What is wrong with the shapes of a codebook's parts, in words; empty if nothing is."""
    if axis is None:
        return "" if values.ndim == 1 else f"values of shape {list(values.shape)} without an axis"
    if not -codes.ndim <= axis < codes.ndim or group < 1:
        return f"axis {axis} and group {group} for codes of shape {list(codes.shape)}"
    books = -(-codes.shape[axis] // group)
    if values.ndim == 2 and values.shape[0] == books:
        return ""
    return f"values of shape {list(values.shape)}, expected [{books}, width]"


def places(codes: Tensor, values: Tensor, axis: int | None, group: int, low: int) -> Tensor:
    """Where each element's value stands in `values.flatten()`: int64, the shape of `codes`."""
    found = codes.long() - low
    if axis is None:
        return found
    rows = torch.arange(codes.shape[axis], device=codes.device) // group
    shape = [1] * codes.ndim
    shape[axis] = -1
    return found + (rows * values.shape[1]).reshape(shape)


def decode(
    codes: Tensor, values: Tensor, axis: int | None, group: int, low: int, zero: bool
) -> Tensor:
    """The value of every code, in the dtype of `values`."""
    found = torch.take(values, places(codes, values, axis, group, low))
    return found.masked_fill_(codes == 0, 0.0) if zero else found


def gradient(
    grad: Tensor, codes: Tensor, values: Tensor, axis: int | None, group: int, low: int, zero: bool
) -> Tensor:
    """The gradient of `values`: of each, the sum over the elements that point to it."""
    if zero:
        grad = grad.masked_fill(codes == 0, 0.0)
    where = places(codes, values, axis, group, low).reshape(-1)
    summed = torch.zeros(values.numel(), dtype=grad.dtype, device=grad.device)
    return summed.index_add_(0, where, grad.reshape(-1)).reshape(values.shape)


def nearest(
    x: Tensor, books: Sequence[Tensor], axis: int | None, group: int, zero: bool
) -> Codebook:
    """Every element of `x` as the nearest of its book's values.

    Args:
        x: float, any shape.
        books: ascending values, a list for the whole tensor (`axis` None) or for every `group`
            slices of `axis`. With `zero` they hold no 0.
        axis: the axis the books belong to.
        group: slices of `axis` with the same book.
        zero: exact zeros of `x` are kept, and nothing else becomes zero.
    """
    rounded = [book.to(x.dtype).sort().values for book in books]
    pieces = [x] if axis is None else list(x.split(group, axis))
    below = [_below(book, zero, axis is None) for book in rounded]
    low = -max(below)
    above = [len(book) - n for book, n in zip(rounded, below, strict=True)]
    width = max(above) - low + int(zero)
    values = x.new_zeros((len(rounded), width))
    codes: list[Tensor] = []
    for row, (piece, book, n) in enumerate(zip(pieces, rounded, below, strict=True)):
        borders = (book[1:].double() + book[:-1].double()) / 2
        code = torch.bucketize(piece.double().contiguous(), borders) - n
        values[row, -low - n : -low] = book[:n]
        start = -low + int(zero)
        values[row, start : start + len(book) - n] = book[n:]
        if zero:
            code = torch.where(piece == 0, 0, torch.where(code >= 0, code + 1, code))
        codes.append(code)
    every = codes[0] if axis is None else torch.cat(codes, axis)
    high = low + width - 1
    kept = every.to(torch.int8 if low >= -128 and high <= 127 else torch.int16)
    return Codebook(kept, values[0] if axis is None else values, axis, group, low, zero)


def _below(book: Tensor, zero: bool, alone: bool) -> int:
    """How many values get negative codes.

    Beside other rows the middle one is code 0, so that no row needs padding.
    """
    if zero:
        return int((book < 0).sum())
    if not alone:
        return len(book) // 2
    return int(book.abs().argmin()) if len(book) else 0
