"""Which parts of a quantised network should be integers: milliseconds against harm.

Of every piece two things are measured: what its integers save, as the time of the whole network
with this piece in floats less that with all pieces in integers (a layer alone would say nothing of
the conversions at its borders), and how far its quantisation alone moves the outputs. A knapsack
then gives, for several budgets of time, the pieces that should be floats; each of these networks is
timed as a whole, in turns with the network in integers, and the choice is among what was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.program.program import Program
from laconic.solvers.quantization.integer_units import Unit, without
from laconic.solvers.search import knapsack
from laconic.solvers.search.stopwatch import Timer

_NANOSECONDS = 1e6
_TIE = 0.02
"""Two measurements of one network differ by about that."""


@dataclass(frozen=True)
class Point:
    """A network that was timed.

    Attributes:
        floats: pieces whose quantisation was taken away.
        part: its latency over that of the network with all pieces in integers.
        harm: sum of the harms of the pieces that are integers.
    """

    floats: frozenset[int]
    part: float
    harm: float


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        milliseconds: of the network with all pieces in integers.
        gains: of each piece, the part of these milliseconds that its integers save.
        points: all networks that were timed.
    """

    milliseconds: float
    gains: tuple[float, ...]
    points: tuple[Point, ...]

    def choose(self, slower: float) -> Point:
        """The least harmful network that is at most `slower` slower than the fastest one."""
        limit = min(point.part for point in self.points) * (1 + slower + _TIE)
        fits = [point for point in self.points if point.part <= limit]
        return min(fits, key=lambda point: (point.harm, point.part))

    def figures(self, pieces: Sequence[Unit], harms: Sequence[float]) -> dict[str, Any]:
        """As JSON."""
        table = [
            {"piece": unit.name, "saves": round(gain, 4), "harm": harm}
            for unit, gain, harm in zip(pieces, self.gains, harms, strict=True)
        ]
        front = [
            {"floats": len(p.floats), "milliseconds": round(p.part * self.milliseconds, 4),
             "harm": p.harm}
            for p in sorted(self.points, key=lambda p: p.part)
        ]  # fmt: skip
        return {"milliseconds": round(self.milliseconds, 4), "pieces": table, "front": front}


def measure(
    program: Program, pieces: Sequence[Unit], harms: Sequence[float], timer: Timer, tries: int
) -> Measured:
    """Time the network with no piece, one piece, all pieces and some choices of pieces in floats.

    Args:
        program: quantised, not frozen.
        pieces: its quantisation nodes.
        harms: of each piece, 0 or more.
        timer: what measures.
        tries: how many choices are timed.

    Raises:
        ExportError: the runtime cannot run the network.
    """
    every = frozenset(range(len(pieces)))
    first = _timed(program, pieces, harms, timer, [every, *(frozenset({i}) for i in every)])
    points, milliseconds = first
    single = {next(iter(p.floats)): p.part - 1 for p in points if len(p.floats) == 1}
    gains = tuple(single.get(i, 0.0) for i in range(len(pieces)))
    seen = {point.floats for point in points}
    wanted = [found for found in _choices(gains, harms, tries) if found not in seen]
    more = _timed(program, pieces, harms, timer, wanted)[0][1:] if wanted else []
    return Measured(milliseconds, gains, (*points, *more))


def _choices(gains: Sequence[float], harms: Sequence[float], tries: int) -> list[frozenset[int]]:
    """Pieces that should be floats, for `tries` budgets: first what gains nothing, then ever more.

    As costs the time that floats take more, in millionths of the network's.
    """
    costs = [round(gain * _NANOSECONDS) for gain in gains]
    items = [[(0, harm), (cost, 0.0)] for cost, harm in zip(costs, harms, strict=True)]
    lowest, highest = (sum(end(0, cost) for cost in costs) for end in (min, max))
    found: list[frozenset[int]] = []
    for number in range(tries):
        budget = lowest + (highest - lowest) * (number / tries) ** 2
        places = knapsack.choose(items, budget if number else lowest) or [0] * len(items)
        found.append(frozenset(i for i, place in enumerate(places) if place == 1))
    return list(dict.fromkeys(found))


def _timed(
    program: Program,
    pieces: Sequence[Unit],
    harms: Sequence[float],
    timer: Timer,
    wanted: Sequence[frozenset[int]],
) -> tuple[list[Point], float]:
    """Points of networks beside the one in integers, which comes first; and its milliseconds."""
    sets = [frozenset[int](), *(found for found in dict.fromkeys(wanted) if found)]
    programs: Mapping[str, Program] = {
        str(number): without(program, [n for i in floats for n in pieces[i].nodes])
        for number, floats in enumerate(sets)
    }
    times = timer(programs)
    whole = times["0"]
    points = [
        Point(floats, times[str(number)] / whole,
              sum(harm for i, harm in enumerate(harms) if i not in floats))
        for number, floats in enumerate(sets)
    ]  # fmt: skip
    return points, whole
