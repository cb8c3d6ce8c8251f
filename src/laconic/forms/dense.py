"""The plain form: the tensor itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from laconic.forms.base import Form


@dataclass(frozen=True)
class Dense(Form):
    """A tensor stored as it is, any shape and dtype."""

    kind: ClassVar[str] = "dense"

    values: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def meta(self) -> dict[str, Any]:
        return {}

    def decode(self) -> Tensor:
        return self.values

    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Dense":
        del meta
        return cls(tensors["values"])
