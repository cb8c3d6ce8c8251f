"""Losses between what a student and its teacher give, in float32.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531): soft
targets, with the factor temperature^2 that keeps the size of the gradient. Zhao et al., "Decoupled
Knowledge Distillation" (CVPR 2022, arXiv 2203.08679): the same divergence in two parts.

A `mask` `[batch]` or `[batch, tokens]` says which positions of values that begin with these
dimensions count (padding does not); values of other shapes are taken whole.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_NEVER = -1e9  # a logit whose softmax is exactly zero, and whose difference to itself is too


def soft_targets(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of the softened distributions over the last dimension.

    student, teacher: `[..., classes]` → scalar, the mean over all leading dimensions; 0 for equals.
    """
    return _mean(_divergence(student, teacher, temperature), mask) * temperature**2


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def decoupled(
    student: Tensor, teacher: Tensor, classes: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The two parts of a KL divergence: of the target class, and among all the others.

    student, teacher: `[..., classes]`; classes: int64 `[...]`, the target of each position → two of
    `[...]`. With p the teacher's softened probability of the target, first + (1 - p) second is the
    KL divergence; decoupled distillation weighs the second freely.
    """
    target = classes.unsqueeze(-1)
    parts: list[tuple[Tensor, Tensor]] = []
    for logits in (student, teacher):
        soft = logits.float() / temperature
        others = soft.scatter(-1, target, _NEVER)
        log_all = torch.logsumexp(soft, -1)
        binary = torch.stack([soft.gather(-1, target).squeeze(-1), torch.logsumexp(others, -1)], -1)
        parts.append((binary - log_all.unsqueeze(-1), F.log_softmax(others, -1)))
    (binary_q, others_q), (binary_p, others_p) = parts
    first = (binary_p.exp() * (binary_p - binary_q)).sum(-1)
    return first, (others_p.exp() * (others_p - others_q)).sum(-1)


def decoupled_targets(
    student: Tensor,
    teacher: Tensor,
    classes: Tensor,
    temperature: float,
    weights: tuple[float, float],
    mask: Tensor | None = None,
) -> Tensor:
    """Weighted sum of both parts of `decoupled`, the mean over positions; scalar."""
    first, second = decoupled(student, teacher, classes, temperature)
    return _mean(weights[0] * first + weights[1] * second, mask) * temperature**2


def hardest(student: Tensor, teacher: Tensor, share: float, mask: Tensor | None = None) -> Tensor:
    """A mask of the positions where student and teacher differ most, by KL divergence.

    student, teacher: `[..., classes]` → bool `[...]`: `share` of the positions that count, one at
    the least.
    """
    each = _divergence(student.detach(), teacher, 1.0)
    counts = torch.ones_like(each, dtype=torch.bool)
    if mask is not None and _fits(mask, each):
        counts = _spread(mask, each).expand_as(each) != 0
    wanted = max(1, round(share * int(counts.sum())))
    best = each.masked_fill(~counts, -torch.inf).flatten().topk(wanted).indices
    chosen = torch.zeros_like(each, dtype=torch.bool).flatten()
    chosen[best] = True
    return chosen.reshape(each.shape) & counts


def mixture(outputs: Sequence[Tensor], kind: str, temperature: float) -> Tensor:
    """What several teachers say together, as one of them would say it.

    outputs: `[..., classes]` each. For "kl" and "dkd" their softened probabilities are averaged:
    the result's softmax at this temperature is that mean. For "cosine" directions are, else values.
    """
    if len(outputs) == 1:
        return outputs[0]
    values = torch.stack([output.float() for output in outputs])
    if kind in ("kl", "dkd"):
        logs = F.log_softmax(values / temperature, dim=-1)
        return temperature * (torch.logsumexp(logs, 0) - math.log(len(outputs)))
    if kind == "cosine":
        values = F.normalize(values, dim=-1)
    return values.mean(0)


def hard_targets(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy to the teacher's own decisions: `[..., classes]` → scalar."""
    log_q = F.log_softmax(student.float(), dim=-1)
    each = -log_q.gather(-1, teacher.argmax(-1, keepdim=True)).squeeze(-1)
    return _mean(each, mask)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cosine over the last dimension: `[..., features]` → scalar."""
    return _mean(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), mask)


def relative_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """`|student - teacher|^2 / |teacher|^2`, any shape → scalar.

    The mask needs features behind its dimensions: `[batch, features]` may be as wide as there are
    tokens.
    """
    wanted = teacher.float()
    difference = student.float() - wanted
    if mask is not None and wanted.ndim > mask.ndim and _fits(mask, wanted):
        held = _spread(mask, wanted)
        difference, wanted = difference * held, wanted * held
    return difference.pow(2).sum() / wanted.pow(2).sum().clamp(min=torch.finfo(wanted.dtype).tiny)


def features(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Mean of `relative_error` over pairs of feature maps."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([relative_error(s, t, mask) for s, t in pairs]).mean()


def _mean(each: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or not _fits(mask, each):
        return each.mean()
    held = _spread(mask, each)
    count = held.expand_as(each).sum().clamp(min=1)
    return (each * held).sum() / count


def _fits(mask: Tensor, values: Tensor) -> bool:
    return values.shape[: mask.ndim] == mask.shape


def _spread(mask: Tensor, values: Tensor) -> Tensor:
    """The mask in the values' type, with dimensions of one behind."""
    return mask.to(values.dtype).reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
