"""Basis: a tensor as a weighted sum of a few tensors that other tensors are sums of as well.

The basis is stored once for a family of tensors, the coefficients once for each member: what is
learned in common and what is a member's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.forms.base import Form


@dataclass(frozen=True)
class Basis(Form):
    """A linear combination of shared tensors.

    Attributes:
        coefficients: float `[rank]`, this tensor's own.
        basis: float `[rank, *shape]`, shared by the family.
    """

    kind: ClassVar[str] = "basis"

    coefficients: Tensor
    basis: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"coefficients": self.coefficients, "basis": self.basis}

    def meta(self) -> dict[str, Any]:
        return {}

    def decode(self) -> Tensor:
        return decode(self.coefficients, self.basis)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Basis":
        del meta
        return cls(tensors["coefficients"], tensors["basis"])


def decode(coefficients: Tensor, basis: Tensor) -> Tensor:
    """`sum over r of coefficients[r] * basis[r]`: `[rank]`, `[rank, *shape]` → `[*shape]`."""
    return torch.mv(basis.flatten(1).T, coefficients).reshape(basis.shape[1:])
