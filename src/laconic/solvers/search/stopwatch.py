"""Milliseconds of programs in the runtime whose speed counts, taking turns."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from laconic.core.progress import SILENT, Progress
from laconic.measuring.latency import Plan, compare
from laconic.program.program import Program
from laconic.runtimes import get
from laconic.runtimes.base import PRECISIONS, Precision, Runtime, batch_of, fixed_shapes

Timer = Callable[[Mapping[str, Program]], dict[str, float]]
"""Programs by name → milliseconds of each, measured together."""

_PLAN = Plan(rounds=7, seconds=0.02, calls=5, rest=0.005, repeats=7)


@dataclass(frozen=True)
class Stopwatch:
    """Times programs in a runtime.

    Attributes:
        runtime: its name.
        threads: of that runtime; None means all cores.
        progress: gets one step a turn.
        plan: lengths and repeats of a measurement.
        precision: of all of them; None: of each the last of fp32, bf16, int8 that it can have.
        batch: samples at once.
    """

    runtime: str
    threads: int | None = None
    progress: Progress = SILENT
    plan: Plan = _PLAN
    precision: Precision | None = "fp32"
    batch: int = 1

    def __call__(self, programs: Mapping[str, Program]) -> dict[str, float]:
        """Milliseconds by name: of each its fastest turn, others only ever make a turn slower.

        Raises:
            ExportError, MissingExtra: the runtime cannot be used here, or cannot run a program.
        """
        engine = get(self.runtime)
        calls: dict[str, Callable[[], object]] = {}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for number, (name, program) in enumerate(programs.items()):
                kind = self.precision or _best(engine, program)
                path = Path(folder) / f"timed{number}{engine.suffix}"
                path = engine.write(program, path, kind)
                shapes = fixed_shapes(program, self.batch)
                runner = engine.load(path, kind, threads=self.threads, shapes=shapes)
                inputs = batch_of(program, self.batch)
                calls[name] = lambda runner=runner, inputs=inputs: runner.run(inputs)
            found = compare(calls, plan=self.plan, progress=self.progress)
        return {name: held.low or held.value for name, held in found.latency.items()}


def _best(engine: Runtime, program: Program) -> Precision:
    """int8 where the program has integers, else bf16 where the runtime has it, else fp32."""
    fits: list[Precision] = [kind for kind in PRECISIONS if not engine.check(program, kind)]
    return fits[-1] if fits else "fp32"
