"""Latency of several configurations in one run, taking turns, with spread and paired ratios.

Each turn times one configuration for a while and keeps its median; rounds go through all of them
forwards, then backwards, so that slow drifts hit everybody alike. What is reported is the median
of the turns, their range, and the ratio to a baseline taken round by round. A turn during which
other processes used more than 15 % of a CPU (total CPU time of /proc/stat less this process's own)
is repeated, a bounded number of times; how often is in the result.

All configurations stay loaded in one process, and every turn begins with a rest and with calls that
do not count. The rest is needed because thread pools outlive a call: measured as CPU time spent
while the main thread slept after one, ONNX Runtime's threads spin for 40 ms, torch's and
Inductor's (libgomp) for 10 ms, OpenVINO's (TBB) for 1 ms. Without it a turn would be timed against
the spinning of the turn before, in one process or in many; after 100 ms all are asleep.
"""

import gc
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from laconic.core.errors import DataError
from laconic.core.measurement import Measurement
from laconic.core.progress import SILENT, Progress

_STAT = Path("/proc/stat")
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how often to measure.

    Attributes:
        rounds: turns per configuration.
        seconds: least length of a turn.
        calls: least number of calls in a turn.
        warm_calls: calls before each turn that do not count.
        rest: seconds of sleep before each turn, for other thread pools to fall asleep.
        disturbance: share of one CPU that others may use before a turn is repeated.
        repeats: how many disturbed turns are repeated in the whole run, at most.
    """

    rounds: int = 5
    seconds: float = 0.3
    calls: int = 3
    warm_calls: int = 2
    rest: float = 0.1
    disturbance: float = 0.15
    repeats: int = 20


USUAL = Plan()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    Attributes:
        latency: milliseconds per call, by configuration; `low` and `high` are the range of turns.
        ratio: how many times faster than the baseline, paired by round; empty without a baseline.
        repeated: disturbed turns that were thrown away.
        disturbed: disturbed turns that had to be kept because the allowance was spent.
    """

    latency: dict[str, Measurement]
    ratio: dict[str, Measurement] = field(default_factory=dict[str, Measurement])
    repeated: int = 0
    disturbed: int = 0


def compare(
    calls: Mapping[str, Call],
    *,
    plan: Plan | None = None,
    baseline: str | None = None,
    conditions: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress = SILENT,
) -> Comparison:
    """Time several calls against each other.

    Args:
        calls: name → a function without arguments that does one inference.
        plan: lengths and repeats; the default takes about `len(calls) * 2` seconds.
        baseline: name that the ratios refer to.
        conditions: name → what to state with the result (runtime, precision, batch, threads).
        progress: gets one step a turn.

    Raises:
        DataError: nothing to time, or a baseline that is not among the calls.
    """
    plan = plan or USUAL
    if not calls:
        raise DataError("nothing to time", where="latency")
    if baseline is not None and baseline not in calls:
        raise DataError(f"no configuration named {baseline!r}", where="latency")
    for call in calls.values():
        call()  # first calls allocate and tune; they belong to nobody's turn
    rounds = _Rounds(plan)
    turns: dict[str, list[float]] = {name: [] for name in calls}
    with progress.task("latency", plan.rounds * len(calls)) as bar:
        for number in range(plan.rounds):
            names = list(calls)
            for name in names if number % 2 == 0 else names[::-1]:
                turns[name].append(rounds.turn(calls[name]))
                bar.advance(1, name)
    stated = {
        "machine": machine(),
        "turns": plan.rounds,
        "repeated_turns": rounds.repeated,
        "disturbed_turns": rounds.disturbed,
    }
    given = conditions or {}
    latency = {
        name: _summary("latency", values, "ms", {**given.get(name, {}), **stated})
        for name, values in turns.items()
    }
    ratio: dict[str, Measurement] = {}
    if baseline is not None:
        base = turns[baseline]
        for name, values in turns.items():
            paired = [b / v for b, v in zip(base, values, strict=True)]
            ratio[name] = _summary("speed-up", paired, "x", {"baseline": baseline, **stated})
    return Comparison(
        latency=latency, ratio=ratio, repeated=rounds.repeated, disturbed=rounds.disturbed
    )


class _Rounds:
    """Runs turns and keeps count of the disturbed ones."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.repeated = 0
        self.disturbed = 0

    def turn(self, call: Call) -> float:
        """Median milliseconds of one undisturbed turn."""
        while True:
            value, others = _turn(call, self.plan)
            if others is None or others <= self.plan.disturbance:
                return value
            if self.repeated >= self.plan.repeats:
                self.disturbed += 1
                return value
            self.repeated += 1


def _turn(call: Call, plan: Plan) -> tuple[float, float | None]:
    """Median milliseconds of a turn, and the share of a CPU that others used meanwhile."""
    time.sleep(plan.rest)
    for _ in range(plan.warm_calls):
        call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        before, start = _cpu_seconds(), time.perf_counter()
        times: list[float] = []
        now = start
        while now - start < plan.seconds or len(times) < plan.calls:
            call()
            after = time.perf_counter()
            times.append(after - now)
            now = after
        used = _cpu_seconds()
    finally:
        if collecting:
            gc.enable()
    others = None
    if before is not None and used is not None:
        others = ((used[0] - before[0]) - (used[1] - before[1])) / (now - start)
    return 1e3 * float(np.median(times)), others


def _cpu_seconds() -> tuple[float, float] | None:
    """Busy CPU seconds of the whole machine and of this process with its children, so far."""
    try:
        first = _STAT.read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, soft, *rest = map(int, first[1:])
    busy = user + nice + system + irq + soft + (rest[0] if rest else 0)  # rest[0]: stolen
    own = os.times()
    ours = own.user + own.system + own.children_user + own.children_system
    return busy / os.sysconf("SC_CLK_TCK"), ours


def _summary(
    name: str, values: list[float], unit: str, conditions: Mapping[str, Any]
) -> Measurement:
    return Measurement(
        name=name,
        value=float(np.median(values)),
        unit=unit,
        low=min(values),
        high=max(values),
        repeats=len(values),
        conditions=dict(conditions),
    )


def machine() -> str:
    """The CPU's name and its number of logical cores."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        named = [line for line in text.splitlines() if line.startswith("model name")]
        model = named[0].split(":", 1)[1].strip() if named else ""
    except OSError:
        model = ""
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
