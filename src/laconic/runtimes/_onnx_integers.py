"""Products of activations quantised at run time with integer weights, on ONNX's integer operators.

What the exporter writes is DynamicQuantizeLinear, DequantizeLinear and a float product. No runtime
makes integers of that by itself; MatMulInteger and ConvInteger say it, and ONNX Runtime fuses them
with what is around them.
"""

from typing import Any

import numpy as np

from laconic.runtimes._onnx_constants import drop_unused, stored

_IR = Any  # onnx_ir objects: loose stubs


def integer_products(model: _IR) -> None:
    """Rewrite every such MatMul, Gemm and Conv in place; what does not fit stays float."""
    for node in list(model.graph):
        if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
            continue
        activation, weight = (value.producer() for value in node.inputs[:2])
        if _is_dynamic(activation) and _is_stored(weight):
            _rewrite(model.graph, node, activation, weight)


def _is_dynamic(node: _IR) -> bool:
    """A DequantizeLinear of a DynamicQuantizeLinear."""
    if node is None or node.op_type != "DequantizeLinear":
        return False
    source = node.inputs[0].producer()
    return source is not None and source.op_type == "DynamicQuantizeLinear"


def _is_stored(node: _IR) -> bool:
    """A DequantizeLinear of stored bytes without zero points."""
    if node is None or node.op_type != "DequantizeLinear":
        return False
    if any(value.const_value is None for value in node.inputs):
        return False
    codes = node.inputs[0].const_value.numpy()
    return codes.dtype == np.int8 and not any(
        np.any(v.const_value.numpy()) for v in node.inputs[2:]
    )


def _rewrite(graph: _IR, node: _IR, activation: _IR, weight: _IR) -> None:
    codes = weight.inputs[0].const_value.numpy()
    scale = weight.inputs[1].const_value.numpy()
    axis = weight.attributes["axis"].as_int() % codes.ndim if "axis" in weight.attributes else 1
    convolution = node.op_type == "Conv"
    if not convolution:
        if codes.ndim != 2 or not _plain(node):
            return
        if "transB" in node.attributes and node.attributes["transB"].as_int():
            codes, axis = codes.T.copy(), 1 - axis
    if scale.size > 1 and axis != (0 if convolution else 1):
        return
    wide = [1] * (codes.ndim - 1) if convolution else []
    scale = scale.reshape(-1, *wide[1:]) if scale.size > 1 else scale.reshape(())
    _Builder(graph, node, activation.inputs[0].producer(), weight).build(codes, scale)
    held = list(weight.inputs)
    for gone in (node, activation, weight):
        if not any(value.uses() for value in gone.outputs):
            graph.remove(gone, safe=True)
    drop_unused(graph, held)


def _plain(node: _IR) -> bool:
    """Whether a Gemm is a product plus a bias, nothing scaled or turned but the weight."""
    found = {name: node.attributes[name] for name in ("alpha", "beta") if name in node.attributes}
    turned = "transA" in node.attributes and node.attributes["transA"].as_int()
    return not turned and all(value.as_float() == 1 for value in found.values())


class _Builder:
    """Adds operators in front of a node."""

    def __init__(self, graph: _IR, node: _IR, source: _IR, weight: _IR) -> None:
        self.graph, self.node, self.source, self.weight = graph, node, source, weight

    def build(self, codes: Any, scale: Any) -> None:
        """The product in integers, scaled, with its bias; it takes the place of the node."""
        import onnx_ir as ir

        quantised, step, zero = self.source.outputs
        name = self.weight.inputs[0].name
        held = stored(self.graph, f"{name}_integers", codes)
        convolution = self.node.op_type == "Conv"
        kind = "ConvInteger" if convolution else "MatMulInteger"
        kept = self.node.attributes.values() if convolution else ()
        product = self._add(kind, [quantised, held, zero], list(kept))
        product = self._add("Cast", [product], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
        steps = self._add("Mul", [step, stored(self.graph, f"{name}_steps", scale)])
        made = self._add("Mul", [product, steps])
        bias = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if bias is not None:
            if convolution:
                shape = np.array([-1, *[1] * (codes.ndim - 2)], dtype=np.int64)
                bias = self._add("Reshape", [bias, stored(self.graph, f"{name}_shape", shape)])
            made = self._add("Add", [made, bias])
        self.node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)

    def _add(self, kind: str, inputs: list[_IR], attributes: list[_IR] | None = None) -> _IR:
        import onnx_ir as ir

        made = ir.Node("", kind, inputs, attributes or [])
        self.graph.insert_before(self.node, made)
        return made.outputs[0]
