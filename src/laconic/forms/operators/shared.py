"""Operators whose stored tensors share: codebooks, bases, vectors, buckets, several models.

They are the same in training and frozen: codes stay; values, coefficients and bases take gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laconic.forms import basis, codebook, hashed, vectors


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


@torch.library.custom_op("laconic::vectors", mutates_args=())
def vectors_(codes: Tensor, values: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Decode runs of elements that are numbers of short vectors (see `forms.vectors`).

    Gradient: of each vector the sum over the runs that point to it.
    """
    return vectors.decode(codes, values, shape, axis)


@vectors_.register_fake
def _(codes: Tensor, values: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    wrong = vectors.fits(codes, values, shape, axis)
    if wrong:
        raise ValueError(wrong)
    return values.new_empty(list(shape))


def _keep_runs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    codes, values, _, ctx.axis = inputs
    ctx.save_for_backward(codes, values)


def _vectors_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, values = ctx.saved_tensors
    return None, vectors.gradient(grad, codes, values, ctx.axis), None, None


vectors_.register_autograd(_vectors_backward, setup_context=_keep_runs)


@torch.library.custom_op("laconic::hashed", mutates_args=())
def hashed_(values: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Decode a tensor whose positions fall into buckets by a hash (see `forms.hashed`).

    Gradient: of each bucket the signed sum over the positions that fall into it.
    """
    return hashed.decode(values, shape, seed)


@hashed_.register_fake
def _(values: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    wrong = hashed.fits(values, shape, seed)
    if wrong:
        raise ValueError(wrong)
    return values.new_empty(list(shape))


def _keep_seed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    values, _, ctx.seed = inputs
    ctx.buckets = values.numel()


def _hashed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return hashed.gathered(grad, ctx.buckets, ctx.seed), None, None


hashed_.register_autograd(_hashed_backward, setup_context=_keep_seed)


def member(
    rows: Tensor, base: Tensor | None, names: str, chosen: int, sizes: Sequence[int]
) -> Tensor:
    """The rows of model number `chosen`, added to what all share: a view where they share nothing.

    `[sum of sizes, ...]` → `[sizes[chosen], ...]`; without `sizes` every model has one entry,
    `[models, ...]` → `[...]`. `names`, separated by commas, says which models stand in `rows`.
    """
    count = names.count(",") + 1
    expected = sum(sizes) if sizes else count
    if rows.ndim < 1 or rows.shape[0] != expected or len(sizes) not in (0, count):
        raise ValueError(f"rows of shape {list(rows.shape)} for {names} of sizes {list(sizes)}")
    if not 0 <= chosen < count:
        raise ValueError(f"model {chosen} of {count}")
    if sizes:
        own = rows.narrow(0, sum(sizes[:chosen]), sizes[chosen])
    else:
        own = rows.select(0, chosen)
    if base is not None and base.shape != own.shape:
        raise ValueError(f"a base of shape {list(base.shape)} for rows of {list(own.shape)}")
    return own if base is None else base + own


torch.library.define(
    "laconic::member",
    "(Tensor(a) rows, Tensor? base, str names, int chosen, int[] sizes) -> Tensor(a)",
)
torch.library.impl("laconic::member", "CompositeImplicitAutograd", member)
