"""What a way of writing a tensor down has to offer."""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from laconic.core.errors import StorageError
from laconic.core.registry import names
from laconic.core.suggest import nearest


class Form(ABC):
    """A tensor written down: plain tensors plus small plain metadata.

    A concrete form is a frozen dataclass in a file of its own named after its `kind`. Size,
    storage and every exporter read forms and never know which method made one.
    """

    kind: ClassVar[str]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by role, for example `codes`, `scale`."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """What else `build` needs, as JSON."""

    @abstractmethod
    def decode(self) -> Tensor:
        """The tensor that the operators use, float."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the stored tensors, packed to whole bits, before any entropy coding."""

    @classmethod
    @abstractmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Form":
        """The inverse of `tensors` and `meta`."""


def kinds() -> list[str]:
    """Names of all forms: one file each."""
    return [name for name in names("laconic.forms") if not name.startswith("operators.")]


def form_class(kind: str) -> type[Form]:
    """The class of the form `kind`.

    Raises:
        StorageError: there is no such form.
    """
    if kind not in kinds():
        raise StorageError(f"unknown form {kind!r}", hint=nearest(kind, kinds()))
    module = importlib.import_module(f"laconic.forms.{kind}")
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, Form) and not inspect.isabstract(value):
            return value
    raise StorageError(f"laconic.forms.{kind} defines no form")


def build(kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Form:
    """A form from its parts."""
    return form_class(kind).from_parts(tensors, meta)
