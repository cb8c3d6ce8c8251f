"""What may be promised: the drop of a compressed model on validation data, with its upper bound."""

import math

from torch import Tensor

from laconic.core.budget import Budget
from laconic.core.errors import DataError
from laconic.core.measurement import Measurement
from laconic.core.task import Task
from laconic.measuring import accuracy, intervals


def drop(original: Tensor, compressed: Tensor, task: Task, budget: Budget) -> Measurement:
    """How much worse the compressed scores are, in the task's unit; positive is a loss.

    Both hold one score per sample `[n]`, in the same order. `high` is the one-sided bound at the
    budget's confidence: exact for right/wrong scores, a bootstrap with a guard for others.

    Raises:
        DataError: the two differ in length.
    """
    if original.shape != compressed.shape:
        raise DataError(
            f"{len(original)} scores of the original and {len(compressed)} of the compressed model",
            where="task.validation",
            hint="the loader has to give the same samples in the same order every time; "
            "leave out shuffling and random augmentation",
        )
    found = accuracy.drop(original, compressed, task, confidence=budget.confidence)
    return Measurement(
        name="drop",
        value=found.value,
        unit=task.unit,
        low=min(found.low, found.bound),
        high=found.bound,
        repeats=found.samples,
        conditions={
            "split": "validation",
            "confidence": budget.confidence,
            "losses": found.losses,
            "gains": found.gains,
        },
    )


def within(measured: Measurement, budget: Budget) -> bool:
    """Whether the drop is certified to be within the budget."""
    return measured.high is not None and measured.high <= budget.max_drop


def needed(task: Task, budget: Budget) -> int | None:
    """Samples that certify the budget if not one of them is lost; None where that is unknown."""
    share = budget.max_drop / task.scale
    if not task.binary or not 0 < share < 1:
        return None
    # Without a loss the bound is that of one proportion but for the part spent on the nuisance.
    low = math.floor(math.log(1 - budget.confidence) / math.log1p(-share))
    high = 2 * low + 10
    while low < high:
        middle = (low + high) // 2
        if intervals.drop_bound(0, 0, middle, budget.confidence) <= share:
            high = middle
        else:
            low = middle + 1
    return low


def reason(measured: Measurement, task: Task, budget: Budget) -> str:
    """Why a drop is, or is not, within the budget."""
    sure = f"{100 * budget.confidence:g} % sure"
    unit = "points" if task.unit == "%" else task.unit
    found = f"measured {measured.value:+.2f} {unit}, at most {measured.high:.2f} ({sure})"
    if within(measured, budget):
        return f"within the budget: {found}"
    least = needed(task, budget)
    if measured.value <= budget.max_drop and least is not None and measured.repeats < least:
        return (
            f"not certain enough: {found}; {measured.repeats} validation samples are too few, "
            f"{budget.max_drop:g} {unit} takes {least} without a loss"
        )
    return f"beyond the budget of {budget.max_drop:g} {unit}: {found}"
