"""The public functions, with the report added to what the floors below make."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from laconic import storage
from laconic.core.budget import Budget
from laconic.core.progress import SILENT, Progress
from laconic.core.task import Task
from laconic.engine.result import Result
from laconic.planning.compress import Settings, Steps
from laconic.planning.compress import compress as _compress
from laconic.program.capture import Dynamic
from laconic.program.capture import capture as capture
from laconic.program.freezing import freeze
from laconic.program.members import members as members
from laconic.program.program import Program
from laconic.reports import page

PAGES: Mapping[str, Callable[[Result, Path], object]] = {"report.html": page.write}


def compress(
    model_or_program: nn.Module | Program,
    task: Task,
    *,
    recipe: Steps | None = None,
    budget: Budget | None = None,
    example_inputs: Any = None,
    dynamic: Dynamic = "batch",
    device: str = "cpu",
    seed: int = 0,
    workdir: str | Path | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Make a trained model smaller and faster; measure what came of it.

    Args:
        model_or_program: an `nn.Module`, or what `capture` gave; left as it is.
        task: data, loss and metric.
        recipe: steps, each a mapping with "method", "sites" and the method's options; without
            one, recipes are tried from mild to strong under the budget.
        budget: what may be lost and what is minimised.
        example_inputs: a tuple, or a dict of keyword inputs; by default the task's first batch.
        dynamic: which dimensions may change: "batch", ("batch", "sequence"), None, or a mapping.
        device: where calibration and training run.
        seed: all random choices are drawn from it.
        workdir: where state is kept: called again with the same arguments, a stopped job goes on.
        progress: shows what goes on.

    Raises:
        LaconicError: one of its kinds; see `laconic.core.errors`.
    """
    settings = Settings(
        device=device,
        seed=seed,
        workdir=None if workdir is None else Path(workdir),
        progress=progress,
    )
    made = _compress(
        model_or_program,
        task,
        recipe=recipe,
        budget=budget,
        example_inputs=example_inputs,
        dynamic=dynamic,
        settings=settings,
    )
    return replace(made, pages=PAGES)


def save(program: Program, path: str | Path) -> int:
    """Write a Program as one `.laconic` file, weights as integers where quantised; returns bytes.

    Raises:
        StorageError: it cannot be written; an earlier file stays whole.
    """
    return storage.save(freeze(program), path)


def load(path: str | Path) -> Program:
    """The Program in a `.laconic` file, or in a folder that a result was saved to.

    Raises:
        StorageError: no such file, truncated, altered, or of another version.
    """
    path = Path(path)
    return storage.load(path / "model.laconic" if path.is_dir() else path)
