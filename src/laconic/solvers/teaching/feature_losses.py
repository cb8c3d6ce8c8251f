"""Losses between values inside a student and inside its teacher, in float32.

Each takes the tapped values of both, and which positions `[batch, tokens]` count (None: all), and
gives a scalar. Hints are in `training.losses.features`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-6
_NEGATIVES = 0.1  # temperature of the contrastive loss


def attention(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Attention transfer (Zagoruyko & Komodakis, arXiv 1612.03928): where, not what.

    Each value `[batch, channels, ...]` becomes the map of its mean squares over channels, of unit
    length; of tokens `[batch, tokens, width]` the map is over tokens. Squared distance of the maps.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack(
        [(_map(s, mask) - _map(t, mask)).pow(2).sum(1).mean() for s, t in pairs]
    ).mean()


def _map(value: Tensor, mask: Tensor | None) -> Tensor:
    squares = value.float().pow(2)
    if value.ndim == 3:
        energy = squares.mean(2)
        if mask is not None and mask.shape == energy.shape:
            energy = energy * mask
    else:
        energy = squares.mean(1).flatten(1)
    return F.normalize(energy, dim=1)


def relational(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Relational distillation (Park et al., arXiv 1904.05068): distances and angles of a batch.

    Each value becomes a point per sample; pairwise distances, in units of their mean, and the
    cosines of the angles of all triples are compared by Huber's loss, the angles twice as much.
    """
    parts: list[Tensor] = []
    for one, other in zip(student, teacher, strict=True):
        ours, theirs = points(one, mask), points(other, mask)
        distances = F.smooth_l1_loss(_distances(ours), _distances(theirs))
        parts.append(distances + 2 * F.smooth_l1_loss(_angles(ours), _angles(theirs)))
    return torch.stack(parts).mean()


def points(value: Tensor, mask: Tensor | None) -> Tensor:
    """`[batch, features]` of a value: the mean over pixels, or over the tokens that count."""
    value = value.float()
    if value.ndim == 3:
        if mask is not None and mask.shape == value.shape[:2]:
            held = mask.to(value.dtype).unsqueeze(2)
            return (value * held).sum(1) / held.sum(1).clamp(min=1)
        return value.mean(1)
    return value.mean(tuple(range(2, value.ndim))) if value.ndim > 3 else value.flatten(1)


def _distances(values: Tensor) -> Tensor:
    """`[batch, batch]`, in units of the mean of those that are not zero."""
    square = values.pow(2).sum(1)
    apart = (square[:, None] + square[None] - 2 * values @ values.T).clamp(min=_TINY).sqrt()
    other = ~torch.eye(len(values), dtype=torch.bool, device=values.device)
    apart = apart * other
    return apart / (apart.sum() / other.sum().clamp(min=1)).clamp(min=_TINY)


def _angles(values: Tensor) -> Tensor:
    """Cosines `[batch, batch, batch]` of the angle at the first sample between two others."""
    direction = F.normalize(values[None] - values[:, None], dim=2, eps=_TINY)
    return direction @ direction.transpose(1, 2)


def contrastive(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """A sample's student value is to be nearest its own teacher value among those of the batch.

    As contrastive representation distillation (Tian et al., arXiv 1910.10699), with the batch for
    negatives (van den Oord et al., arXiv 1807.03748) in place of a memory of the whole data set:
    cross-entropy, both ways, of the cosines of batch-centred points of equal width.
    """
    parts: list[Tensor] = []
    for one, other in zip(student, teacher, strict=True):
        ours, theirs = (_centred(points(value, mask)) for value in (one, other))
        likeness = ours @ theirs.T / _NEGATIVES
        own = torch.arange(len(likeness), device=likeness.device)
        parts.append((F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2)
    return torch.stack(parts).mean()


def _centred(values: Tensor) -> Tensor:
    return F.normalize(values - values.mean(0), dim=1, eps=_TINY)


def relations(heads: int) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None], Tensor]:
    """Self-attention relations (Wang et al., MiniLM v2, arXiv 2012.15828), in `heads` heads.

    Values are queries, keys or values `[batch, heads, tokens, width]` of attentions (or without
    heads `[batch, tokens, width]`); heads are joined and split anew, so that the networks may have
    other heads and widths. KL divergence of the softmax of each one's scaled products with itself,
    over rows and columns that count.
    """

    def compare(
        student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        pairs = zip(student, teacher, strict=True)
        return torch.stack([_relation(s, t, heads, mask) for s, t in pairs]).mean()

    return compare


def _relation(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    log_q, log_p = (_likeness(value, heads, mask) for value in (student, teacher))
    each = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)  # [batch, tokens]
    if mask is None or mask.shape != each.shape:
        return each.mean()
    return (each * mask).sum() / mask.sum().clamp(min=1)


def _likeness(value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Log-softmax `[batch, heads, tokens, tokens]` of scaled products of a value with itself."""
    value = value.float()
    if value.ndim == 4:
        value = value.transpose(1, 2).flatten(2)
    split = value.unflatten(2, (heads, -1)).transpose(1, 2)
    products = split @ split.transpose(2, 3) * split.shape[-1] ** -0.5
    if mask is not None and mask.shape == (products.shape[0], products.shape[-1]):
        hidden = (mask == 0)[:, None, None]
        products = products.masked_fill(hidden, -1e9)
    return F.log_softmax(products, dim=-1)
