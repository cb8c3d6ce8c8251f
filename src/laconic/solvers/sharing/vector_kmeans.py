"""k-means of short vectors: the few that stand for many with the least weighted squared error.

Lloyd's iteration from a k-means++ start (Arthur & Vassilvitskii 2007) in float32; an empty cluster
is moved to the vector of the largest error. Every element of every vector may count differently:
then the best value of a cluster is a weighted mean, element by element. Given the generator,
everything is deterministic.
"""

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.forms import vectors

_FLOOR = 1e-4  # least weight, in parts of the mean: what does not matter still wants a value
_START = 16384  # vectors that the start is drawn from


def centroids(
    runs: Tensor,
    count: int,
    weights: Tensor | None,
    generator: torch.Generator,
    rounds: int = 30,
) -> Tensor:
    """The vectors that stand for `runs`, those that stand for most of them first.

    Args:
        runs: `[n, length]`, finite.
        count: how many at most.
        weights: what a squared error counts, the shape of `runs`, not negative; None: all alike.
        generator: draws the start.
        rounds: of the iteration, unless it settles before.

    Returns:
        `[at most count, length]` in the dtype of `runs`; none of them is nobody's closest.

    Raises:
        DataError: NaN or infinite values.
    """
    if not bool(torch.isfinite(runs).all()):
        bad = int((~torch.isfinite(runs)).sum())
        raise DataError(f"{bad} of {runs.numel()} values are NaN or infinite")
    x = runs.detach().cpu().float()
    different = x.unique(dim=0)
    if len(different) <= count:
        return _by_use(x, different, None).to(runs)
    mass = _mass(weights)
    found = _start(x, count, generator)
    before = torch.full((len(x),), -1)
    for _ in range(rounds):
        codes = vectors.nearest(x, found, mass)
        if torch.equal(codes, before):
            break
        found, before = _means(x, mass, codes, found), codes
    return _by_use(x, found, mass).to(runs)


def _mass(weights: Tensor | None) -> Tensor | None:
    if weights is None or not bool(weights.any()):
        return None
    w = weights.detach().cpu().float()
    return w.clamp(min=_FLOOR * float(w.mean())) / w.mean()


def _start(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Each next one is drawn in proportion to its squared distance from those so far."""
    if len(x) > _START:
        x = x[torch.randperm(len(x), generator=generator)[:_START]]
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    away = (x - x[chosen[0]]).square().sum(1)
    for draw in torch.rand(count - 1, generator=generator, dtype=torch.float64).tolist():
        running = away.double().cumsum(0)
        if float(running[-1]) <= 0:
            break
        place = int(torch.searchsorted(running, draw * running[-1])) if len(x) > 1 else 0
        chosen.append(min(place, len(x) - 1))
        away = torch.minimum(away, (x - x[chosen[-1]]).square().sum(1))
    return x[chosen].clone()


def _means(x: Tensor, mass: Tensor | None, codes: Tensor, found: Tensor) -> Tensor:
    """The weighted mean of every cluster; empty ones go where the error is largest."""
    held = torch.ones_like(x) if mass is None else mass
    total = torch.zeros_like(found).index_add_(0, codes, held * x)
    share = torch.zeros_like(found).index_add_(0, codes, held)
    made = torch.where(share > 0, total / share.clamp(min=1e-30), found)
    empty = (torch.bincount(codes, minlength=len(found)) == 0).nonzero().flatten()
    if len(empty):
        errors = (held * (x - found[codes]).square()).sum(1)
        made[empty] = x[errors.topk(min(len(empty), len(x))).indices][: len(empty)]
    return made


def _by_use(x: Tensor, found: Tensor, mass: Tensor | None) -> Tensor:
    """Those that are somebody's closest, the most frequent first."""
    uses = torch.bincount(vectors.nearest(x, found, mass), minlength=len(found))
    order = uses.argsort(descending=True, stable=True)
    return found[order[uses[order] > 0]]
