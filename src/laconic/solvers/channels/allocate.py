"""How many indices every group keeps, so that a cost falls by a given ratio and harm is least.

Harm curves come from an importance score, costs from `CostModel`. Globally, the next step is always
the one that does least harm for what it saves: with convex curves (each group's curve is replaced
by its lower convex hull for the comparison) that is the Lagrangian solution of the multiple-choice
knapsack, exact up to one step (Shoham & Gersho 1988; for networks: SPDY, Frantar & Alistarh 2022).
Costs are evaluated anew at every step, because a group's channels get cheaper as its neighbours
shrink. Where a cost has plateaus (measured milliseconds) a step may be as long as pays best. A last
pass gives back what the final step took too much.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from laconic.core.errors import BudgetError
from laconic.program.cost import CostModel
from laconic.program.groups import Group
from laconic.solvers.weights.elimination import Removal

Of = Literal["channels", "macs", "parameters", "ms"]
Scope = Literal["global", "layer"]
Sizes = NDArray[np.int64]
_STEPS = 64  # a group shrinks in at most so many steps


@dataclass(frozen=True)
class Choice:
    """One group: how far it may shrink and in which steps.

    Attributes:
        name: of the group.
        size: of the group.
        counts: sizes it may have, descending; the first is `size`.
        harm: float `[len(counts)]`, harm of each of these sizes, the first is 0.
    """

    name: str
    size: int
    counts: NDArray[np.int64]
    harm: NDArray[np.float64]


def choice(group: Group, removal: Removal | None, *, block: int = 1, floor: int = 1) -> Choice:
    """The sizes that a group may have.

    Args:
        group: that may shrink.
        removal: its harm curve; None leaves it whole.
        block: kept channels are to be a multiple of this (of stored positions: a head of 32
            channels is a multiple of any block that divides 32).
        floor: the smallest size.
    """
    unit = index_block(group, block)
    step = unit * max(1, round(group.size / unit / _STEPS))
    counts = [group.size]
    if removal is not None:
        below = (group.size - 1) // step * step  # multiples of the step, so that round parts hit
        counts += [count for count in range(below, 0, -step) if count >= floor]
    kept = np.array(counts, dtype=np.int64)
    if removal is None:
        return Choice(group.name, group.size, kept, np.zeros(1))
    total = np.concatenate([[0.0], removal.harm.double().cumsum(0).numpy()])
    return Choice(group.name, group.size, kept, total[group.size - kept])


def index_block(group: Group, block: int) -> int:
    """How many indices of a group make a multiple of `block` stored positions."""
    ranked = group.by_role("producer") or group.by_role("consumer") or group.members
    width = int((group.index(ranked[0]) == 0).sum()) if ranked else 1
    return block // gcd(block, max(width, 1))


class Costs:
    """A cost as a function of the sizes of some groups; the other groups keep theirs.

    Attributes:
        full: the groups' sizes.
        uneven: whether it may have plateaus: steps that save nothing, before one that does.
    """

    uneven = False

    def __init__(self, model: CostModel, of: Of, names: Sequence[str]) -> None:
        self._model, self._of = model, of
        self.columns = np.array([model.names.index(name) for name in names], dtype=np.int64)
        self.full = model.sizes[self.columns]

    def of(self, sizes: Sizes) -> Sizes:
        """`[choices, groups]` → `[choices]`."""
        sizes = np.atleast_2d(sizes)
        if self._of == "channels":
            return sizes.sum(1)
        rows = np.repeat(self._model.sizes[None], len(sizes), axis=0)
        rows[:, self.columns] = sizes
        return self._model.macs_of(rows) if self._of == "macs" else self._model.params_of(rows)


def allocate(
    choices: Sequence[Choice],
    costs: Costs,
    target: float,
    *,
    scope: Scope = "global",
) -> dict[str, int]:
    """Sizes under which the cost is at most `target`.

    Args:
        choices: the groups, in the order of `costs`.
        costs: what is to fall.
        target: highest cost allowed, in the unit of `costs`.
        scope: "global" spends harm where it saves most; "layer" takes the same part of each group.

    Raises:
        BudgetError: it cannot fall so low; says how low it can and which group is in the way.
    """
    lowest = np.array([c.counts[-1] for c in choices], dtype=np.int64)
    if not choices or int(costs.of(lowest)[0]) > target:
        raise BudgetError(**_too_low(choices, costs, lowest, target))
    solve = _even if scope == "layer" else _by_jumps if costs.uneven else _global
    places = solve(choices, costs, target)
    return {c.name: int(c.counts[place]) for c, place in zip(choices, places, strict=True)}


def _global(choices: Sequence[Choice], costs: Costs, target: float) -> list[int]:
    slopes = [_hull_slopes(c) for c in choices]
    places = [0] * len(choices)
    sizes = costs.full.copy()
    cost = int(costs.of(sizes)[0])
    while cost > target:
        open_ = [i for i, c in enumerate(choices) if places[i] + 1 < len(c.counts)]
        rows = np.repeat(sizes[None], len(open_), axis=0)
        for row, i in enumerate(open_):
            rows[row, i] = choices[i].counts[places[i] + 1]
        saved = cost - costs.of(rows)
        harm = np.array(
            [slopes[i][places[i]] * (sizes[i] - rows[row, i]) for row, i in enumerate(open_)]
        )
        rate = np.where(saved > 0, harm / np.maximum(saved, 1), np.inf)
        best = open_[int(rate.argmin())]
        places[best] += 1
        sizes[best] = choices[best].counts[places[best]]
        cost = int(costs.of(sizes)[0])
    _give_back(choices, costs, target, places, sizes)
    return places


def _by_jumps(choices: Sequence[Choice], costs: Costs, target: float) -> list[int]:
    """The same for a cost with plateaus: every smaller size of a group is the end of a step."""
    places = [0] * len(choices)
    harms = [np.minimum(c.harm, 1e300) for c in choices]
    sizes = costs.full.copy()
    cost = int(costs.of(sizes)[0])
    while cost > target:
        ends = [(i, p) for i, c in enumerate(choices) for p in range(places[i] + 1, len(c.counts))]
        rows = np.repeat(sizes[None], len(ends), axis=0)
        for row, (i, place) in enumerate(ends):
            rows[row, i] = choices[i].counts[place]
        saved = cost - costs.of(rows)
        harm = np.array([harms[i][place] - harms[i][places[i]] for i, place in ends])
        pays = saved > 0
        rate = np.where(pays, harm / np.maximum(saved, 1), harm if not pays.any() else np.inf)
        best, place = ends[int(rate.argmin())]
        places[best] = place
        sizes[best] = choices[best].counts[place]
        cost = int(costs.of(sizes)[0])
    _give_back(choices, costs, target, places, sizes)
    return places


def _give_back(
    choices: Sequence[Choice], costs: Costs, target: float, places: list[int], sizes: Sizes
) -> None:
    """Undo steps that the target does not need, the most harmful ones first."""

    def last_harm(i: int) -> float:
        harm = choices[i].harm
        return float(harm[places[i]] - harm[places[i] - 1]) if places[i] else 0.0

    for i in sorted(range(len(choices)), key=last_harm, reverse=True):
        while places[i]:
            tried = sizes.copy()
            tried[i] = choices[i].counts[places[i] - 1]
            if int(costs.of(tried)[0]) > target:
                break
            places[i] -= 1
            sizes[i] = tried[i]


def _hull_slopes(choice: Choice) -> NDArray[np.float64]:
    """Harm per index of every step, on the lower convex hull of the harm curve."""
    removed = (choice.size - choice.counts).astype(np.float64)
    harm = np.minimum(choice.harm, 1e300)
    corners = [0]
    for place in range(1, len(removed)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            rise = (harm[b] - harm[a]) * (removed[place] - removed[a])
            if rise < (harm[place] - harm[a]) * (removed[b] - removed[a]):
                break
            corners.pop()
        corners.append(place)
    slopes = np.zeros(max(len(removed) - 1, 0))
    for a, b in zip(corners[:-1], corners[1:], strict=True):
        slopes[a:b] = (harm[b] - harm[a]) / (removed[b] - removed[a])
    return slopes


def _even(choices: Sequence[Choice], costs: Costs, target: float) -> list[int]:
    """The smallest common part that, taken from every group, meets the target."""

    def at(part: float) -> list[int]:
        """The largest allowed size that is not above the wished one, or the smallest there is."""
        return [
            int(np.argmax(c.counts <= wished))
            if (wished := c.size * (1 - part) + 1e-9) >= c.counts[-1]
            else len(c.counts) - 1
            for c in choices
        ]

    def cost(places: Sequence[int]) -> int:
        sizes = [c.counts[place] for c, place in zip(choices, places, strict=True)]
        return int(costs.of(np.array(sizes, dtype=np.int64))[0])

    parts = sorted({1 - int(n) / c.size for c in choices for n in c.counts})
    low, high = 0, len(parts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(at(parts[middle])) <= target else (middle + 1, high)
    return at(parts[low])


def _too_low(
    choices: Sequence[Choice], costs: Costs, lowest: Sizes, target: float
) -> dict[str, Any]:
    if not choices:
        return {"message": "no group can shrink", "hint": "select other sites"}
    full, least = int(costs.of(costs.full)[0]), int(costs.of(lowest)[0])
    message = (
        f"cost can fall by {1 - least / full:.1%} at most, from {full:,} to {least:,}, "
        f"but {1 - target / full:.1%} was asked for"
    )
    return {"message": message, **in_the_way(choices, costs)}


def in_the_way(choices: Sequence[Choice], costs: Costs) -> dict[str, str]:
    """Which group holds most of the cost when all are at their smallest: `where` and `hint`."""
    lowest = np.array([c.counts[-1] for c in choices], dtype=np.int64)
    least = int(costs.of(lowest)[0])

    def held(i: int) -> int:
        one = lowest.copy()
        one[i] = 1
        return least - int(costs.of(one)[0])

    worst = max(range(len(choices)), key=held)
    return {
        "where": choices[worst].name,
        "hint": "of the groups chosen this one holds most of what is left and may not go below "
        f"{lowest[worst]} of {choices[worst].size}: ask for less, raise `limit`, lower `block`, or "
        "select more sites",
    }
