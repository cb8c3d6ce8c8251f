"""Real inputs in their order, for timing what depends on what the inputs hold."""

import numpy as np

from laconic.core.task import Task
from laconic.program.program import Program
from laconic.runtimes.base import Array
from laconic.statistics.batches import count, cut, flat_inputs

SAMPLES = 64  # at the least as many are served in one timed call


def stream(program: Program, task: Task, batch: int) -> list[list[Array]]:
    """Flat inputs of held-out samples in batches of one size, `SAMPLES` samples in all or more.

    Empty where the loader's batches are smaller than `batch`.

    Raises:
        DataError: there are no such data, or they do not fit.
    """
    found: list[list[Array]] = []
    for number, given in enumerate(task.batches("validation", "test", "calibration", "train")):
        flat = flat_inputs(program, task.split(given)[0], f"batch {number} of the stream")
        for start in range(0, count(program, flat) - batch + 1, batch):
            part = cut(program, flat, start, start + batch)
            found.append([np.ascontiguousarray(tensor.cpu().numpy()) for tensor in part])
            if len(found) * batch >= SAMPLES:
                return found
    return found
