"""Rows of a quantised table: looked up as codes, then decoded.

What the exporter writes is Gather of a DequantizeLinear, which decodes the whole table: ONNX
Runtime at every call, OpenVINO when it compiles, into floats that each compiled shape holds anew.
Decoding only what was looked up gives the same numbers. (With a scale for each column of the table,
OpenVINO 2026.4 even wrote beyond its memory.)
"""

from typing import Any

import numpy as np

from laconic.runtimes._onnx_constants import drop_unused, stored

_IR = Any  # onnx_ir objects: loose stubs


def decode_what_is_looked_up(model: _IR) -> None:
    """Turn every Gather of a DequantizeLinear around, in place, where the codes are stored."""
    graph = model.graph
    for node in list(graph):
        table = node.inputs[0].producer() if node.op_type == "Gather" else None
        if table is not None and table.op_type == "DequantizeLinear" and _fits(node, table):
            _turn(graph, node, table)


def _fits(node: _IR, table: _IR) -> bool:
    """Whole rows of 8-bit integers, whose scales are not those of blocks."""
    if any(value is None or value.const_value is None for value in table.inputs):
        return False
    codes, scale = (value.const_value.numpy() for value in table.inputs[:2])
    rows = _axis(node, 0) % codes.ndim == 0
    return rows and scale.ndim < 2 and codes.dtype in (np.int8, np.uint8)


def _axis(node: _IR, otherwise: int) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else otherwise


def _turn(graph: _IR, node: _IR, table: _IR) -> None:
    import onnx_ir as ir

    def add(kind: str, *inputs: _IR, **attributes: int) -> _IR:
        held = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        made = ir.Node("", kind, inputs, held)
        graph.insert_before(node, made)
        return made.outputs[0]

    held, rows = list(table.inputs), node.inputs[1]
    made = add("Gather", held[0], rows)
    dims = held[0].const_value.numpy().ndim
    axis = _axis(table, 1) % dims
    if held[1].const_value.numpy().ndim == 0:
        made = add("DequantizeLinear", made, *held[1:])
    elif axis:
        made = add("DequantizeLinear", made, *held[1:], axis=axis - dims)
    else:
        made = add("Cast", made, to=int(ir.DataType.FLOAT))
        *zero, scale = (_beside(graph, side, dims, rows, add) for side in held[:0:-1])
        if zero:
            made = add("Sub", made, add("Cast", zero[0], to=int(ir.DataType.FLOAT)))
        made = add("Mul", made, scale)
    node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if not table.outputs[0].uses():
        graph.remove(table, safe=True)
    drop_unused(graph, held)


def _beside(graph: _IR, side: _IR, dims: int, rows: _IR, add: Any) -> _IR:
    """What rows have beside their codes, shaped to be spread over them."""
    wide = side.const_value.numpy().reshape(-1, *[1] * (dims - 1))
    return add("Gather", stored(graph, f"{side.name}_rows", wide), rows)
