"""Mixed precision and memory layout: what makes a step fast without changing what is learned.

Weights, their gradients, the optimizer and normalisation statistics stay in float32; convolutions
and matrix products run in bfloat16 under autocast. Images lie channels-last, the layout that CPU
and GPU convolution kernels want.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from laconic.program.program import Program

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast to bfloat16 for precision "bf16", nothing for "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def wants_channels_last(program: Program) -> bool:
    """Whether a program has 2-d convolutions."""
    return any(node.target in _CONVOLUTIONS for node in program.graph.nodes)


def laid_out(flat: Sequence[Tensor], device: torch.device, channels_last: bool) -> list[Tensor]:
    """Inputs on a device, 4-d ones channels-last."""
    moved: list[Tensor] = []
    for tensor in flat:
        if channels_last and tensor.ndim == 4:
            tensor = tensor.to(device, memory_format=torch.channels_last)
        moved.append(tensor.to(device))
    return moved


def set_layout(program: nn.Module, channels_last: bool) -> None:
    """Lay 4-d tensors out channels-last, or back in rows."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    program.to(memory_format=layout)  # pyright: ignore[reportCallIssue]


def in_float32(values: Sequence[Tensor]) -> list[Tensor]:
    """bfloat16 and float16 values as float32, others as they are."""
    low = (torch.bfloat16, torch.float16)
    return [value.float() if value.dtype in low else value for value in values]
