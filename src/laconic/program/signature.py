"""How a model's arguments and outputs nest around the flat tensors of its graph.

A structure is plain data, so that it can be stored: a leaf is `{"tensor": i}` or `{"constant": v}`,
a nest is `{"tuple": [...]}`, `{"list": [...]}`, `{"dict": {...}}` or `{"record": {...}}` (a
dataclass, a named tuple or a Hugging Face `ModelOutput`). A record comes back as the class it was
while that class is at hand, and as a `Record` after loading: names from a file are never imported.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from laconic.core.errors import DataError
from laconic.core.suggest import nearest

Structure = dict[str, Any]
_CONSTANTS = (bool, int, float, str, type(None))


class Record(dict[str, Any]):
    """An output with named fields: by name, by attribute, or by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return tuple(value for value in self.values() if value is not None)[key]
        return super().__getitem__(key)


def describe(value: Any, leaves: list[Tensor], classes: dict[str, type]) -> Structure:
    """The structure of `value`; tensors are appended to `leaves`, record classes to `classes`.

    Raises:
        TypeError: a leaf that is neither a tensor nor a plain constant.
    """

    def below(items: Mapping[str, Any]) -> dict[str, Structure]:
        return {str(key): describe(item, leaves, classes) for key, item in items.items()}

    if isinstance(value, Tensor):
        leaves.append(value)
        return {"tensor": len(leaves) - 1}
    if isinstance(value, _CONSTANTS):
        return {"constant": value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        classes[type(value).__qualname__] = type(value)
        return {"record": below(fields), "class": type(value).__qualname__}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        classes[type(value).__qualname__] = type(value)
        return {"record": below(value._asdict()), "class": type(value).__qualname__}  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return {"dict": below(value)}
    if isinstance(value, (tuple, list)):
        items = [describe(item, leaves, classes) for item in value]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    raise TypeError(f"{type(value).__name__} is neither a tensor nor a plain constant")


def rebuild(structure: Structure, leaves: Sequence[Any], classes: Mapping[str, type]) -> Any:
    """The value whose structure and tensors are given."""
    if "tensor" in structure:
        return leaves[structure["tensor"]]
    if "constant" in structure:
        return structure["constant"]
    if "tuple" in structure:
        return tuple(rebuild(item, leaves, classes) for item in structure["tuple"])
    if "list" in structure:
        return [rebuild(item, leaves, classes) for item in structure["list"]]
    if "dict" in structure:
        return {key: rebuild(item, leaves, classes) for key, item in structure["dict"].items()}
    fields = {key: rebuild(item, leaves, classes) for key, item in structure["record"].items()}
    made = classes.get(structure["class"])
    return made(**fields) if made else Record(fields)


def flatten(structure: Structure, value: Any, out: list[Any], where: str) -> None:
    """Put the tensors of `value`, nested as `structure` says, into `out`.

    Raises:
        DataError: the value nests differently.
    """
    if "tensor" in structure:
        if not isinstance(value, Tensor):
            raise DataError(f"found {type(value).__name__}, expected a tensor", where=where)
        out[structure["tensor"]] = value
    elif "constant" in structure:
        if value != structure["constant"]:
            raise DataError(
                f"was captured as {structure['constant']!r} and is fixed, found {value!r}",
                where=where,
                hint="capture again with this value",
            )
    elif "dict" in structure or "record" in structure:
        items = structure.get("dict") or structure.get("record") or {}
        given = value if isinstance(value, Mapping) else vars(value)
        for key, item in items.items():
            if key not in given:
                raise DataError(f"has no entry {key!r}", where=where)
            flatten(item, given[key], out, f"{where}.{key}")
    else:
        items = structure.get("tuple", structure.get("list", []))
        if not isinstance(value, (tuple, list)) or len(value) != len(items):
            raise DataError(f"expected {len(items)} items", where=where)
        for number, (item, given) in enumerate(zip(items, value, strict=True)):
            flatten(item, given, out, f"{where}[{number}]")


@dataclass(frozen=True)
class Signature:
    """Names and nesting of a Program's arguments and outputs.

    Attributes:
        arguments: argument name → structure, in the order of the model's `forward`.
        output: structure of the output; its tensor leaves index the graph's flat outputs.
        inputs: how many input tensors there are.
        positional: names of the model's positional parameters, in order.
        classes: record classes at hand in this process; not stored.
    """

    arguments: Mapping[str, Structure]
    output: Structure
    inputs: int
    positional: tuple[str, ...] = ()
    classes: Mapping[str, type] = field(default_factory=dict[str, type], compare=False)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The graph's inputs from a call's arguments.

        Raises:
            DataError: an argument is missing, unknown, or of the wrong kind.
        """
        if len(args) > len(self.positional):
            raise DataError(
                f"takes {len(self.positional)} positional arguments, found {len(args)}",
                where="program call",
            )
        given = dict(zip(self.positional, args, strict=False)) | dict(kwargs)
        for name, value in given.items():
            if name not in self.arguments and value is not None:
                raise DataError(
                    f"unknown argument {name!r}",
                    where="program call",
                    hint=f"it was not in the example inputs; {nearest(name, self.arguments)}",
                )
        out: list[Any] = [None] * self.inputs
        for name, structure in self.arguments.items():
            if name not in given and "constant" not in structure:
                raise DataError(f"missing argument {name!r}", where="program call")
            if name in given:
                flatten(structure, given[name], out, name)
        return out

    def arrange(self, leaves: Sequence[Tensor]) -> Any:
        """The output as the model gave it, from the graph's flat outputs."""
        return rebuild(self.output, leaves, self.classes)

    def to_json(self) -> dict[str, Any]:
        """Plain data for storage."""
        return {
            "arguments": dict(self.arguments),
            "output": self.output,
            "inputs": self.inputs,
            "positional": list(self.positional),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Signature":
        """The inverse of `to_json`."""
        return cls(data["arguments"], data["output"], data["inputs"], tuple(data["positional"]))
