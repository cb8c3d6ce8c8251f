"""A job in stages: each stage makes a Program from the one before and is kept as a file.

The files lie in the cache folder (those of a quick run beside its result), so that an interrupted
benchmark goes on where it stopped.
"""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.data import cache_folder
from benchmarks.harness import Bench, Row
from laconic.core.errors import LaconicError
from laconic.core.progress import Progress
from laconic.core.recipe import Step
from laconic.methods.base import Context, Outcome, method_of
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.runtimes.base import Precision
from laconic.runtimes.openvino import OpenVino
from laconic.storage import load, save


class Said(Progress):
    """Progress of a method as lines of the benchmark, one every twenty seconds at most."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def say(self, text: str) -> None:
        self.bench.say(text)

    @contextmanager
    def task(self, what: str, total: float | None = None) -> Generator["Line"]:
        yield Line(self.bench, what, total)


class Line:
    """One piece of work under way, told now and then."""

    def __init__(self, bench: Bench, what: str, total: float | None) -> None:
        self.bench, self.what, self.total = bench, what, total
        self.done, self.told = 0.0, time.perf_counter()

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Count `steps` and say how far it is, if the last line is old enough."""
        self.done += steps
        if time.perf_counter() - self.told > 20:
            self.told = time.perf_counter()
            goal = f" of {self.total:g}" if self.total else ""
            self.bench.say(f"{self.what}: {self.done:g}{goal} {note}")


def apply(program: Program, plain: Mapping[str, Any], context: Context) -> Outcome:
    """One step of a recipe, written as in YAML, applied to a Program."""
    step = Step.from_plain(plain, "benchmark")
    sites = Sites.of(step.sites)
    return method_of(step, "benchmark").apply(program, sites, context)


class Stages:
    """The stages of one job; `folder` tells jobs of different settings apart."""

    def __init__(self, bench: Bench, folder: str) -> None:
        self.bench = bench
        args = bench.args
        self.folder = (args.results / "quick" if args.quick else cache_folder()) / folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[tuple[str, Precision, int], Path] = {}

    def path(self, name: str) -> Path:
        """Where the Program of stage `name` is kept."""
        return self.folder / f"{name}.laconic"

    def program(self, name: str) -> Program:
        """The Program that stage `name` made."""
        try:
            return load(self.path(name))
        except LaconicError as error:
            raise SystemExit(f"stage {name} has to run first (--only {name}): {error}") from None

    def file(self, name: str, precision: Precision) -> Path:
        """Stage `name` as OpenVINO reads it; written once in a run."""
        key = (name, precision, self.path(name).stat().st_mtime_ns)
        if key not in self._files:
            path = self.folder / f"{name}-{precision}.xml"
            self._files[key] = OpenVino().write(self.program(name), path, precision)
        return self._files[key]

    def row(
        self, name: str, make: Callable[[], Outcome], measure: Callable[[Program], Row],
        **settings: Any,
    ) -> Row:  # fmt: skip
        """A row whose Program is kept; `job_s` is the time of `make` alone.

        A stored row without its file is computed again.
        """
        if self.bench.wanted(name) and not self.path(name).exists():
            self.bench.forget(name)

        def compute() -> Row:
            start = time.perf_counter()
            outcome = make()
            seconds = time.perf_counter() - start
            save(outcome.program, self.path(name))
            found = {"job_s": seconds, **measure(outcome.program)}
            if outcome.notes:
                found["notes"] = list(outcome.notes)[:8]
            return found

        return self.bench.row(name, compute, **settings)
