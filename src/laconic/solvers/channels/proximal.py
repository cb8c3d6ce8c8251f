"""Steps of a penalty whose strength is found: how strong it must be to shrink a norm by a factor.

A penalty lambda * R(w) in training is a gradient step on the loss followed by the proximal step
`w <- argmin 1/2 |v - w|^2 + rate * lambda * R(v)`. For L2 that is a scaling, for L1 a soft
threshold of every weight, for the group lasso a soft threshold of the norm of every group (Parikh &
Boyd 2014, "Proximal algorithms", section 6). Here the factor by which R shrinks is given, and
`rate * lambda` is what follows from it, so nobody has to guess it.
"""

import torch
from torch import Tensor


def threshold(norms: Tensor, factor: float) -> float:
    """The t with `sum max(norms - t, 0) = factor * sum norms`, exactly.

    Michelot's algorithm: solve for t on those that are above it, until none leaves.

    Args:
        norms: any shape, not negative.
        factor: from 0 to 1.

    >>> threshold(torch.tensor([1.0, 2.0, 5.0]), 0.5)
    1.5
    """
    active = norms.detach().double().flatten()
    if not active.numel() or factor <= 0:
        return float(active.max()) if active.numel() else 0.0
    target = factor * float(active.sum())
    while True:
        t = max((float(active.sum()) - target) / active.numel(), 0.0)
        above = active[active > t]
        if above.numel() in (0, active.numel()):
            return t
        active = above


def l1(values: Tensor, factor: float) -> tuple[Tensor, float]:
    """Soft-threshold `values` so that the sum of magnitudes shrinks by `factor`.

    Returns:
        The new values, and `rate * lambda` of the penalty `lambda * sum |w|`.
    """
    amount = threshold(values.abs(), factor)
    return values.sign() * (values.abs() - amount).clamp(min=0), amount


def l2(values: Tensor, factor: float) -> tuple[Tensor, float]:
    """Scale `values` by `factor`.

    Returns:
        The new values, and `rate * lambda` of the penalty `lambda / 2 * sum w^2`; infinite for 0.
    """
    return values * factor, 1 / factor - 1 if factor > 0 else float("inf")


def lasso(norms: Tensor, factor: float) -> tuple[Tensor, float]:
    """What every group is scaled by so that the sum of the groups' norms shrinks by `factor`.

    Args:
        norms: `[groups]`, L2 norms.
        factor: from 0 to 1.

    Returns:
        Scales `[groups]`, and `rate * lambda` of the penalty `lambda * sum of norms`.
    """
    amount = threshold(norms, factor)
    scales = (norms - amount).clamp(min=0) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return scales, amount
