"""What several tensors share, and whole steps by which each differs from it, at least bits.

The common part is coded finely whatever it is, so it costs the same wherever it lies: it is free to
stand where the differences get cheap. For three values it is near the middle one, and two whole
steps say the rest. What a choice of steps leaves is only how the remainders differ from each other,
because their mean moves the common part. A choice minimises that error plus a price for the bits
that the steps take, as their entropy counts them (entropy-constrained quantisation, Chou et al.
1989). For three tensors the codes that differ form the hexagonal lattice.
"""

import torch
from torch import Tensor

PRICE = 0.1  # of a bit, in squares of a step: about 2 ln 2 / 12, what a bit saves on a fine grid
_ROUNDS = 3
_FARTHEST = 4.0  # from the price of an element to that of the mean
_FEW = 0.5  # counted for codes that did not come up


def whole_steps(values: Tensor, price: float | Tensor = PRICE) -> tuple[Tensor, Tensor]:
    """Codes of each tensor and the common part.

    Args:
        values: float64 `[tensors, *shape]`, in steps.
        price: of a bit, one for all or `[*shape]`.

    Returns:
        whole codes, float64 `[tensors, *shape]`; the common part, float64 `[*shape]`, in steps:
        `values` is about `codes + common`.
    """
    codes = (values - values.median(0).values).round()
    for _ in range(_ROUNDS):
        bits = [_bits(each) for each in codes]
        for number, table in enumerate(bits):
            codes[number] = _best(values, codes, number, table, price)
        codes -= codes.median(0).values
    return codes, (values - codes).mean(0)


def prices(counts: Tensor) -> Tensor:
    """The price of a bit for each element of a tensor: low where an error counts much.

    Args:
        counts: float64 `[*shape]`, what a squared error of each element counts. Its rows and its
            columns are looked at (their means): single elements are known too badly.
    """
    rows = counts.flatten(1) if counts.ndim > 1 else counts[None]
    mean = rows.mean().clamp(min=torch.finfo(torch.float64).tiny)
    smooth = rows.mean(1, keepdim=True) * rows.mean(0, keepdim=True) / mean
    return PRICE * (mean / smooth).clamp(1 / _FARTHEST, _FARTHEST).nan_to_num(1).reshape(
        counts.shape
    )


def _bits(codes: Tensor) -> Tensor:
    """Bits of each size of code, by how often it comes up; one entry more than the largest."""
    counts = torch.bincount(codes.abs().flatten().long())
    counts = torch.cat([counts, counts.new_zeros(2)]).double() + _FEW
    found = -(counts / counts.sum()).log2()
    found[1:] += 1  # the sign
    return found


def _best(
    values: Tensor, codes: Tensor, number: int, bits: Tensor, price: float | Tensor
) -> Tensor:
    """The codes of one tensor, those of the others given: none, the same, or one step away."""
    rest = values - codes
    others = rest.sum(0) - rest[number]
    share = 1 - 1 / len(values)
    centre = others / (len(values) - 1) if len(values) > 1 else torch.zeros_like(others)
    wanted = values[number] - centre  # error is share * (wanted - code)^2 and a constant
    nearest = wanted.round()
    tried = torch.stack([nearest, nearest - nearest.sign(), torch.zeros_like(nearest)])
    sizes = tried.abs().long().clamp(max=len(bits) - 1)
    cost = share * (wanted - tried).square() + bits[sizes] * price
    return tried.gather(0, cost.argmin(0)[None])[0]
