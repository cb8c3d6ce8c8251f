"""Sizes under which the measured latency of the network falls by what was asked for.

The latency table says what a choice of sizes saves; whole networks say what that is worth. The
network as it is and the one with every group at its smallest are timed together, which gives the
scale between the table and the clock, and how low it can go. The knapsack is solved for the goal in
the table's unit, the network it leads to is cut and timed, and the goal is corrected between the
nearest networks that were fast enough and too slow, until one is just fast enough. What is promised
is therefore a measured number: latency over that of the whole network, timed in turns with it.

Papers: latency tables and a knapsack in HALP (Shen et al. 2022) and ZipLM (Kurtic et al. 2023).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from laconic.core.errors import BudgetError
from laconic.core.progress import SILENT, Progress
from laconic.program.groups import Groups
from laconic.program.program import Program
from laconic.solvers.channels.allocate import Choice, Scope, allocate, in_the_way
from laconic.solvers.search.latency_table import LatencyTable, measure
from laconic.solvers.search.stopwatch import Timer

Counts = dict[str, int]
Cutter = Callable[[Mapping[str, int]], Program]
_TRIES = 6
_NEAR = 0.03  # a network this part of the goal below it is near enough: clocks say no more


@dataclass(frozen=True)
class Met:
    """What was found.

    Attributes:
        counts: sizes of the groups.
        milliseconds: of the whole network and of the cut one, measured in turns.
        tries: of every network that was timed its part of the latency, as the table foretold it
            and as it was measured.
    """

    counts: Counts
    milliseconds: tuple[float, float]
    tries: tuple[tuple[float, float], ...]

    def figures(self, table: LatencyTable) -> dict[str, Any]:
        """As JSON, with the table."""
        return {
            "milliseconds": [round(value, 6) for value in self.milliseconds],
            "tries": [[round(value, 4) for value in pair] for pair in self.tries],
            "table": [kind.figures() for kind in table.kinds],
        }


@dataclass(frozen=True)
class _Point:
    """A network: its sizes, nanoseconds in the table, part of the whole network's latency."""

    counts: Counts
    table: float
    part: float
    milliseconds: tuple[float, float]


def meet(
    choices: Sequence[Choice],
    table: LatencyTable,
    goal: float,
    cutter: Cutter,
    whole: Program,
    timer: Timer,
    *,
    scope: Scope = "global",
) -> Met:
    """Sizes under which the latency is at most `goal` times that of `whole`.

    Args:
        choices: the groups, in the order of the table.
        table: of the layers that these groups take part in.
        goal: part of the latency that may stay, 0 to 1.
        cutter: the network with given sizes; groups not named keep theirs.
        whole: the network that the goal refers to.
        timer: what measures.
        scope: as in `allocate`.

    Raises:
        BudgetError: it cannot get so fast; says how fast it can and which group is in the way.
    """
    if not choices:
        raise BudgetError("no group can shrink", hint="select other sites")
    clock = _Clock(choices, table, cutter, whole, timer)
    slow, fast = clock.ends()
    if slow.part <= goal:
        return Met(slow.counts, slow.milliseconds, ())
    if fast.part > goal or fast.table >= slow.table:
        raise _refusal(choices, table, fast, goal)
    tries: list[tuple[float, float]] = []
    seen = [slow.counts, fast.counts]
    while len(tries) < _TRIES and fast.table < slow.table:
        share = (goal - fast.part) / (slow.part - fast.part)
        aim = fast.table + min(max(share, 0.05), 0.95) * (slow.table - fast.table)
        counts = allocate(choices, table, aim, scope=scope)
        if counts in seen:
            break
        seen.append(counts)
        found = clock.time(counts)
        foretold = fast.part + (found.table - fast.table) * (slow.part - fast.part) / (
            slow.table - fast.table
        )
        tries.append((foretold, found.part))
        if found.part > goal:
            slow = found
        else:
            fast = found
            if found.part >= goal * (1 - _NEAR):
                break
    return Met(fast.counts, fast.milliseconds, tuple(tries))


class Goal:
    """A latency to be met: what measures, and what was found so far.

    Attributes:
        met: what the last call of `sizes` found, None before.
        table: what it was solved with; measured once, later rounds use it again.
    """

    def __init__(self, whole: Program, timer: Timer, notes: list[str]) -> None:
        """`whole`: the network that parts refer to; `notes` gets what could not be measured."""
        self.met: Met | None = None
        self.table: LatencyTable | None = None
        self._whole, self._timer, self._notes = whole, timer, notes

    def sizes(
        self,
        found: Groups,
        choices: Sequence[Choice],
        part: float,
        cutter: Cutter,
        *,
        scope: Scope = "global",
        progress: Progress = SILENT,
    ) -> Counts:
        """Sizes of the groups under which `part` of the latency stays; arguments as in `meet`."""
        if self.table is None:
            self.table = measure(found, choices, self._timer, progress=progress, notes=self._notes)
        full = np.array([c.size for c in choices], dtype=np.int64)
        self.table = LatencyTable(self.table.kinds, full)
        self.met = meet(choices, self.table, part, cutter, self._whole, self._timer, scope=scope)
        return self.met.counts

    def figures(self) -> dict[str, Any]:
        """What was measured, as JSON; empty before anything was."""
        return {} if self.met is None or self.table is None else self.met.figures(self.table)


class _Clock:
    """Times networks against the whole one."""

    def __init__(
        self,
        choices: Sequence[Choice],
        table: LatencyTable,
        cutter: Cutter,
        whole: Program,
        timer: Timer,
    ) -> None:
        self.choices, self.table, self.cutter = choices, table, cutter
        self.whole, self.timer = whole, timer

    def ends(self) -> tuple[_Point, _Point]:
        """The network as it is now, and the smallest one."""
        now = {c.name: c.size for c in self.choices}
        least = {c.name: int(c.counts[-1]) for c in self.choices}
        times = self._timed({"now": now, "least": least})
        return times[0], times[1]

    def time(self, counts: Counts) -> _Point:
        """One network."""
        return self._timed({"cut": counts})[0]

    def _timed(self, wanted: Mapping[str, Counts]) -> list[_Point]:
        cuts = {name: self.cutter(counts) for name, counts in wanted.items()}
        other = {name: program for name, program in cuts.items() if program is not self.whole}
        times = self.timer({"whole": self.whole, **other})
        whole = times["whole"]
        made: list[_Point] = []
        for name, counts in wanted.items():
            sizes = np.array([counts[c.name] for c in self.choices], dtype=np.int64)
            pair = (whole, times.get(name, whole))
            made.append(_Point(counts, float(self.table.of(sizes)[0]), pair[1] / whole, pair))
        return made


def _refusal(
    choices: Sequence[Choice], table: LatencyTable, fast: _Point, goal: float
) -> BudgetError:
    whole, least = fast.milliseconds
    if fast.part <= goal:
        message = "the latency table shows no layer that gets faster when it gets smaller"
    else:
        message = (
            f"latency can fall by {1 - fast.part:.1%} at most, from {whole:.3g} ms to {least:.3g} "
            f"ms with every group at its smallest, but {1 - goal:.1%} was asked for"
        )
    return BudgetError(message, **in_the_way(choices, table))
