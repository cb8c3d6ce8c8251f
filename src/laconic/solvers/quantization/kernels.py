"""Which weights on grids a runtime computes with, and which it decodes to floats."""

from typing import Any

from torch import Tensor, fx

from laconic.forms import affine
from laconic.program.normalize import base_name
from laconic.program.program import DEQUANTIZE, FAKE_LEVELS, FAKE_QUANTIZE, LEVELS, Program
from laconic.solvers.quantization.placement import MOVES
from laconic.solvers.quantization.weight_sites import MATRIX, RECURRENT

_BLOCKS = (16, 32, 64, 128, 256)
_NAMED = 3


def without_kernel(program: Program, runtime: str) -> list[str]:
    """A sentence about the weights that are small in the file only; none if all have a kernel.

    Kernels take 8-bit codes whose activations stand on a uniform grid as well; and in ONNX Runtime
    and OpenVINO codes of a linear layer in groups of 16 to 256. Weights of signs behind signs have
    one in Inductor.
    """
    found: list[str] = []
    for node in program.graph.nodes:
        source: Any = node.args[0] if node.args else None
        grid = node.target in (FAKE_QUANTIZE, DEQUANTIZE, FAKE_LEVELS, LEVELS)
        if not grid or not isinstance(source, fx.Node) or source.op != "get_attr":
            continue
        users = [user for user in node.users if base_name(user) in (*MATRIX, *RECURRENT)]
        if users and not all(_has_kernel(program, node, user, runtime) for user in users):
            found.append(str(source.target))
    if not found:
        return []
    named = ", ".join(found[:_NAMED]) + (" and others" if len(found) > _NAMED else "")
    return [
        f"{runtime} has no kernel for {len(found)} of the weights as they stand ({named}): they "
        "are decoded to floats there, so the file gets smaller and nothing faster"
    ]


def _has_kernel(program: Program, node: fx.Node, user: fx.Node, runtime: str) -> bool:
    if base_name(user) in RECURRENT:
        return False
    activation: Any = user.args[MATRIX[base_name(user)][0]]
    while base_name(activation) in MOVES:
        activation = activation.args[0]
    if node.target in (FAKE_LEVELS, LEVELS):
        signs = node.args[-1] == "binary" and activation.target is FAKE_LEVELS
        return runtime == "inductor" and signs and activation.args[-1] == "binary"
    side: Any = node.args[1]
    scale: Tensor = program.tensor(str(side.target))
    if scale.ndim < 2:
        return activation.target is FAKE_QUANTIZE
    source: Any = node.args[0]
    axis: Any = node.args[3]
    group = affine.slice_size(program.tensor(str(source.target)).shape, axis) // scale.shape[1]
    linear = not base_name(user).startswith("conv")
    return linear and group in _BLOCKS and runtime in ("onnxruntime", "openvino")
