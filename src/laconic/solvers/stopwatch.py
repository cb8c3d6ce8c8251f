"""Milliseconds of programs in the runtime whose speed counts, taking turns."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from laconic.core.progress import SILENT, Progress
from laconic.measuring.latency import Plan, compare
from laconic.program.program import Program
from laconic.runtimes import get
from laconic.runtimes.base import batch_of, fixed_shapes

Timer = Callable[[Mapping[str, Program]], dict[str, float]]
"""Programs by name → milliseconds of each, measured together."""

_PLAN = Plan(rounds=7, seconds=0.02, calls=5, rest=0.005, repeats=7)


@dataclass(frozen=True)
class Stopwatch:
    """Times programs in a runtime, in fp32 at batch 1.

    Attributes:
        runtime: its name.
        threads: of that runtime; None means all cores.
        progress: gets one step a turn.
        plan: lengths and repeats of a measurement.
    """

    runtime: str
    threads: int | None = None
    progress: Progress = SILENT
    plan: Plan = _PLAN

    def __call__(self, programs: Mapping[str, Program]) -> dict[str, float]:
        """Milliseconds by name: of each its fastest turn, others only ever make a turn slower.

        Raises:
            ExportError, MissingExtra: the runtime cannot be used here, or cannot run a program.
        """
        engine = get(self.runtime)
        calls: dict[str, Callable[[], object]] = {}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for number, (name, program) in enumerate(programs.items()):
                path = engine.write(program, Path(folder) / f"timed{number}{engine.suffix}")
                shapes = fixed_shapes(program, 1)
                runner = engine.load(path, threads=self.threads, shapes=shapes)
                inputs = batch_of(program, 1)
                calls[name] = lambda runner=runner, inputs=inputs: runner.run(inputs)
            found = compare(calls, plan=self.plan, progress=self.progress)
        return {name: held.low or held.value for name, held in found.latency.items()}
