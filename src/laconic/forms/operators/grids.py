"""Operators that put values on a grid, uniform or of fixed levels, and that decode them.

`laconic::fake_quantize` and `laconic::fake_levels` work on float tensors with straight-through
gradients, `laconic::dequantize` and `laconic::levels` on what is stored when they are frozen; both
states give the same numbers.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.forms import affine, levels
from laconic.forms._sides import fits, spread, summed


@torch.library.custom_op("laconic::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    """Round `x` to the grid `(code - zero_point) * scale`, codes in [qmin, qmax].

    Gradient: straight through inside the range, zero outside; LSQ's for the scale. bfloat16 and
    float16 are rounded in float32, so that autocast changes no code.
    """
    wide = _wide(x)
    s = spread(scale, axis, x.shape).to(wide.dtype)
    z = spread(zero_point, axis, x.shape).to(wide.dtype)
    codes = wide.div(s).round_().add_(z).clamp_(qmin, qmax)
    return codes.sub_(z).mul_(s).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _between(grad: Tensor, position: Tensor, low: float, high: float) -> Tensor:
    """`grad` where `low <= position <= high`, else 0, in one pass and without a mask.

    A comparison and a product take torch several times as long on a CPU.
    """
    kind = np.float64 if position.dtype == torch.float64 else np.float32
    below = float(np.nextafter(kind(low), kind(-np.inf))) if low else -1e-30  # not a denormal
    above = float(np.nextafter(kind(high), kind(np.inf))) if high else 1e-30
    if grad.stride() != position.stride():
        grad = torch.empty_like(position).copy_(grad)
    return torch.ops.aten.hardtanh_backward(grad, position, below, above)


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
    wide, upper = _wide(x), _wide(grad)
    away = wide / spread(scale, ctx.axis, x.shape).to(wide.dtype)
    z = spread(zero_point, ctx.axis, x.shape).to(wide.dtype)
    position = away + z
    inner = _between(upper, position, ctx.qmin, ctx.qmax)
    grad_scale = None
    if ctx.needs_input_grad[1]:  # inside: rounded - position, outside: rounded - z
        slope = position.round_().clamp_(ctx.qmin, ctx.qmax).sub_(z).mul_(upper)
        slope.addcmul_(inner, away, value=-1)
        grad_scale = summed(slope, scale.shape, ctx.axis).to(scale.dtype)
    return inner.to(grad.dtype), grad_scale, None, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("laconic::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Decode integer codes: `(codes - zero_point) * scale`, in the dtype of `scale`."""
    return affine.decode(codes, scale, zero_point, axis).clone()


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    del zero_point
    return _checked(codes, scale, axis, scale.dtype)


@torch.library.custom_op("laconic::dynamic_quantize", mutates_args=())
def dynamic_quantize(x: Tensor, bits: int, per_token: bool) -> Tensor:
    """Round `x` to the grid of `2^bits` points over its own range, zero included.

    One range for all of `x`, or with `per_token` one for each run of the last dimension.
    Computed as ONNX's DynamicQuantizeLinear does. Gradient: straight through (nothing is clipped).
    """
    if not x.numel():
        return x.clone()
    scale, zero = affine.grid_of(x, bits, per_token)
    codes = x.float().div(scale).round_().add_(zero).clamp_(0, 2**bits - 1)
    return codes.sub_(zero).mul_(scale).to(x.dtype)


@dynamic_quantize.register_fake
def _(x: Tensor, bits: int, per_token: bool) -> Tensor:
    if not 1 <= bits <= 16:
        raise ValueError(f"{bits} bits, expected 1 to 16")
    if per_token and not x.ndim:
        raise ValueError("a number has no tokens")
    return torch.empty_like(x)


def _straight(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    del ctx
    return grad.clone(), None, None


dynamic_quantize.register_autograd(_straight)


@torch.library.custom_op("laconic::fake_levels", mutates_args=())
def fake_levels(x: Tensor, scale: Tensor, axis: int | None, name: str) -> Tensor:
    """Move `x` to the nearest of the levels called `name`, times the scale (see `forms.levels`).

    Gradient: straight through between the lowest and the highest level, zero outside; of the
    scale as LSQ's. NaN stays. Half precision is moved in float32.
    """
    position = levels.positions(_wide(x), scale, axis)
    made = _level(position, name).mul_(spread(scale, axis, x.shape).to(position.dtype))
    return position.clamp_(-1, 1).mul_(0).add_(made).to(x.dtype)  # only a NaN is seen


@fake_levels.register_fake
def _(x: Tensor, scale: Tensor, axis: int | None, name: str) -> Tensor:
    levels.values(name)
    return _checked(x, scale, axis, x.dtype)


def _level(position: Tensor, name: str) -> Tensor:
    """The value of the level next to each position."""
    held = levels.table(name, position)
    if name == "binary":
        return held[1].expand_as(position).copysign(position + 0.0)  # -0 is on the upper level
    return held[levels.numbers(position, name).int()]


def _keep_levels(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, scale, ctx.axis, ctx.name = inputs
    ctx.save_for_backward(x, scale)


def _levels_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    upper = _wide(grad)
    position = levels.positions(_wide(x), scale, ctx.axis)
    held = levels.values(ctx.name)
    inner = _between(upper, position, held[0], held[-1])
    grad_scale = None
    if ctx.needs_input_grad[1]:  # inside: level - position, outside: level
        slope = _level(position, ctx.name).mul_(upper).addcmul_(inner, position, value=-1)
        grad_scale = summed(slope, scale.shape, ctx.axis).to(scale.dtype)
    return inner.to(grad.dtype), grad_scale, None, None


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
