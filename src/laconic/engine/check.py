"""Look at the data before any work is spent on it: shapes, values, loss and metric."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.errors import DataError, LaconicError, TaskError
from laconic.core.task import Task, to_device
from laconic.program.capture import Dynamic, capture
from laconic.program.program import Program

SPLITS = ("train", "calibration", "validation", "test")
_BATCHES = 16  # of a split are looked at here; scoring looks at the inputs of all it uses


def capture_for(
    model: nn.Module, task: Task, example_inputs: Any = None, dynamic: Dynamic = "batch"
) -> Program:
    """Capture a model; without example inputs those of the task's first batch serve.

    Raises:
        CaptureError: the model does not export, or holds NaN.
        DataError: the example inputs do not fit the model; says where they come from.
    """
    if example_inputs is not None:
        return capture(model, example_inputs, dynamic=dynamic)
    inputs, place = example_of(task)
    check_finite(inputs, place)
    try:
        return capture(model, inputs, dynamic=dynamic)
    except DataError as error:
        raise DataError(error.message, where=place, hint=error.hint) from error


def example_of(task: Task) -> tuple[Any, str]:
    """Inputs of the first batch of the first split there is, and its place in words.

    Raises:
        DataError: the task has no data, or the batch does not split into inputs.
    """
    for name in ("calibration", "validation", "train", "test"):
        loader = getattr(task, name)
        if loader is not None:
            place = f"task.{name}, batch 1"
            inputs, _ = _split(task, _first(loader, f"task.{name}"), place)
            return inputs, place
    raise DataError(
        "has no data at all",
        where=task.name,
        hint="give the task `validation` and `calibration` (or `train`) loaders",
    )


def check_task(program: Program, task: Task, device: torch.device | None = None) -> None:
    """Run one batch of every split through the Program, and look at the values of a few more.

    Raises:
        DataError: an empty loader, inputs that do not fit the model, NaN or infinite values.
        TaskError: the metric does not give one number per sample, or the loss no number.
    """
    if task.validation is None:
        raise DataError(
            "has no validation data, so nothing could be promised",
            where=task.name,
            hint="give the task a `validation` loader; choices are made on it",
        )
    if task.calibration is None and task.train is None:
        raise DataError(
            "has neither calibration nor train data",
            where=task.name,
            hint="give the task a `calibration` loader; a few hundred unlabelled samples will do",
        )
    device = device or torch.device("cpu")
    for name in SPLITS:
        loader = getattr(task, name)
        if loader is None:
            continue
        place = f"task.{name}"
        _first(loader, place)
        for number, batch in enumerate(itertools.islice(iter(loader), _BATCHES), 1):
            inputs, targets = _split(task, batch, f"{place}, batch {number}")
            check_finite(inputs, f"{place}, batch {number}")
            if number == 1:
                outputs = _forward(program, inputs, device, f"{place}, batch 1")
                if targets is not None and name in ("validation", "test"):
                    _check_metric(task, outputs, to_device(targets, device), place)
                if targets is not None and name == "train":
                    _check_loss(task, outputs, to_device(targets, device), place)


def check_finite(value: Any, where: str) -> None:
    """Every float tensor of a nest holds numbers only.

    Raises:
        DataError: NaN or infinite values; says how many and in which input.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise DataError(
                f"{bad} of {value.numel()} input values are NaN or infinite",
                where=where,
                hint="clean the data, or the numbers measured on it would mean nothing",
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_finite(item, f"{where}, input {key!r}")
    elif isinstance(value, (tuple, list)):
        for item in value:
            check_finite(item, where)


def with_finite_inputs(task: Task, where: str) -> Task:
    """The task, but splitting a batch with NaN or infinite inputs raises a DataError."""

    def split(batch: Any) -> tuple[Any, Any]:
        inputs, targets = task.split(batch)
        check_finite(inputs, where)
        return inputs, targets

    return replace(task, split=split)


def call(program: Program, inputs: Any) -> Any:
    """The Program's outputs for inputs as a task splits them: a tuple, or a dict of keywords."""
    return program(**inputs) if isinstance(inputs, Mapping) else program(*inputs)


def _first(loader: Any, place: str) -> Any:
    try:
        iterator = iter(loader)
    except TypeError as error:
        raise DataError(
            f"is a {type(loader).__name__}, expected batches that can be iterated often",
            where=place,
        ) from error
    for batch in iterator:
        if iterator is loader:
            raise DataError(
                "can be gone through only once: it is a generator or an iterator",
                where=place,
                hint="give a DataLoader or a list of batches",
            )
        return batch
    raise DataError("the loader is empty", where=place, hint="check the data set and `drop_last`")


def _split(task: Task, batch: Any, place: str) -> tuple[Any, Any]:
    try:
        inputs, targets = task.split(batch)
    except LaconicError as error:
        raise DataError(error.message, where=place, hint=error.hint) from error
    except Exception as error:
        raise TaskError(
            f"the task's split() failed with {type(error).__name__}: {error}",
            where=place,
            hint="split(batch) returns (inputs, targets)",
        ) from error
    if not isinstance(inputs, (tuple, Mapping)):
        raise TaskError(
            f"split() gave inputs of type {type(inputs).__name__}, expected a tuple or a dict",
            where=place,
        )
    return inputs, targets


def _shapes(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    items = value.values() if isinstance(value, Mapping) else value
    return [shape for item in items if isinstance(item, Tensor) for shape in _shapes(item)]


def _forward(program: Program, inputs: Any, device: torch.device, place: str) -> Any:
    try:
        with torch.no_grad():
            return call(program, to_device(inputs, device))
    except LaconicError as error:
        raise DataError(error.message, where=f"{place}: {error.where}", hint=error.hint) from error
    except Exception as error:
        wanted = [tuple(tensor.shape) for tensor in program.example]
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"inputs of shapes {_shapes(inputs)} do not fit the model, which was captured with "
            f"{wanted}: {first}",
            where=place,
            hint="the batch dimension may differ, the others may not unless captured as dynamic",
        ) from error


def _check_metric(task: Task, outputs: Any, targets: Any, place: str) -> None:
    count = task.logits(outputs).shape[0]
    where = f"{place}, metric {task.metric_name!r}"
    hint = "metric(outputs, targets) returns a tensor [batch] with one score per sample"
    try:
        scores = task.metric(outputs, targets)
    except Exception as error:
        raise TaskError(
            f"failed with {type(error).__name__}: {error}", where=where, hint=hint
        ) from error
    if not isinstance(scores, Tensor):
        raise TaskError(
            f"returned {type(scores).__name__}, expected a tensor", where=where, hint=hint
        )
    if scores.shape != (count,):
        raise TaskError(
            f"returned shape {tuple(scores.shape)} for {count} samples", where=where, hint=hint
        )
    if not bool(torch.isfinite(scores.float()).all()):
        raise TaskError("returned NaN or infinite scores", where=where, hint=hint)


def _check_loss(task: Task, outputs: Any, targets: Any, place: str) -> None:
    where, hint = f"{place}, loss", "loss(outputs, targets) returns one number as a tensor"
    try:
        loss = task.loss(outputs, targets)
    except Exception as error:
        raise TaskError(
            f"failed with {type(error).__name__}: {error}", where=where, hint=hint
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TaskError(f"returned {type(loss).__name__}, not one number", where=where, hint=hint)
    if not bool(torch.isfinite(loss)):
        raise TaskError(
            f"is {float(loss)} for the original model",
            where=where,
            hint="check targets and their classes",
        )
