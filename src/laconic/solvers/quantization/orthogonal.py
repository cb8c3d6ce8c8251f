"""Orthogonal matrices: Hadamard's, those that keep the all-ones vector, and steps among them.

A Hadamard matrix has entries of one magnitude, so that a value that stands out in one channel is
spread evenly over all of them. They are built from Sylvester's doubling and Paley's construction
(Paley 1933); where neither gives the size, a random orthogonal matrix takes the place of the odd
factor. A reflection turns any of them into one that maps the all-ones vector to itself. Steps along
the group go through Cayley's transform (Wen & Yin 2013; Li et al. 2020, arXiv 2002.01113).
"""

import torch
from torch import Tensor


def hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A randomised Hadamard matrix over sqrt(size), rows with random signs: float64, orthogonal.

    Where no Hadamard matrix of the size is known here, Kronecker's product of one and a random
    orthogonal matrix.
    """
    odd, twos = size, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    core, left = _core(odd, twos, generator)
    made = core
    for _ in range(left):
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)]) * 0.5**0.5
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    return made * signs


def _core(odd: int, twos: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """An orthogonal matrix of `odd` times a power of two, and how often to double it."""
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64), twos
    for power in range(2, twos + 1):
        order = odd * 2**power
        if _is_prime(order - 1):
            return _paley(order - 1), twos - power
    drawn = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q, twos


def _paley(q: int) -> Tensor:
    """Paley's first matrix of order q + 1 for a prime q = 3 (mod 4), over the root of its order."""
    squares = {i * i % q for i in range(1, q)}
    row = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))]).double()
    place = torch.arange(q)
    made = torch.ones(q + 1, q + 1, dtype=torch.float64)
    made[1:, 0] = -1
    made[1:, 1:] = row[(place[None] - place[:, None]) % q] + torch.eye(q, dtype=torch.float64)
    return made / (q + 1) ** 0.5


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))


def keeping_ones(matrix: Tensor) -> Tensor:
    """An orthogonal matrix near `matrix` that maps the all-ones vector to itself, both ways.

    One reflection, which takes the image of the ones back to the ones.
    """
    ones = matrix.new_ones(len(matrix))
    off = matrix @ ones - ones
    length = off @ off
    if float(length) < 1e-24:
        return matrix
    return matrix - torch.outer(off, 2 / length * (off @ matrix))


def step(matrix: Tensor, gradient: Tensor, angle: float, *, keep_ones: bool) -> Tensor:
    """The matrix turned against a gradient, by `angle` radians along the fastest plane at most.

    Args:
        matrix: orthogonal, float64.
        gradient: of a loss with respect to it.
        angle: 0 or more.
        keep_ones: the result maps the all-ones vector to itself if `matrix` does.
    """
    skew = gradient @ matrix.T
    skew = skew - skew.T
    if keep_ones:
        skew = skew - skew.mean(0, keepdim=True)
        skew = skew - skew.mean(1, keepdim=True)
    length = torch.linalg.matrix_norm(skew, 2)
    if not float(length) > 0:
        return matrix
    half = skew * (torch.tensor(angle / 2).tan() / length)
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(eye + half, eye - half) @ matrix
