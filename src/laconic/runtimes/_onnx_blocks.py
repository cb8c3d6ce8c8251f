"""Weights of matrix products with a scale for every group: DequantizeLinear in blocks.

The exporter writes rows of one group each and a Reshape, which any runtime decodes. In front of a
matrix product, ONNX Runtime (MatMulNBits) and OpenVINO (compressed weights) have kernels that read
the integers themselves, of 4 bits as well; they look for a DequantizeLinear with a block size
(operator set 21) and nothing behind it.
"""

from typing import Any

import numpy as np

from laconic.runtimes._onnx_constants import drop_unused, stored

_IR = Any  # onnx_ir objects: loose stubs
_OPERATORS = 21
_BLOCKS = (16, 32, 64, 128, 256)  # what the kernels know


def blocked_weights(model: _IR) -> None:
    """Rewrite every such MatMul and Gemm in place; what does not fit keeps its Reshape."""
    graph = model.graph
    if any(node.op_type == "GroupNormalization" for node in graph):
        return  # which means something else from operator set 21 on
    for node in list(graph):
        if node.op_type in ("MatMul", "Gemm") and _plain(node):
            chain = _chain(node)
            if chain is not None:
                _rewrite(graph, node, *chain)
                model.opset_imports[""] = max(_OPERATORS, model.opset_imports[""])
                model.ir_version = max(10, model.ir_version or 10)


def _plain(node: _IR) -> bool:
    """Whether a Gemm is a product with a turned weight plus a bias, nothing scaled."""
    if node.op_type == "MatMul":
        return True
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    scaled = found.get("alpha", 1) != 1 or found.get("beta", 1) != 1
    return bool(found.get("transB", 0)) and not found.get("transA", 0) and not scaled


def _chain(node: _IR) -> tuple[list[_IR], int, int] | None:
    """The nodes that decode the weight, the last first, and outputs and groups of the product."""
    nodes = [node.inputs[1].producer()]
    if node.op_type == "MatMul":
        if nodes[0] is None or nodes[0].op_type != "Transpose":
            return None
        if "perm" in nodes[0].attributes and list(nodes[0].attributes["perm"].as_ints()) != [1, 0]:
            return None
        nodes.append(nodes[0].inputs[0].producer())
    reshape = nodes[-1]
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[1].const_value is None:
        return None
    decode = reshape.inputs[0].producer()
    if decode is None or decode.op_type != "DequantizeLinear":
        return None
    nodes.append(decode)
    if any(value.const_value is None for value in decode.inputs):
        return None
    if any(len(each.outputs[0].uses()) != 1 for each in nodes):
        return None
    codes = decode.inputs[0].const_value.numpy()
    shape = [int(size) for size in reshape.inputs[1].const_value.numpy()]
    fits = codes.ndim == 2 and len(shape) == 2 and codes.shape[1] in _BLOCKS and min(shape) > 0
    if not fits or codes.dtype not in (np.int8, np.uint8) or decode.inputs[1].const_value.size < 2:
        return None
    return nodes, shape[0], shape[1] // codes.shape[1]


def _rewrite(graph: _IR, node: _IR, nodes: list[_IR], outputs: int, groups: int) -> None:
    import onnx_ir as ir

    decode = nodes[-1]
    codes, scale, *zero = (value.const_value.numpy() for value in decode.inputs)
    block = codes.shape[1]
    kind = _type(codes, zero)
    parts = [codes.reshape(outputs, groups * block).T, scale.reshape(outputs, groups).T]
    if zero and zero[0].any():
        parts.append(zero[0].reshape(outputs, groups).T)
    values = [
        stored(graph, f"{value.name}_blocks", part, None if number == 1 else kind)
        for number, (value, part) in enumerate(zip(decode.inputs, parts, strict=False))
    ]
    size = [ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", block)]
    made = ir.Node("", "DequantizeLinear", values, size)
    product = ir.Node("", "MatMul", [node.inputs[0], made.outputs[0]])
    added = [made, product]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        added.append(ir.Node("", "Add", [product.outputs[0], node.inputs[2]]))
    graph.insert_before(node, added)
    node.outputs[0].replace_all_uses_with(added[-1].outputs[0], replace_graph_outputs=True)
    held = list(decode.inputs) + [each.inputs[1] for each in nodes if each.op_type == "Reshape"]
    for gone in (node, *nodes):
        graph.remove(gone, safe=True)
    drop_unused(graph, held)


def _type(codes: Any, zero: list[Any]) -> _IR:
    """The smallest of ONNX's integer types that holds codes and zero points."""
    import onnx_ir as ir

    low = min(int(part.min()) for part in (codes, *zero))
    high = max(int(part.max()) for part in (codes, *zero))
    if low >= -8 and high <= 7:
        return ir.DataType.INT4
    if low >= 0 and high <= 15:
        return ir.DataType.UINT4
    return ir.DataType.INT8 if codes.dtype == np.int8 else ir.DataType.UINT8
