"""Constants of an ONNX graph."""

from typing import Any

import numpy as np

_IR = Any  # onnx_ir objects: loose stubs


def stored(graph: _IR, name: str, array: Any, kind: _IR | None = None) -> _IR:
    """A new constant of a graph, of ONNX's type `kind` (None: the array's own)."""
    import onnx_ir as ir

    while name in graph.initializers:
        name += "_"
    array = np.ascontiguousarray(array)
    array = array if kind is None else array.astype(kind.numpy())
    held = ir.tensor(array, dtype=kind, name=name)
    made = ir.Value(name=name, const_value=held)
    made.shape, made.type = ir.Shape(array.shape), ir.TensorType(held.dtype)
    graph.initializers[name] = made
    return made


def drop_unused(graph: _IR, values: Any) -> None:
    """Take those constants away that nothing reads any more."""
    for value in values:
        if not value.uses():
            graph.initializers.pop(value.name, None)
