"""Programs as files that would ship: written once, scored, timed side by side.

Every number of a result is measured on such a file, in the runtime that would run it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic import runtimes
from laconic.core.errors import ExportError
from laconic.core.measurement import Measurement
from laconic.core.progress import SILENT, Progress
from laconic.core.task import Task
from laconic.engine.check import with_finite_inputs
from laconic.engine.files import precisions, write_chain
from laconic.engine.store import Store, fingerprint, key_of
from laconic.engine.stream import stream
from laconic.measuring import accuracy, latency, memory
from laconic.program.choices import choices
from laconic.program.program import Program
from laconic.program.signature import rebuild
from laconic.runtimes import _chain
from laconic.runtimes.base import Array, Precision, Runner, batch_of, fixed_shapes

BRIEF = latency.Plan(rounds=7, seconds=0.1)


@dataclass(frozen=True)
class Deployed:
    """One way of running a Program: a runtime and a precision; `program` is not changed by it."""

    program: Program
    runtime: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision}"


class Yard:
    """Where exported files lie while a run lasts, each written once.

    Args:
        folder: where the files go.
        store: where scores are kept.
        threads: of the runtimes.
        device: where a Program itself is scored.
        progress: shows what goes on.
        plan: how long latencies are measured.
        task: whose held-out samples are served where a Program decides by input.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        *,
        threads: int | None = None,
        device: torch.device | None = None,
        progress: Progress = SILENT,
        plan: latency.Plan | None = None,
        task: Task | None = None,
    ) -> None:
        self.folder = folder
        self.task = task
        self.store = store
        self.threads = threads
        self.device = device or torch.device("cpu")
        self.progress = progress
        self.plan = plan or BRIEF
        self._keys: dict[int, tuple[Program, str]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def key(self, program: Program) -> str:
        """A hash of the Program, computed once for each object."""
        held = self._keys.get(id(program))
        if held is None:
            held = (program, fingerprint(program))  # holding it keeps the id from being reused
            self._keys[id(program)] = held
        return held[1]

    def ways(self, program: Program, runtime: str) -> list[Deployed]:
        """Every precision in which a runtime can run the Program."""
        engine = runtimes.get(runtime)
        return [Deployed(program, runtime, kind) for kind in precisions(program, engine)]

    def path(self, way: Deployed, batch: int | None = None) -> Path:
        """The exported file; Inductor compiles one for each batch size.

        Raises:
            ExportError: the runtime cannot express the Program.
        """
        engine = runtimes.get(way.runtime)
        fixed = way.runtime == "inductor" and batch is not None
        name = key_of(self.key(way.program), way.precision, batch if fixed else None)
        path = self.folder / f"{name}{engine.suffix}"
        if not path.exists():
            with self.progress.task(f"exporting for {way}"):
                if fixed:
                    shapes = fixed_shapes(way.program, batch or 1)
                    write_inductor(way.program, path, way.precision, self.threads, shapes)
                else:
                    engine.write(way.program, path, way.precision)
        return path

    def runner(self, way: Deployed, batch: int | None = None) -> Runner:
        """The file, loaded; for one batch size where it is given, else for any.

        Where the Program decides by input it is the chain of its pieces.
        """
        engine = runtimes.get(way.runtime)
        shapes = None if batch is None else fixed_shapes(way.program, batch)
        chain = self._chain(way)
        if chain is not None:
            return _chain.load(chain, engine, self.threads, shapes)
        return engine.load(self.path(way, batch), way.precision, self.threads, shapes)

    def _chain(self, way: Deployed) -> Path | None:
        """The chain beside the static file; None where nothing is decided by input."""
        engine = runtimes.get(way.runtime)
        name = key_of(self.key(way.program), way.precision, None)
        path = self.folder / f"{name}{engine.suffix}"
        target = _chain.path_of(path, engine)
        if target.exists():
            return target
        return write_chain(way.program, path, engine, way.precision, self.threads)

    def scores(self, way: Deployed, task: Task, split: str) -> Tensor:
        """One score per sample `[n]` float64 of a split, by the exported file.

        Raises:
            DataError: an empty loader, NaN, inputs that do not fit.
        """
        return self._scores(
            key_of(self.key(way.program), str(way), split, "scores"),
            lambda: self.runner(way).as_model(way.program.signature),
            task,
            split,
        )

    def program_scores(self, program: Program, task: Task, split: str) -> Tensor:
        """One score per sample `[n]` float64 of a split, by the Program itself."""
        on_cpu = self.device.type == "cpu"
        return self._scores(
            key_of(self.key(program), "program", split, "scores"),
            lambda: program if on_cpu else program.clone().to(self.device),
            task,
            split,
        )

    def _scores(
        self, key: str, predict: Callable[[], Callable[..., Any]], task: Task, split: str
    ) -> Tensor:
        held = self.store.get(key)
        if held is None:
            model = predict()
            device = self.device if isinstance(model, Program) else None
            found = accuracy.evaluate(
                model,
                with_finite_inputs(task, f"task.{split}"),
                task.batches(split),
                device=device,
                progress=self.progress,
            )
            self.store.put(key, {"scores": found.tolist()})
            return found
        return torch.tensor(held["scores"], dtype=torch.float64)

    def latencies(
        self, ways: Mapping[str, Deployed], batch: int, eager: Mapping[str, Program] | None = None
    ) -> dict[str, Measurement]:
        """Latency of every way by its label, in turns within one run, at one batch size.

        Where one of them decides by input, all are given the same held-out samples, a batch after
        the other, and a latency is the mean over these; else the example inputs.
        `eager` adds Programs run by torch itself. The values are kept: a resumed run finds those
        that its earlier decisions rest on.
        """
        eager = eager or {}
        names = {label: [self.key(way.program), str(way)] for label, way in ways.items()}
        names |= {label: [self.key(program), "eager"] for label, program in eager.items()}
        served = self._served([*ways.values()], batch)
        key = key_of(names, batch, self.threads, "stream" if served else "latency")
        held = self.store.get(key)
        if held is None:
            found = self._time(ways, batch, eager, served)
            self.store.put(key, {label: each.to_json() for label, each in found.items()})
            return found
        return {label: Measurement.from_json(each) for label, each in held.items()}

    def _served(self, ways: Sequence[Deployed], batch: int) -> list[list[Array]]:
        """Real inputs, if they matter and there are any."""
        deciding = [way.program for way in ways if choices(way.program)]
        return stream(deciding[0], self.task, batch) if deciding and self.task else []

    def _time(
        self,
        ways: Mapping[str, Deployed],
        batch: int,
        eager: Mapping[str, Program],
        served: Sequence[list[Array]],
    ) -> dict[str, Measurement]:
        calls: dict[str, Any] = {}
        conditions: dict[str, dict[str, Any]] = {}
        for label, way in ways.items():
            runner = self.runner(way, batch)
            calls[label] = partial(_each, runner.run, served or [batch_of(way.program, batch)])
            conditions[label] = {**runner.conditions, "batch": batch}
        for label, program in eager.items():
            given = served or [batch_of(program, batch)]
            tensors = [[torch.from_numpy(array) for array in arrays] for arrays in given]
            calls[label] = partial(_each, partial(_eagerly, program), tensors)
            conditions[label] = {
                "runtime": "eager",
                "precision": "fp32",
                "threads": torch.get_num_threads(),
                "batch": batch,
            }
        found = latency.compare(
            calls, plan=self.plan, conditions=conditions, progress=self.progress
        ).latency
        return {label: _per_call(each, len(served)) for label, each in found.items()}

    def memory(self, way: Deployed, batch: int) -> Measurement:
        """Peak memory of a fresh process that serves the file, above that of its imports.

        Raises:
            DataError: the process failed.
        """
        path = self.path(way, batch)
        inputs = path.with_suffix(f".{batch}.npz")
        np.savez(inputs, *batch_of(way.program, batch))
        asked = {
            "runtime": way.runtime,
            "path": str(path),
            "precision": way.precision,
            "threads": self.threads,
            "inputs": str(inputs),
        }
        stated = {"runtime": way.runtime, "batch": batch, "in": way.precision}
        with self.progress.task(f"measuring the memory of {way}"):
            found = memory.peak("laconic.engine.serve:serve", asked, conditions=stated)
        above = found.value - found.conditions["imports_only"]
        return replace(found, name="memory", value=above)

    def bytes(self, way: Deployed) -> int:
        """Bytes of all files that ship."""
        engine = runtimes.get(way.runtime)
        return sum(file.stat().st_size for file in engine.files(self.path(way)))


def write_inductor(
    program: Program,
    path: Path,
    precision: Precision,
    threads: int | None,
    shapes: Mapping[str, Any] | None,
) -> Path:
    """Inductor's packages hold their thread count and, for speed, their shapes."""
    from laconic.runtimes.inductor import Inductor

    return Inductor().write(program, path, precision, threads, shapes)


def noise(program: Program, batch: int, seed: int = 0) -> dict[str, Any]:
    """Arguments for a call: normal noise for float inputs, the example's values for all others."""
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.from_numpy(array) for array in batch_of(program, batch)]
    leaves = [
        torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for tensor in tensors
    ]
    return {
        name: rebuild(structure, leaves, program.signature.classes)
        for name, structure in program.signature.arguments.items()
    }


def _eagerly(program: Program, tensors: list[torch.Tensor]) -> Any:
    with torch.no_grad():
        return program.run_flat(*tensors)


def _each(run: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
    for each in inputs:
        run(each)


def _per_call(measured: Measurement, calls: int) -> Measurement:
    """The mean of so many calls that were timed as one."""
    if calls < 2:
        return measured
    return replace(
        measured,
        value=measured.value / calls,
        low=None if measured.low is None else measured.low / calls,
        high=None if measured.high is None else measured.high / calls,
        conditions={**measured.conditions, "stream": f"{calls} batches of held-out samples"},
    )


def fastest(measured: Mapping[str, Measurement], tie: float = 1.0) -> str:
    """The label of the fastest, by the least disturbed turn of each.

    Args:
        measured: label → milliseconds.
        tie: the first whose time is at most this many times the least one wins.

    Raises:
        ExportError: nothing was measured.
    """
    if not measured:
        raise ExportError("no runtime can run this model", where="measuring")
    limit = tie * min(map(least, measured.values()))
    return next(label for label, found in measured.items() if least(found) <= limit)


def least(measured: Measurement) -> float:
    """The least disturbed turn: what decisions compare, because other work only adds time."""
    return measured.value if measured.low is None else measured.low
