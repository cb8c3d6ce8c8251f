"""Weights on fp8 levels as what they are in ONNX: fp8 bytes behind a DequantizeLinear.

ONNX Runtime and OpenVINO read them, and compute in floats. Other levels (binary, nf4, fp4) have no
type of their own that both read, and become floats in the file.
"""

from typing import Any

import torch
from torch import fx

from laconic.forms import levels
from laconic.program.program import DEQUANTIZE, FAKE_LEVELS, LEVELS
from laconic.runtimes._export import attribute, fetch, is_tensor

FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@torch.no_grad()
def float8_weights(module: fx.GraphModule) -> None:
    """Replace stored fp8 levels by fp8 tensors and `dequantize`; recompile afterwards."""
    for node in list(module.graph.nodes):
        if node.target not in (FAKE_LEVELS, LEVELS) or node.args[3] not in FLOATS:
            continue
        sources: Any = node.args[:2]
        if not all(is_tensor(source) for source in sources):
            continue
        held, scale = (fetch(module, source.target) for source in sources)
        axis: Any = node.args[2]
        name: Any = node.args[3]
        codes = levels.encode(held, scale, axis, name) if node.target is FAKE_LEVELS else held
        values = levels.table(name, scale)[codes.int()].to(FLOATS[name])
        with module.graph.inserting_before(node):
            stored = attribute(module, f"{sources[0].target}_float8", values)
            zero = torch.zeros(scale.shape, dtype=torch.int8)
            origin = attribute(module, f"{sources[0].target}_zero", zero)
            made = module.graph.call_function(DEQUANTIZE, (stored, sources[1], origin, axis))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
