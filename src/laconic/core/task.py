"""What a model is for: its data, its loss and its score per sample."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.errors import DataError

Inputs = tuple[Any, ...] | Mapping[str, Any]
Loader = Iterable[Any]


def split_pair(batch: Any) -> tuple[Inputs, Any]:
    """`(inputs, targets)` of a two-element batch; a lone tensor is an input without targets.

    Raises:
        DataError: the batch is neither.
    """
    if isinstance(batch, Tensor):
        return (batch,), None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
        return (inputs if isinstance(inputs, (tuple, Mapping)) else (inputs,)), targets
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return (batch[0],), None
    raise DataError(
        f"a batch of type {type(batch).__name__} is not (inputs, targets)",
        where="task",
        hint="give the Task a `split` function that returns (inputs, targets)",
    )


def first_tensor(outputs: Any) -> Tensor:
    """The tensor that stands for a model's output: itself, `.logits`, or the first one found.

    Raises:
        DataError: there is no tensor in the outputs.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if is_dataclass(outputs) and not isinstance(outputs, (type, Mapping)):
        outputs = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    if isinstance(outputs, Mapping):
        if isinstance(outputs.get("logits"), Tensor):
            return outputs["logits"]
        outputs = list(outputs.values())
    if isinstance(outputs, (tuple, list)):
        for value in outputs:
            if isinstance(value, (Tensor, tuple, list, Mapping)) or is_dataclass(value):
                return first_tensor(value)
    raise DataError(
        f"no tensor in an output of type {type(outputs).__name__}",
        where="task",
        hint="give the Task a `logits` function that picks it",
    )


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is for.

    `train`, `calibration`, `validation` and `test` are iterables of batches that can be gone
    through more than once (a DataLoader, a list). Choices are made on `validation`; `test` is
    looked at once, at the end. `calibration` may be unlabelled; without it `train` serves.

    Attributes:
        loss: `(outputs, targets) -> scalar`.
        metric: `(outputs, targets) -> [batch]`, one score per sample, so that drops can be paired.
        split: batch → `(inputs, targets)`; inputs are a tuple, or a dict of keyword arguments.
        logits: outputs → the tensor that distillation and parity compare.
        unit: unit of the metric's mean; scores are multiplied by `scale` for display.
        binary: scores are 0 or 1, so exact intervals apply.
    """

    loss: Callable[[Any, Any], Tensor]
    metric: Callable[[Any, Any], Tensor]
    train: Loader | None = None
    calibration: Loader | None = None
    validation: Loader | None = None
    test: Loader | None = None
    split: Callable[[Any], tuple[Inputs, Any]] = split_pair
    logits: Callable[[Any], Tensor] = first_tensor
    name: str = "task"
    metric_name: str = "score"
    unit: str = ""
    scale: float = 1.0
    higher_is_better: bool = True
    binary: bool = False

    def batches(self, *splits: str) -> Loader:
        """The first of the named splits that is there.

        Raises:
            DataError: none of them is.
        """
        for name in splits:
            loader: Loader | None = getattr(self, name)
            if loader is not None:
                return loader
        raise DataError(f"the task has no {' or '.join(splits)} data", where=self.name)


class TaskFields(TypedDict, total=False):
    """What every builder takes by keyword: the fields of `Task`."""

    train: Loader | None
    calibration: Loader | None
    validation: Loader | None
    test: Loader | None
    loss: Callable[[Any, Any], Tensor]
    metric: Callable[[Any, Any], Tensor]
    split: Callable[[Any], tuple[Inputs, Any]]
    logits: Callable[[Any], Tensor]
    name: str
    metric_name: str
    unit: str
    scale: float
    higher_is_better: bool
    binary: bool


def classification(**fields: Unpack[TaskFields]) -> Task:
    """One label per sample: logits `[batch, classes]`, targets `[batch]` int64; accuracy in %."""
    made = Task(
        loss=lambda outputs, targets: F.cross_entropy(first_tensor(outputs), targets),
        metric=lambda outputs, targets: (first_tensor(outputs).argmax(-1) == targets).float(),
        name="classification",
        metric_name="accuracy",
        unit="%",
        scale=100.0,
        binary=True,
    )
    return replace(made, **fields)


def regression(**fields: Unpack[TaskFields]) -> Task:
    """Targets of the outputs' shape; the score is a sample's squared error, lower is better."""

    def error(outputs: Any, targets: Tensor) -> Tensor:
        difference = first_tensor(outputs) - targets
        return difference.pow(2).flatten(1).mean(1)

    made = Task(
        loss=lambda outputs, targets: F.mse_loss(first_tensor(outputs), targets),
        metric=error,
        name="regression",
        metric_name="squared error",
        higher_is_better=False,
    )
    return replace(made, **fields)


def language_modelling(*, ignore: int = -100, **fields: Unpack[TaskFields]) -> Task:
    """Logits `[batch, tokens, vocabulary]`, targets `[batch, tokens]`; score: nats per token.

    Targets are the tokens to predict at each position; positions equal to `ignore` do not count.
    """

    def nats(outputs: Any, targets: Tensor) -> Tensor:
        logits = first_tensor(outputs)
        each = F.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=ignore, reduction="none"
        )
        counted = (targets != ignore).sum(1).clamp(min=1)
        return each.sum(1) / counted

    made = Task(
        loss=lambda outputs, targets: F.cross_entropy(
            first_tensor(outputs).flatten(0, 1), targets.flatten(), ignore_index=ignore
        ),
        metric=nats,
        name="language modelling",
        metric_name="loss",
        unit="nats/token",
        higher_is_better=False,
    )
    return replace(made, **fields)


def embedding(**fields: Unpack[TaskFields]) -> Task:
    """Targets are the wanted embeddings `[batch, features]`; the score is the cosine to them."""

    def cosine(outputs: Any, targets: Tensor) -> Tensor:
        return F.cosine_similarity(first_tensor(outputs), targets, dim=-1)

    made = Task(
        loss=lambda outputs, targets: (1 - cosine(outputs, targets)).mean(),
        metric=cosine,
        name="embedding",
        metric_name="cosine",
    )
    return replace(made, **fields)


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor of a nest of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(to_device(item, device) for item in value)
    return value
