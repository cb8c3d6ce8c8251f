"""Which sizes to compile for: exact, by dynamic programming.

Given how often each size comes, what a call costs in code compiled for a size, and what it costs
in code for any size, at most k sizes are chosen so that all calls together cost least. A call goes
to the cheapest compiled size that is large enough, padded, or to the code for any size.

Where a larger size is cheaper than a smaller one (kernels like multiples of their tile), padding
to it is what the smaller one costs; so compiled costs may be taken to grow, and the cheapest that
fits is the next one. Between two chosen sizes lies a run of sizes that is served by the upper one:
with them in order, the best choice up to one size is the best choice up to a smaller one and one
more run. O(k n^2) for n different sizes.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laconic.core.errors import DataError

Numbers = NDArray[Any]


@dataclass(frozen=True)
class Choice:
    """Chosen sizes in growing order, and what all calls cost with them."""

    sizes: tuple[int, ...]
    cost: float


def choose(
    weights: Mapping[int, float],
    fixed: Callable[[int], float],
    *,
    count: int,
    free: Callable[[int], float] | None = None,
    each: float = 0.0,
    candidates: Iterable[int] = (),
) -> Choice:
    """The sizes to compile for.

    Args:
        weights: size → how often it comes.
        fixed: what a call costs in code compiled for a size.
        count: how many sizes at most.
        free: what a call of a size costs in code for any size; None: there is none, every size has
            to fit a compiled one.
        each: what one more compiled size costs, in the unit of all calls together.
        candidates: sizes that may be compiled beside those that come.

    Raises:
        DataError: no size at all, or a count below 1.
    """
    known = {size: weight for size, weight in weights.items() if weight > 0}
    if not known or count < 1:
        raise DataError(f"{len(known)} sizes to choose {count} from", where="buckets")
    sizes = sorted(known)
    often = np.array([known[size] for size in sizes], float)
    served, price = _growing(sizes, fixed, candidates)
    open_price = None if free is None else np.array([free(size) for size in sizes], float)
    runs = _runs(often, price, open_price)
    tail = np.zeros(len(sizes) + 1)
    if open_price is not None:
        tail[:-1] = np.cumsum((often * open_price)[::-1])[::-1]
    else:
        tail[:-1] = np.inf
    return _fewest(runs, tail, served, count, each)


def _growing(
    sizes: Sequence[int], fixed: Callable[[int], float], candidates: Iterable[int]
) -> tuple[list[int], Numbers]:
    """For each size the cheapest compiled size that it fits, and what that costs."""
    able = sorted({*sizes, *(size for size in candidates if size > 0)}, reverse=True)
    best: tuple[float, int] = (float("inf"), 0)
    found: dict[int, tuple[float, int]] = {}
    for size in able:
        best = min(best, (float(fixed(size)), size))
        found[size] = best
    return [found[size][1] for size in sizes], np.array([found[size][0] for size in sizes])


def _runs(often: Numbers, price: Numbers, open_price: Numbers | None) -> Numbers:
    """`[first, last]`: cost of the sizes of a run, served by the code for its last one."""
    n = len(often)
    runs = np.full((n, n), np.inf)
    for last in range(n):
        each = np.full(last + 1, price[last])
        if open_price is not None:
            each = np.minimum(each, open_price[: last + 1])
        runs[: last + 1, last] = np.cumsum((often[: last + 1] * each)[::-1])[::-1]
    return runs


def _fewest(runs: Numbers, tail: Numbers, served: Sequence[int], count: int, each: float) -> Choice:
    """The best of 0, 1, ... `count` runs; among equals the one with fewer."""
    n = len(runs)
    reached = np.full(n + 1, np.inf)  # cost of the first i sizes, with the runs so far
    reached[0] = 0.0
    came: list[Numbers] = []
    best, ends = float(tail[0]), (0, 0)  # (runs, how many sizes they cover)
    for number in range(1, min(count, n) + 1):
        total = reached[:-1, None] + runs + each
        before = total.argmin(0)
        came.append(before)
        reached = np.concatenate([[np.inf], total[before, np.arange(n)]])
        whole = reached + tail
        covered = int(whole.argmin())
        if whole[covered] < best:
            best, ends = float(whole[covered]), (number, covered)
    chosen: list[int] = []
    number, covered = ends
    while number:
        chosen.append(served[covered - 1])
        covered = int(came[number - 1][covered - 1])
        number -= 1
    return Choice(tuple(sorted(set(chosen))), best)


@dataclass(frozen=True)
class Curve:
    """Cost over a size: straight between measured points and beyond them, never below the least.

    Attributes:
        points: (size, cost), sizes growing.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, size: float) -> float:
        """The cost at `size`."""
        if len(self.points) == 1:
            return self.points[0][1]
        place = bisect_left(self.points, size, key=itemgetter(0))
        place = min(max(place, 1), len(self.points) - 1)
        (low, under), (high, over) = self.points[place - 1 : place + 1]
        value = under + (over - under) * (size - low) / (high - low)
        return max(value, min(cost for _, cost in self.points))
