"""Operators that put values on a grid, uniform or of fixed levels, and that decode them.

`laconic::fake_quantize` and `laconic::fake_levels` work on float tensors with straight-through
gradients, `laconic::dequantize` and `laconic::levels` on what is stored when they are frozen; both
states give the same numbers.
"""

from typing import Any

import torch
from torch import Tensor

from laconic.forms import affine, levels
from laconic.forms._sides import fits, spread, summed


@torch.library.custom_op("laconic::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    """Round `x` to the grid `(code - zero_point) * scale`, codes in [qmin, qmax].

    Gradient: straight through inside the range, zero outside; LSQ's for the scale.
    """
    s = spread(scale, axis, x.shape).to(x.dtype)
    z = spread(zero_point, axis, x.shape).to(x.dtype)
    codes = x.div(s).round_().add_(z).clamp_(qmin, qmax)
    return codes.sub_(z).mul_(s)


@fake_quantize.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    del zero_point, qmin, qmax
    return _checked(x, scale, axis, x.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, scale, zero_point, ctx.axis, ctx.qmin, ctx.qmax = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    s = spread(scale, ctx.axis, x.shape).to(x.dtype)
    z = spread(zero_point, ctx.axis, x.shape).to(x.dtype)
    position = x / s + z
    inside = (position >= ctx.qmin) & (position <= ctx.qmax)
    grad_scale = None
    if ctx.needs_input_grad[1]:
        rounded = position.round().clamp(ctx.qmin, ctx.qmax)
        slope = torch.where(inside, rounded - position, rounded - z) * grad
        grad_scale = summed(slope, scale.shape, ctx.axis)
    return grad * inside, grad_scale, None, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("laconic::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Decode integer codes: `(codes - zero_point) * scale`, in the dtype of `scale`."""
    return affine.decode(codes, scale, zero_point, axis).clone()


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    del zero_point
    return _checked(codes, scale, axis, scale.dtype)


@torch.library.custom_op("laconic::fake_levels", mutates_args=())
def fake_levels(x: Tensor, scale: Tensor, axis: int | None, name: str) -> Tensor:
    """Move `x` to the nearest of the levels called `name`, times the scale (see `forms.levels`).

    Gradient: straight through between the lowest and the highest level, zero outside; of the
    scale as LSQ's. NaN stays.
    """
    s = spread(scale, axis, x.shape).to(x.dtype)
    position = x / s
    return torch.where(position.isnan(), position, _level(position, name).mul_(s))


@fake_levels.register_fake
def _(x: Tensor, scale: Tensor, axis: int | None, name: str) -> Tensor:
    levels.values(name)
    return _checked(x, scale, axis, x.dtype)


def _level(position: Tensor, name: str) -> Tensor:
    """The value of the level next to each position."""
    held = levels.table(name, position)
    if len(held) == 2:
        return torch.where(position >= levels.borders(name)[0], held[1], held[0])
    return held[levels.numbers(position, name).int()]


def _keep_levels(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, scale, ctx.axis, ctx.name = inputs
    ctx.save_for_backward(x, scale)


def _levels_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    position = levels.positions(x, scale, ctx.axis)
    held = levels.values(ctx.name)
    inside = (position >= held[0]) & (position <= held[-1])
    grad_scale = None
    if ctx.needs_input_grad[1]:
        level = _level(position, ctx.name)
        slope = torch.where(inside, level - position, level) * grad
        grad_scale = summed(slope, scale.shape, ctx.axis)
    return grad * inside, grad_scale, None, None


fake_levels.register_autograd(_levels_backward, setup_context=_keep_levels)


@torch.library.custom_op("laconic::levels", mutates_args=())
def levels_(codes: Tensor, scale: Tensor, axis: int | None, name: str) -> Tensor:
    """Decode numbers of levels: `level[code] * scale`, in the dtype of `scale`."""
    return levels.decode(codes, scale, axis, name)


@levels_.register_fake
def _(codes: Tensor, scale: Tensor, axis: int | None, name: str) -> Tensor:
    levels.values(name)
    return _checked(codes, scale, axis, scale.dtype)


def _checked(x: Tensor, scale: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    wrong = fits(x.shape, scale.shape, axis)
    if wrong:
        raise ValueError(wrong)
    return torch.empty_like(x, dtype=dtype)
