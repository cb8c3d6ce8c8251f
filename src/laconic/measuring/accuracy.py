"""Scores per sample, their mean with an interval, and the drop from one model to another.

A drop is always counted so that positive means worse, whatever the direction of the metric, and is
given in the task's unit. Right/wrong scores get exact intervals, others a bootstrap with a guard:
see `laconic.measuring.intervals`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.core.measurement import Measurement
from laconic.core.progress import SILENT, Progress
from laconic.core.task import Inputs, Loader, Task, to_device
from laconic.measuring import intervals


@dataclass(frozen=True, kw_only=True)
class Drop:
    """How much worse one model is than another on the same samples, in the task's unit.

    Attributes:
        value: mean of the paired differences; positive means worse.
        low: lower end of the two-sided interval.
        high: upper end of the two-sided interval.
        bound: one-sided upper bound: what may be claimed to be lost at most.
        confidence: level of the interval and of the bound.
        samples: how many were compared.
        losses: right/wrong scores: samples that were right and are now wrong; else those worse.
        gains: the reverse.
        exact: whether the bound is exact, or a bootstrap's.
    """

    value: float
    low: float
    high: float
    bound: float
    confidence: float
    samples: int
    losses: int
    gains: int
    exact: bool

    def certifies(self, max_drop: float) -> bool:
        """Whether the drop is at most `max_drop` at the stated confidence."""
        return self.bound <= max_drop


def evaluate(
    predict: Callable[..., Any],
    task: Task,
    batches: Loader,
    *,
    device: torch.device | None = None,
    progress: Progress = SILENT,
) -> Tensor:
    """Scores `[samples]` float64 of a model (or anything called like one) on labelled batches.

    Raises:
        DataError: no batch, a metric that is not one finite number per sample, no targets.
    """
    if isinstance(predict, torch.nn.Module):
        predict.eval()
    scores: list[Tensor] = []
    with torch.no_grad():
        for number, batch in enumerate(progress.track(batches, "evaluating")):
            inputs, targets = task.split(batch)
            if device is not None:
                inputs, targets = to_device(inputs, device), to_device(targets, device)
            if targets is None:
                raise DataError("has no targets to compare with", where=f"batch {number}")
            outputs = call(predict, inputs)
            scores.append(_scores(task, outputs, targets, inputs, number))
    if not scores:
        raise DataError("the loader is empty", where=task.name)
    return torch.cat(scores)


def call(predict: Callable[..., Any], inputs: Inputs) -> Any:
    """A model called with the inputs of a batch: a tuple, or a mapping of keyword arguments."""
    return predict(**inputs) if isinstance(inputs, Mapping) else predict(*inputs)


def _scores(task: Task, outputs: Any, targets: Any, inputs: Inputs, number: int) -> Tensor:
    where = f"metric {task.metric_name!r}, batch {number}"
    scores: Any = task.metric(outputs, targets)
    if not isinstance(scores, Tensor):
        raise DataError(
            f"found {type(scores).__name__}, expected a tensor [batch]",
            where=where,
            hint="a metric gives one score per sample",
        )
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    first = next((v for v in values if isinstance(v, Tensor) and v.ndim), None)
    if scores.ndim != 1 or (first is not None and len(scores) != len(first)):
        batch = "batch" if first is None else len(first)
        raise DataError(
            f"found shape {tuple(scores.shape)}, expected [{batch}]",
            where=where,
            hint="a metric gives one score per sample, not their mean",
        )
    scores = scores.detach().double().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise DataError("a score is NaN or infinite", where=where)
    if task.binary and not bool(((scores == 0) | (scores == 1)).all()):
        raise DataError(
            "the task says its scores are right or wrong, found others than 0 and 1", where=where
        )
    return scores


def mean(
    scores: Tensor,
    task: Task,
    *,
    confidence: float = 0.95,
    generator: np.random.Generator | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Measurement:
    """The mean score with its interval (Wilson's, or the bootstrap's), in the task's unit.

    `generator` draws the bootstrap samples; the default is seeded, so equal scores give equal ends.
    """
    values = scores.double().numpy()
    if task.binary:
        low, high = intervals.wilson(float(values.sum()), values.size, confidence)
    else:
        drawn = generator or np.random.default_rng(0)
        low, high = intervals.mean_interval(values, drawn, confidence)
    return Measurement(
        name=task.metric_name,
        value=task.scale * float(values.mean()),
        unit=task.unit,
        low=task.scale * low,
        high=task.scale * high,
        repeats=values.size,
        conditions={"confidence": confidence, **(conditions or {})},
    )


def drop(
    original: Tensor,
    compressed: Tensor,
    task: Task,
    *,
    confidence: float = 0.95,
    generator: np.random.Generator | None = None,
) -> Drop:
    """The paired drop from `original` to `compressed` (scores `[samples]` of the same samples).

    Raises:
        DataError: the two do not belong to the same samples.
    """
    if original.shape != compressed.shape or original.ndim != 1:
        raise DataError(
            f"scores of shapes {tuple(original.shape)} and {tuple(compressed.shape)} do not pair"
        )
    sign = 1.0 if task.higher_is_better else -1.0
    before, after = sign * original.double().numpy(), sign * compressed.double().numpy()
    n = before.size
    losses, gains = int((after < before).sum()), int((after > before).sum())
    if task.binary:
        bound = intervals.drop_bound(losses, gains, n, confidence)
        low, high = intervals.drop_interval(losses, gains, n, confidence)
    else:
        drawn = generator or np.random.default_rng(0)
        both = 0.5 + confidence / 2
        bound = intervals.mean_drop_bound(before, after, drawn, confidence)
        high = intervals.mean_drop_bound(before, after, drawn, both)
        low = -intervals.mean_drop_bound(after, before, drawn, both)
    return Drop(
        value=task.scale * float((before - after).mean()),
        low=task.scale * low,
        high=task.scale * high,
        bound=task.scale * bound,
        confidence=confidence,
        samples=n,
        losses=losses,
        gains=gains,
        exact=task.binary,
    )
