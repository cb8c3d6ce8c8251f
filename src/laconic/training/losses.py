"""Losses between what a student and its teacher give, in float32.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531): soft
targets, with the factor temperature^2 that keeps the size of the gradient.

A `mask` `[batch, tokens]` says which positions of values `[batch, tokens, ...]` count (padding does
not); values of other shapes are taken whole.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of the softened distributions over the last dimension.

    student, teacher: `[..., classes]` → scalar, the mean over all leading dimensions; 0 for equals.
    """
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return _mean(each, mask) * temperature**2


def hard_targets(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy to the teacher's own decisions: `[..., classes]` → scalar."""
    log_q = F.log_softmax(student.float(), dim=-1)
    each = -log_q.gather(-1, teacher.argmax(-1, keepdim=True)).squeeze(-1)
    return _mean(each, mask)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cosine over the last dimension: `[..., features]` → scalar."""
    return _mean(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), mask)


def relative_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """`|student - teacher|^2 / |teacher|^2`, any shape → scalar."""
    wanted = teacher.float()
    difference = student.float() - wanted
    if mask is not None and wanted.shape[:2] == mask.shape:
        held = mask.to(wanted.dtype).reshape(*mask.shape, *[1] * (wanted.ndim - 2))
        difference, wanted = difference * held, wanted * held
    return difference.pow(2).sum() / wanted.pow(2).sum().clamp(min=torch.finfo(wanted.dtype).tiny)


def features(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Mean of `relative_error` over pairs of feature maps."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([relative_error(s, t, mask) for s, t in pairs]).mean()


def _mean(each: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or each.shape[:2] != mask.shape:
        return each.mean()
    held = mask.to(each.dtype).reshape(*mask.shape, *[1] * (each.ndim - 2))
    count = held.expand_as(each).sum().clamp(min=1)
    return (each * held).sum() / count
