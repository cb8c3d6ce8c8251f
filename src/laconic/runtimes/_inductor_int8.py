"""Quantisation nodes in the words that Inductor fuses into oneDNN's integer kernels.

Its patterns (PT2E's) are `quantize_per_tensor` and `dequantize_per_tensor` in front of a
convolution or matrix product whose weight comes from `dequantize_per_channel` of int8 codes with
zero points 0. Activations are unsigned there; a signed grid is the same one moved by its zero
point, so no value changes.
"""

from typing import Any

import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed as _decomposed  # registers the operators

from laconic.runtimes._export import attribute, fetch, is_tensor

_CODES = 256
_READERS = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}
_UNITS = ("avx512_vnni", "avx_vnni", "amx_int8")
pt2e: Any = torch.ops.quantized_decomposed


def missing() -> str:
    """What this processor lacks for integer kernels; empty if nothing."""
    ask = getattr(torch.cpu, "get_capabilities", dict)
    found: dict[str, Any] = ask()
    if any(found.get(name) for name in _UNITS):
        return ""
    return "int8 kernels need a processor with VNNI or AMX instructions"


def spell_weight(module: fx.GraphModule, node: fx.Node) -> bool:
    """A `dequantize` of stored codes as PT2E writes it; False where no kernel would take it."""
    codes, scale, zero_point, axis = node.args
    if not all(is_tensor(part) for part in (codes, scale, zero_point)):
        return False
    stored: Any = codes
    held, step, zero = (fetch(module, side.target) for side in node.all_input_nodes[:3])
    plain = held.dtype is torch.int8 and held.ndim > 1 and not bool(zero.any()) and step.ndim < 2
    if not plain or axis not in (None, 0) or any(u.target not in _READERS for u in node.users):
        return False
    steps = step.detach().reshape(-1).expand(len(held)).contiguous()
    with module.graph.inserting_before(node):
        sides = [
            attribute(module, f"{stored.target}_{name}", tensor)
            for name, tensor in (("steps", steps), ("zeros", torch.zeros(len(held)).long()))
        ]
        made = module.graph.call_function(
            pt2e.dequantize_per_channel.default, (stored, *sides, 0, -128, 127, torch.int8)
        )
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    return True


def spell_activation(module: fx.GraphModule, node: fx.Node) -> bool:
    """A fake quantisation with one scale as PT2E writes it; False where its codes need more."""
    arguments: Any = node.args
    x, scale, zero_point, _, low, high = arguments
    sides = is_tensor(scale) and is_tensor(zero_point)
    if not sides or fetch(module, scale.target).numel() != 1 or high - low >= _CODES:
        return False
    step = float(fetch(module, scale.target).detach())
    zero = int(fetch(module, zero_point.target).detach()) - low
    rest = (step, zero, 0, high - low, torch.uint8)
    if not 0 <= zero < _CODES:
        return False
    with module.graph.inserting_before(node):
        codes = module.graph.call_function(pt2e.quantize_per_tensor.default, (x, *rest))
        made = module.graph.call_function(pt2e.dequantize_per_tensor.default, (codes, *rest))
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    return True
