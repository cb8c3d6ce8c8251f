"""The public functions, with the report added to what the floors below make."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from laconic import storage
from laconic.core.budget import Budget
from laconic.core.progress import SILENT, Progress
from laconic.core.task import Task
from laconic.engine.dispatch import Dispatcher
from laconic.engine.result import Result
from laconic.engine.specialize import Shape, Wish
from laconic.engine.specialize import specialize as _specialize
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


def specialize(
    program: Program,
    shapes: Iterable[Shape],
    *,
    out: str | Path,
    runtime: str = "openvino",
    precision: str | None = None,
    count: int = 8,
    batches: Sequence[int] | None = None,
    requests: int | None = None,
    ahead: bool = True,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Dispatcher:
    """Compile a Program for the shapes it will see; what comes back runs any shape.

    Args:
        program: what `capture` gave, with the dimensions that change named in `dynamic`.
        shapes: a sample of those that will come, as they come: each a number (the only dimension
            beside the batch), a sequence of numbers, or dimension → size. Up to `count` different
            ones are all compiled; of more, those that serve the whole sample fastest.
        out: folder for `model.buckets` and the files it names.
        runtime: "openvino" (compiles from one file), "inductor" (ahead of time, a package
            a shape), or "onnxruntime" (which takes any shape at no cost: nothing to compile).
        precision: "fp32", "bf16" or "int8"; by default int8 where the Program is quantised.
        count: how many shapes at most; how many for each batch size, where there are several.
            Each costs memory: its weights once more.
        batches: batch sizes to compile for; by default those of the sample.
        requests: how many requests a process serves; compiling has to pay within them.
        ahead: keep OpenVINO's compiled code, half a megabyte a shape or so: on such a CPU, in that
            version and with as many threads a shape is opened without compiling.
        threads: of the runtime.
        progress: shows what goes on.

    Raises:
        DataError: no dynamic dimension, or shapes that the Program cannot take.
        ExportError: the runtime cannot express the Program.
    """
    wish = Wish(
        runtime=runtime, precision=precision, count=count, batches=batches, requests=requests,
        ahead=ahead, threads=threads,
    )  # fmt: skip
    return _specialize(program, shapes, Path(out), wish, progress)
