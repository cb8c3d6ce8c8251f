"""What a residual branch, or several in a row, is worth to a network."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.progress import SILENT, Progress
from laconic.core.task import Task
from laconic.program.program import Program
from laconic.solvers.layers import branch_removal
from laconic.solvers.layers.residual import Branch
from laconic.solvers.teaching.task_loss import TaskLoss
from laconic.statistics.batches import count
from laconic.statistics.gradients import sampled_loss, sensitivities
from laconic.statistics.layers import layers
from laconic.statistics.walk import Order, Walk

Unit = Sequence[Branch]


def weight_norm(program: Program, unit: Unit, power: int) -> float:
    """Mean of |w| (power 1), or root of the mean of w^2 (power 2), over all matrices and filters.

    Vectors (norms, biases) do not count; a unit that has nothing else counts them.
    """
    held = [program.tensor(name).detach() for branch in unit for name in branch.tensors]
    floating = [tensor for tensor in held if tensor.is_floating_point()]
    chosen = [tensor for tensor in floating if tensor.ndim > 1] or floating
    total = sum(float(tensor.double().abs().pow(power).sum()) for tensor in chosen)
    return (total / max(sum(tensor.numel() for tensor in chosen), 1)) ** (1 / power)


@torch.no_grad()
def influence(
    program: Program, units: Sequence[Unit], batches: Sequence[Sequence[Tensor]]
) -> list[float]:
    """1 - mean cosine between the stream before and after each unit, position by position.

    A position where both are zero counts as unchanged.
    """
    order = Order(program)
    images = {layer.node: layer for layer in layers(program)}
    space = [max([images[n].space for b in unit for n in b.inner if n in images] or [0])
             for unit in units]  # fmt: skip
    sums, seen = [0.0] * len(units), [0] * len(units)
    ends = {node for unit in units for node in (unit[0].stream, unit[-1].total)}
    for batch in batches:
        walk = Walk(program, batch, order)
        walk.run(len(order.nodes), hold=ends)
        for place, unit in enumerate(units):
            one, two = (walk.values[n].float() for n in (unit[0].stream, unit[-1].total))
            axis = one.ndim - 1 - space[place]
            cosine = F.cosine_similarity(one, two, dim=axis)
            still = (one == two).all(axis)
            change = torch.where(still, torch.zeros_like(cosine), 1 - cosine)
            sums[place] += float(change.double().sum())
            seen[place] += change.numel()
    return [total / max(number, 1) for total, number in zip(sums, seen, strict=True)]


def taylor(
    program: Program,
    units: Sequence[Unit],
    batches: Sequence[Sequence[Tensor]],
    task: Task,
    generator: torch.Generator,
) -> list[float]:
    """Mean over samples of |sum of output times gradient|: first-order change of the loss."""
    ends = [branch.end for unit in units for branch in unit]
    total = dict.fromkeys(ends, 0.0)
    seen = 0

    def samples(batch: Sequence[Tensor]) -> int:
        return count(program, tuple(batch))

    loss = sampled_loss(task, generator)
    for found in sensitivities(program, batches, ends, loss, samples):
        seen += found.samples
        for node in ends:
            value, gradient = found.outputs[node]
            whole = len(value) % found.samples != 0  # samples are not apart any more
            products = (value * gradient).double().reshape(1 if whole else found.samples, -1)
            total[node] += float(products.sum(1).abs().sum())
    return [sum(total[branch.end] for branch in unit) / max(seen, 1) for unit in units]


def loss_when_skipped(
    program: Program, units: Sequence[Unit], loss: TaskLoss, progress: Progress = SILENT
) -> list[float]:
    """How much the task's loss rises when each unit is skipped.

    Raises:
        DataError: no data, or data that do not fit.
    """
    whole = loss(program)
    found: list[float] = []
    for unit in progress.track(units, "skipping branches", len(units)):
        small = program.clone()
        twins = branch_removal.twins(program, small, unit)
        branch_removal.remove(small, twins)
        found.append(loss(small) - whole)
    return found
