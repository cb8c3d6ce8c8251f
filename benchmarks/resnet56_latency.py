"""A budget of milliseconds in place of multiply-adds, for ResNet-56, and both beside each other.

`prune.channels` with `of: ms` is told to land at the latency of the network that the budget of
multiply-adds gave, measured beside it by the same clock, or at a part of that. A clock is a runtime
and a batch size. Kept channels are multiples of eight: kernels with AVX-512 work on eight or
sixteen at a time, and in between a network gets worse without getting faster. Rows are in
`benchmarks.resnet56_channels`; nothing here is trained.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from benchmarks.harness import Row
from laconic.methods.base import Context, Outcome
from laconic.methods.prune.channels import PruneChannels
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.runtimes.base import Precision
from laconic.runtimes.openvino import OpenVino
from laconic.solvers.search.stopwatch import Timer

Call = Callable[[], object]


@dataclass(frozen=True)
class Turns:
    """How long and how often to measure: rounds of turns, each of so many seconds at least."""

    rounds: int
    seconds: float


TABLE, TOGETHER, QUICK = Turns(7, 0.02), Turns(15, 0.06), Turns(2, 0.005)


def timed(calls: Mapping[str, Call], turns: Turns) -> dict[str, list[float]]:
    """Processor milliseconds of a call by name, one number a round; all take turns in every round.

    Time of the processor, of all threads of this process, is what one thread needs by itself on a
    machine that has other work to do as well.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(turns.rounds):
        for name in list(calls) if number % 2 == 0 else list(calls)[::-1]:
            calls[name]()
            start, count = time.process_time(), 0
            while (spent := time.process_time() - start) < turns.seconds or count < 2:
                calls[name]()
                count += 1
            found[name].append(1e3 * spent / count)
    return found


@dataclass(frozen=True)
class Clock:
    """Times programs in fp32 at a batch size, in turns: a `Timer` of `prune.channels`.

    Attributes:
        runtime: "openvino", or "eager" for PyTorch itself.
        batch: samples a call.
        threads: of either.
        turns: of a measurement.
    """

    runtime: str
    batch: int
    threads: int = 1
    turns: Turns = TABLE

    def __call__(self, programs: Mapping[str, Program]) -> dict[str, float]:
        """Processor milliseconds by name: of each its fastest turn."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            calls = {
                name: self.call(program, Path(folder) / f"timed{number}.xml")
                for number, (name, program) in enumerate(programs.items())
            }
            return {name: min(held) for name, held in timed(calls, self.turns).items()}

    def call(self, program: Program, path: Path, precision: Precision = "fp32") -> Call:
        """One inference of a program; the file it needs, if any, lies at `path`, or is written."""
        inputs = [rows(tensor, self.batch) for tensor in program.example]
        if self.runtime == "eager":
            return lambda: eager(program, inputs, self.threads)
        if not path.exists():
            OpenVino().write(program, path, precision)
        names = [node.name for node in program.placeholders]
        shapes = {name: tuple(x.shape) for name, x in zip(names, inputs, strict=True)}
        runner = OpenVino().load(path, precision, self.threads, shapes)
        arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in inputs]
        return lambda: runner.run(arrays)


def rows(tensor: Tensor, batch: int) -> Tensor:
    """A batch of so many rows of an example, from the first on and again."""
    return tensor.index_select(0, torch.arange(batch) % len(tensor))


def eager(program: Program, inputs: Sequence[Tensor], threads: int) -> object:
    """One inference in PyTorch."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        return program.run_flat(*inputs)


class Timed(PruneChannels):
    """`prune.channels` by a clock of the benchmark's."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    clock: Clock

    def timer(self, context: Context) -> Timer:
        """The clock that was given."""
        del context
        return self.clock


def as_fast_as(
    whole: Program, rival: Program, part: float, clock: Clock, context: Context, **options: Any
) -> tuple[Outcome, Row]:
    """`whole` cut to `part` of the latency of `rival`, and what the clock said about it."""
    sites = Sites.of(options.pop("sites"))
    found = clock({"whole": whole, "rival": rival})
    ratio = 1 - part * found["rival"] / found["whole"]
    if ratio <= 0:
        raise SystemExit(f"the rival is no faster than the whole network: {found}")
    method = Timed(clock=clock, ratio=ratio, of="ms", **options)
    outcome = method.apply(whole, sites, context)
    told: Mapping[str, Any] = outcome.figures["latency"]
    asked = {"whole_ms": found["whole"], "rival_ms": found["rival"], "ratio": ratio}
    ms, tries = told["milliseconds"], told["tries"]
    return outcome, {
        **asked,
        "met_whole_ms": ms[0],
        "met_ms": ms[1],
        "tries": tries,
    }


def side_by_side(programs: Mapping[str, Program], rival: str, threads: int, quick: bool) -> Row:
    """Processor milliseconds of every program in every runtime, batch 1 and 32, in turns.

    `<program>_<runtime>_b<batch>`, with `_low` and `_high` of the turns, and `_speedup`: how many
    times faster than `rival`, the median of the rounds' own ratios.
    """
    found: Row = {"threads": threads}
    ways: dict[str, tuple[str, Precision]] = {
        "openvino_bf16": ("openvino", "bf16"),
        "openvino_fp32": ("openvino", "fp32"),
        "eager": ("eager", "fp32"),
    }
    if quick:
        del ways["openvino_bf16"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for batch in (1, 32):
            for way, (runtime, precision) in ways.items():
                clock = Clock(runtime, batch, threads)
                calls = {
                    name: clock.call(program, Path(folder) / f"{name}_{way}.xml", precision)
                    for name, program in programs.items()
                }
                taken = timed(calls, QUICK if quick else TOGETHER)
                for name, held in taken.items():
                    key = f"{name}_{way}_b{batch}"
                    ratios = [b / a for a, b in zip(held, taken[rival], strict=True)]
                    for label, values in ((key, held), (f"{key}_speedup", ratios)):
                        found |= {
                            label: median(values),
                            f"{label}_low": min(values),
                            f"{label}_high": max(values),
                        }
    return found
