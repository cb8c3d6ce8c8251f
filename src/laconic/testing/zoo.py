"""A zoo of small awkward models: what a tool for real networks stumbles over, one model each.

>>> model, inputs = make("plain_cnn")
>>> model(*inputs).shape
torch.Size([2, 5])
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from laconic.program.capture import capture
from laconic.program.program import Program
from laconic.testing import zoo_attention, zoo_convolution, zoo_linear

Inputs: TypeAlias = tuple[Tensor, ...]
Builder: TypeAlias = Callable[[], tuple[nn.Module, Inputs]]

_FAMILIES = (zoo_linear, zoo_convolution, zoo_attention)
ZOO: dict[str, Builder] = {
    name: build for module in _FAMILIES for name, build in module.ZOO.items()
}


def names() -> list[str]:
    """Names of all models."""
    return list(ZOO)


def make(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """The model `name` in eval mode with example inputs; the global generator is left as it was.

    All tensors are random and of ordinary size (norms and their statistics too), so that every
    slice of every tensor matters to the output.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = ZOO[name]()
    return shake(model, seed), inputs


def captured(name: str) -> Program:
    """The model `name` as a Program of its own; it is captured once in a process."""
    return copy.deepcopy(_captured(name))


@functools.cache
def _captured(name: str) -> Program:
    return capture(*make(name))


def shake(model: nn.Module, seed: int = 0, keep: Sequence[str] = ()) -> nn.Module:
    """Give every parameter and every running statistic a random value of ordinary size, in place.

    Matrices and filters keep unit gain; vectors that were constant (norm weights, biases) move
    around what they were. Names in `keep` stay. Returns the model in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or name in keep:
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() * 0.5 + 0.5)
            elif isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                tensor.copy_(noise / max(tensor[0].numel(), 1) ** 0.5)
            elif isinstance(tensor, nn.Parameter) or name.endswith("running_mean"):
                tensor.add_(noise.to(tensor.dtype) * 0.2)
    return model.eval()
