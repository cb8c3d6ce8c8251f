"""One option for each item, costs at most a budget, harm least: the multiple-choice knapsack.

Greedy on the lower convex hulls of the items' options (Shoham & Gersho 1988): the next step is
always the one that does least harm for what it saves. Optimal up to the last step; what that took
too much is given back, to the option that harms least and still fits.
"""

from collections.abc import Sequence

Option = tuple[int, float]
"""Cost and harm."""


def choose(items: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """Which option each item gets, or None where even the cheapest ones exceed the budget.

    >>> choose([[(10, 0.0), (6, 1.0), (2, 5.0)], [(10, 0.0), (4, 1.5)]], 12)
    [1, 1]

    Args:
        items: of each its options, in any order.
        budget: highest sum of costs, in their unit.
    """
    hulls = [hull(options) for options in items]
    places = [0] * len(items)
    spent = sum(items[i][corners[0]][0] for i, corners in enumerate(hulls))

    def rate(i: int) -> float:
        """Harm for what the next corner of an item saves."""
        (cost, harm), (less, more) = (items[i][hulls[i][places[i] + step]] for step in (0, 1))
        return (more - harm) / (cost - less)

    while spent > budget:
        open_ = [i for i in range(len(items)) if places[i] + 1 < len(hulls[i])]
        if not open_:
            return None
        best = min(open_, key=rate)
        spent -= items[best][hulls[best][places[best]]][0]
        places[best] += 1
        spent += items[best][hulls[best][places[best]]][0]
    chosen = [corners[place] for corners, place in zip(hulls, places, strict=True)]
    return _give_back(items, chosen, budget - spent)


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull, least harm first, ever cheaper."""
    order = sorted(range(len(options)), key=lambda i: (options[i][1], options[i][0]))
    corners: list[int] = []
    for i in order:
        cost, harm = options[i]
        if corners and cost >= options[corners[-1]][0]:
            continue
        while len(corners) > 1:
            (first, low), (second, high) = (options[c] for c in corners[-2:])
            if (high - low) * (first - cost) < (harm - low) * (first - second):
                break
            corners.pop()
        corners.append(i)
    return corners


def _give_back(items: Sequence[Sequence[Option]], chosen: list[int], slack: float) -> list[int]:
    """Spend what is left, item by item, the most harmed ones first."""
    for i in sorted(range(len(items)), key=lambda i: items[i][chosen[i]][1], reverse=True):
        limit = items[i][chosen[i]][0] + slack
        fitting = [j for j, (cost, _) in enumerate(items[i]) if cost <= limit]
        best = min(fitting, key=lambda j: (items[i][j][1], items[i][j][0]))
        slack -= items[i][best][0] - items[i][chosen[i]][0]
        chosen[i] = best
    return chosen
