"""The mean score of a Program in training, for choosing the best state."""

import torch
from torch import Tensor

from laconic.core.errors import TaskError
from laconic.core.task import Loader, Task, to_device
from laconic.program.program import Program
from laconic.statistics.batches import flat_inputs
from laconic.training.job import Objective
from laconic.training.precision import autocast, in_float32, laid_out, wants_channels_last
from laconic.training.processes import Processes


def labelled(task: Task) -> bool:
    """Whether validation data are there and have targets."""
    if task.validation is None:
        return False
    for batch in task.validation:
        return task.split(batch)[1] is not None
    return False


@torch.no_grad()
def mean_score(
    program: Program,
    task: Task,
    loader: Loader,
    device: torch.device,
    precision: str,
    processes: Processes,
) -> float:
    """Mean of the task's metric over `loader`, in its own direction; batches are shared out.

    Raises:
        TaskError: the metric does not give one number per sample.
    """
    training, channels_last = program.training, wants_channels_last(program)
    program.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for number, batch in enumerate(loader):
        if number % processes.count != processes.rank:
            continue
        inputs, targets = task.split(batch)
        flat = laid_out(
            flat_inputs(program, inputs, f"validation batch {number}"), device, channels_last
        )
        with autocast(device, precision):
            leaves = program.run_flat(*flat)
        outputs = program.signature.arrange(in_float32(leaves))
        scores = task.metric(outputs, to_device(targets, device))
        total += _counted(scores, task.metric_name)
    program.train(training)
    processes.sum_([total])
    if total[1] == 0:
        return float("nan")
    return float(total[0] / total[1])


@torch.no_grad()
def mean_loss(
    program: Program,
    objective: Objective,
    loader: Loader,
    device: torch.device,
    precision: str,
    processes: Processes,
) -> float:
    """Mean of an objective over `loader`, in eval mode; batches are shared out.

    Their numbers are negative, so that nothing is remembered about them as training batches.
    """
    training = program.training
    program.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for number, batch in enumerate(loader):
        if number % processes.count == processes.rank:
            with autocast(device, precision):
                loss = objective(program.run_flat, batch, -1 - number)
            total += torch.tensor([float(loss.value) * loss.samples, loss.samples]).double()
    program.train(training)
    processes.sum_([total])
    return float(total[0] / total[1]) if total[1] else float("nan")


def _counted(scores: object, name: str) -> Tensor:
    if not isinstance(scores, Tensor) or scores.ndim != 1:
        found = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
        raise TaskError(
            f"found {found}, expected a tensor of one score per sample, [batch]",
            where=f"metric {name!r}",
        )
    return torch.tensor([float(scores.double().sum()), float(len(scores))], dtype=torch.float64)
