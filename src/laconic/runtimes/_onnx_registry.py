"""Torch's table of ONNX translations, read once in a process instead of once an export.

torch 2.13 parses the source of some 500 translations anew for every export, which took 0.8 s: most
of what the export of a small network takes. What is remembered is only that table; the
translations given to an export go into a copy. Where torch has its table elsewhere, nothing is
remembered and nothing else changes.
"""

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

_PLACE = "torch.onnx._internal.exporter._registration"
_tables: dict[Any, Any] = {}


@contextmanager
def remembered_table() -> Generator[None, None, None]:
    """For the length of a `with` block, `torch.onnx.export` takes a copy of the table it knows."""
    try:
        kind: Any = import_module(_PLACE).ONNXRegistry
        held = vars(kind)["from_torchlib"]
    except (ImportError, AttributeError, KeyError):
        yield
        return

    def copied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        key = (args, tuple(sorted(kwargs.items())))
        if key not in _tables:
            _tables[key] = held.__func__(cls, *args, **kwargs)
        made = cls()
        vars(made).update(vars(_tables[key]))
        made.functions = {name: list(found) for name, found in made.functions.items()}
        return made

    kind.from_torchlib = classmethod(copied)
    try:
        yield
    finally:
        kind.from_torchlib = held
