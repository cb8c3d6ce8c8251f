"""Mixed precision and memory layout: what makes a step fast without changing what is learned.

Weights, their gradients, the optimizer and normalisation statistics stay in float32; convolutions
and matrix products run in bfloat16 under autocast. Images lie channels-last, the layout that CPU
and GPU convolution kernels want. Attention stays in float32 on a CPU: torch's backward pass of it
in bfloat16 took ten times as long there (165 against 17 ms a step of a six-layer MiniLM).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laconic.program.program import Program

_LOW = (torch.bfloat16, torch.float16)
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@contextmanager
def autocast(device: torch.device, precision: str) -> Generator[None, None, None]:
    """Autocast to bfloat16 for precision "bf16", nothing for "fp32"."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        if precision == "bf16" and device.type == "cpu":
            with _AttentionInFloat32():
                yield
        else:
            yield


class _AttentionInFloat32(TorchFunctionMode):
    """Scaled dot-product attention leaves autocast."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not _ATTENTION:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            named = {key: _wide(value) for key, value in (kwargs or {}).items()}
            return func(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _LOW else value


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
    for tensor in (*program.parameters(), *program.buffers()):
        if tensor.ndim == 4:  # `Module.to` tries 5-d ones too (layers that share a basis) and fails
            tensor.data = tensor.data.to(memory_format=layout)


def in_float32(values: Sequence[Tensor]) -> list[Tensor]:
    """bfloat16 and float16 values as float32, others as they are."""
    return [_wide(value) for value in values]
