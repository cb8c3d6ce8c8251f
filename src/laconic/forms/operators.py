"""The operators that stand for a form in a graph.

`laconic::fake_quantize` works on a float tensor with a straight-through gradient;
`laconic::dequantize` decodes stored integers. Both give the same numbers. `laconic::lookup` decodes
a codebook, `laconic::combine` a shared basis; these two are the same in training and frozen: codes
stay, values, coefficients and bases take gradients. All export, trace and deep-copy like any
operator; exporters translate them to what their runtime calls the same thing, or to the tensor.
"""

from typing import Any

import torch
from torch import Tensor

from laconic.forms import affine, basis, codebook


@torch.library.custom_op("laconic::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    """Round `x` to the grid `(code - zero_point) * scale`, codes in [qmin, qmax].

    Gradient: straight through inside the range, zero outside; LSQ's for the scale.
    """
    s = affine.along(scale, axis, x.ndim).to(x.dtype)
    z = affine.along(zero_point, axis, x.ndim).to(x.dtype)
    codes = x.div(s).round_().add_(z).clamp_(qmin, qmax)
    return codes.sub_(z).mul_(s)


@fake_quantize.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int
) -> Tensor:
    del scale, zero_point, axis, qmin, qmax
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, scale, zero_point, ctx.axis, ctx.qmin, ctx.qmax = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    s = affine.along(scale, ctx.axis, x.ndim).to(x.dtype)
    z = affine.along(zero_point, ctx.axis, x.ndim).to(x.dtype)
    position = x / s + z
    inside = (position >= ctx.qmin) & (position <= ctx.qmax)
    grad_scale = None
    if ctx.needs_input_grad[1]:
        rounded = position.round().clamp(ctx.qmin, ctx.qmax)
        slope = torch.where(inside, rounded - position, rounded - z) * grad
        others = [i for i in range(x.ndim) if ctx.axis is None or i != ctx.axis % x.ndim]
        grad_scale = (
            slope.sum(others).reshape(scale.shape) if others else slope.reshape(scale.shape)
        )
    return grad * inside, grad_scale, None, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("laconic::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Decode integer codes: `(codes - zero_point) * scale`, in the dtype of `scale`."""
    return affine.decode(codes, scale, zero_point, axis).clone()


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    del zero_point, axis
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("laconic::lookup", mutates_args=())
def lookup(
    codes: Tensor, values: Tensor, axis: int | None, group: int, low: int, zero: bool
) -> Tensor:
    """Decode a codebook (see `forms.codebook`), in the dtype of `values`.

    Gradient: of each value the sum over the elements that point to it; none of code 0 with `zero`.
    """
    return codebook.decode(codes, values, axis, group, low, zero)


@lookup.register_fake
def _(codes: Tensor, values: Tensor, axis: int | None, group: int, low: int, zero: bool) -> Tensor:
    del low, zero
    wrong = codebook.fits(codes, values, axis, group)
    if wrong:
        raise ValueError(wrong)
    return torch.empty_like(codes, dtype=values.dtype)


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    codes, values, ctx.axis, ctx.group, ctx.low, ctx.zero = inputs
    ctx.save_for_backward(codes, values)


def _lookup_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, values = ctx.saved_tensors
    summed = codebook.gradient(grad, codes, values, ctx.axis, ctx.group, ctx.low, ctx.zero)
    return None, summed, None, None, None, None


lookup.register_autograd(_lookup_backward, setup_context=_keep_codes)


@torch.library.custom_op("laconic::combine", mutates_args=())
def combine(coefficients: Tensor, basis_: Tensor) -> Tensor:
    """The sum of `basis_` `[rank, *shape]` weighted by `coefficients` `[rank]`: `[*shape]`."""
    return basis.decode(coefficients, basis_).clone()


@combine.register_fake
def _(coefficients: Tensor, basis_: Tensor) -> Tensor:
    if coefficients.ndim != 1 or basis_.shape[:1] != coefficients.shape:
        found = list(coefficients.shape), list(basis_.shape)
        raise ValueError(f"coefficients and basis of shapes {found}, expected [rank], [rank, ...]")
    return torch.empty_like(basis_[0])


def _keep_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    coefficients, held = ctx.saved_tensors
    own = torch.mv(held.flatten(1), grad.flatten())
    shape = (-1, *([1] * grad.ndim))
    return own, coefficients.reshape(shape) * grad


combine.register_autograd(_combine_backward, setup_context=_keep_both)


FAKE_QUANTIZE = torch.ops.laconic.fake_quantize.default
DEQUANTIZE = torch.ops.laconic.dequantize.default
LOOKUP = torch.ops.laconic.lookup.default
COMBINE = torch.ops.laconic.combine.default
