"""Zero-cost proxies: what a network is worth, from one batch and no training.

synflow (Tanaka et al. 2020, arXiv 2006.05467; as a proxy Abdelfattah et al. 2021, 2101.08134): sum
of w dR/dw for the network with absolute weights and an input of ones. jacobian (Mellor et al. 2020,
"Neural architecture search without training", first version 2006.04647): how unlike each other the
gradients at the inputs of different samples are. zico (Li et al. 2023, 2301.11300): sum over layers
of the log of mean by deviation of the gradients over batches. Higher is better in all of them; they
rank networks of one space, and say nothing about accuracy in per cent.

They are meant for networks that are not trained yet; on inherited weights jacobian and zico look
at what training left.
"""

from collections.abc import Callable, Mapping, Sequence
from math import log

import torch
from torch import Tensor

from laconic.core.errors import DataError, RecipeError
from laconic.program.program import Program
from laconic.solvers.recalibrate import norms
from laconic.statistics.gradients import Loss

_SMALL = 1e-12
Proxy = Callable[[Program, Sequence[Sequence[Tensor]], Loss], float]


def synflow(program: Program, batches: Sequence[Sequence[Tensor]], loss: Loss) -> float:
    """Log of the sum of |w dR/dw|, R the sum of the outputs; batches give shapes only.

    Norms are taken for the identity, as the definition wants: their statistics would undo it.
    """
    del loss
    work = _copy(program).double()  # the product of many layers leaves the range of float32
    for norm in norms(work):
        mean, variance = work.tensor(norm.mean), work.tensor(norm.variance)
        norm.measure(work, torch.zeros_like(mean), torch.ones_like(variance))
    weights = _weights(work)
    with torch.no_grad():
        for tensor in work.parameters():
            tensor.abs_()
    inputs = [torch.ones_like(t[:1]).double() if t.is_floating_point() else t[:1]
              for t in batches[0]]  # fmt: skip
    with torch.enable_grad():
        out = [o for o in work.run_flat(*inputs) if o.is_floating_point()]
        total = torch.stack([o.abs().double().sum() for o in out]).sum()
        grads = torch.autograd.grad(total, weights, materialize_grads=True)
    flow = sum(
        float((w.detach().double() * g.double()).abs().sum())
        for w, g in zip(weights, grads, strict=True)
    )
    return log(min(max(flow, _SMALL), torch.finfo(torch.float64).max))


def jacobian(program: Program, batches: Sequence[Sequence[Tensor]], loss: Loss) -> float:
    """Minus the sum of log(v + k) + 1 / (v + k) over eigenvalues of the samples' correlations.

    Raises:
        RecipeError: no float input, whose gradients could be compared.
        DataError: a single sample.
    """
    del loss
    work = _copy(program)
    flat = [t.clone() for t in batches[0]]
    watched = [t.requires_grad_() for t in flat if t.is_floating_point() and t.ndim > 1]
    if not watched:
        raise RecipeError(
            "jacobian compares gradients at float inputs, and this program takes none",
            where="by",
            hint='take by: "zico", "synflow" or "inherited"',
        )
    if len(watched[0]) < 2:
        raise DataError(
            "jacobian compares samples, found one", where="calibration", hint="give a few dozen"
        )
    with torch.enable_grad():
        out = [o for o in work.run_flat(*flat) if o.is_floating_point()]
        total = torch.stack([o.sum() for o in out]).sum()
        grads = torch.autograd.grad(total, watched, materialize_grads=True)
    rows = [g.flatten(1).double() for g in grads]
    correlations = torch.corrcoef(torch.cat(rows, 1)).nan_to_num()
    values = torch.linalg.eigvalsh(correlations).clamp(min=0) + 1e-5
    return -float((values.log() + 1 / values).sum())


def zico(program: Program, batches: Sequence[Sequence[Tensor]], loss: Loss) -> float:
    """Sum over weights of log(sum of mean |g| / deviation of g over batches); two batches at least.

    A batch that stands alone is taken in two halves.
    """
    work = _copy(program)
    weights = _weights(work)
    parts = list(batches) if len(batches) > 1 else _halves(batches[0])
    means = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    sums = [torch.zeros_like(m) for m in means]
    squares = [torch.zeros_like(m) for m in means]
    for part in parts:
        with torch.enable_grad():
            value = loss(work.signature.arrange(work.run_flat(*part)))
            grads = torch.autograd.grad(value, weights, materialize_grads=True)
        for place, grad in enumerate(grads):
            means[place] += grad.double().abs() / len(parts)
            sums[place] += grad.double() / len(parts)
            squares[place] += grad.double().square() / len(parts)
    total = 0.0
    for mean, first, second in zip(means, sums, squares, strict=True):
        deviation = (second - first.square()).clamp(min=0).sqrt()
        alive = deviation > _SMALL
        if bool(alive.any()):
            total += log(max(float((mean[alive] / deviation[alive]).sum()), _SMALL))
    return total


def _halves(batch: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[t[::2] for t in batch], [t[1::2] for t in batch]]


def _copy(program: Program) -> Program:
    """One whose tensors nobody else has, in eval mode."""
    made = program.clone()
    made.unshare()
    for parameter in made.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return made


def _weights(program: Program) -> list[Tensor]:
    """Matrices and filters."""
    return [p for p in program.parameters() if p.ndim > 1 and p.is_floating_point()]


PROXIES: Mapping[str, Proxy] = {"synflow": synflow, "jacobian": jacobian, "zico": zico}
