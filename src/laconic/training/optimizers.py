"""Optimizers of a plan: no weight decay on vectors, one kernel for all tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from laconic.training.plan import Plan

_FUSED = ("cpu", "cuda")
_SCALES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")  # move nothing by themselves


def build(plan: Plan, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of a settled plan.

    Biases, normalisation parameters and quantisation scales (dimension 0 or 1) do not decay.
    """
    decay = plan.weight_decay or 0.0
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in _FUSED for p in parameters)
    rate = plan.lr or 0.0
    if plan.optimizer == "sgd":
        nesterov = plan.momentum > 0
        return torch.optim.SGD(
            groups, lr=rate, momentum=plan.momentum, nesterov=nesterov, fused=fused
        )
    return torch.optim.AdamW(groups, lr=rate, betas=(plan.momentum, 0.999), fused=fused)


def clip(parameters: Sequence[Tensor], largest: float | None) -> None:
    """Scale gradients down to a norm of `largest`; None leaves them."""
    if largest is not None:
        torch.nn.utils.clip_grad_norm_(list(parameters), largest)


def forget(optimizer: torch.optim.Optimizer, parameter: Tensor, gone: Tensor) -> None:
    """Make an optimizer that has moved weights stop moving those that were pruned since.

    A gradient of zero holds a pruned weight only where there is no momentum from before.

    Args:
        optimizer: its moving averages of gradients become zero where `gone` is True; those of
            squares stay, they only scale.
        parameter: one of its tensors.
        gone: bool of the parameter's shape: the weights that are zero from now on.
    """
    held = optimizer.state.get(parameter, {})
    for key, value in held.items():
        if key not in _SCALES and isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(gone, 0.0)
