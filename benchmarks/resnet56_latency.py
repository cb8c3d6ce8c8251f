"""A budget of milliseconds in place of multiply-adds, for ResNet-56, and both beside each other.

`prune.channels` with `of: ms` is told to land at the latency of the network that the budget of
multiply-adds gave, measured beside it by the same clock, or at a part of that. A clock is a runtime
and a batch size. Kept channels are multiples of eight: kernels with AVX-512 work on eight or
sixteen at a time, and in between a network gets worse without getting faster. Rows are in
`benchmarks.resnet56_channels`; nothing here is trained.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from benchmarks.harness import Row
from laconic.measuring.latency import Plan, compare
from laconic.methods.base import Context, Outcome
from laconic.methods.prune.channels import PruneChannels
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.runtimes.base import Precision
from laconic.runtimes.openvino import OpenVino
from laconic.solvers.stopwatch import Timer

# others compute on this machine meanwhile: what counts are turns taken in one run, and their ratios
TABLE = Plan(rounds=15, seconds=0.01, calls=1, warm_calls=1, rest=0.002, disturbance=8.0)
TURNS = Plan(rounds=21, seconds=0.05, calls=2, warm_calls=1, rest=0.005, disturbance=8.0)
QUICK = Plan(rounds=2, seconds=0.01, calls=2, rest=0.0, disturbance=8.0)
Call = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """Times programs in fp32 at a batch size, in turns: a `Timer` of `prune.channels`.

    Attributes:
        runtime: "openvino", or "eager" for PyTorch itself.
        batch: samples a call.
        threads: of either.
        plan: lengths and repeats of a measurement.
    """

    runtime: str
    batch: int
    threads: int = 1
    plan: Plan = TABLE

    def __call__(self, programs: Mapping[str, Program]) -> dict[str, float]:
        """Milliseconds by name: of each its fastest turn."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            calls = {
                name: self.call(program, Path(folder) / f"timed{number}.xml")
                for number, (name, program) in enumerate(programs.items())
            }
            found = compare(calls, plan=self.plan)
        return {name: held.low or held.value for name, held in found.latency.items()}

    def call(self, program: Program, path: Path, precision: Precision = "fp32") -> Call:
        """One inference of a program; the file it needs, if any, is written to `path`."""
        inputs = [rows(tensor, self.batch) for tensor in program.example]
        if self.runtime == "eager":
            return lambda: eager(program, inputs, self.threads)
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
    """Milliseconds of every program in every runtime, batch 1 and 32, all in turns in one run.

    `<program>_<runtime>_b<batch>`, with `_low` and `_high` of the turns, and `_speedup`: how many
    times faster than `rival`, the median of the rounds' own ratios.
    """
    found: Row = {"threads": threads}
    ways: dict[str, tuple[str, Precision]] = {
        "openvino_bf16": ("openvino", "bf16"),
        "openvino_fp32": ("openvino", "fp32"),
        "eager": ("eager", "fp32"),
    }
    plan = QUICK if quick else TURNS
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for batch in (1, 32):
            for way, (runtime, precision) in ways.items():
                clock = Clock(runtime, batch, threads)
                calls = {
                    name: clock.call(program, Path(folder) / f"{name}_{way}_{batch}.xml", precision)
                    for name, program in programs.items()
                }
                timed = compare(calls, plan=plan, baseline=rival)
                for name, held in timed.latency.items():
                    key, ratio = f"{name}_{way}_b{batch}", timed.ratio[name]
                    found |= {
                        key: held.value,
                        f"{key}_low": held.low,
                        f"{key}_high": held.high,
                        f"{key}_speedup": ratio.value,
                        f"{key}_speedup_low": ratio.low,
                        f"{key}_speedup_high": ratio.high,
                    }
    return found
