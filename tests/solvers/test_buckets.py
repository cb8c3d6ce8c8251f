"""Sizes to compile for are the best there are: compared with every choice there is."""

from itertools import combinations

import numpy as np
import pytest

from laconic.core.errors import DataError
from laconic.solvers.dynamic.buckets import Curve, choose


def _cost(weights, fixed, free, each, sizes):
    """What all calls cost with compiled `sizes`, each going to the cheapest that it fits."""
    total = each * len(sizes)
    for size, weight in weights.items():
        fits = [fixed(s) for s in sizes if s >= size]
        total += weight * min([*fits, *([free(size)] if free else [])], default=np.inf)
    return total


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_costs_less(seed):
    draw = np.random.default_rng(seed)
    sizes = draw.choice(40, 7, replace=False) + 1
    weights = {int(size): float(draw.integers(1, 30)) for size in sizes}
    table = {size: float(size + 6 * draw.random()) for size in range(1, 48)}  # not monotone
    open_table = {size: float(size * 1.1 + 8 * draw.random()) for size in range(1, 48)}
    fixed = table.__getitem__
    free = open_table.__getitem__ if seed % 2 else None
    each = float(20 * (seed % 3))
    candidates = [int(size) for size in draw.choice(47, 3, replace=False) + 1]
    for count in (1, 2, 4):
        found = choose(weights, fixed, count=count, free=free, each=each, candidates=candidates)
        able = sorted({*weights, *candidates})
        every = [c for k in range(count + 1) for c in combinations(able, k)]
        best = min(_cost(weights, fixed, free, each, c) for c in every)
        assert len(found.sizes) <= count
        assert found.cost == pytest.approx(best, rel=1e-12)
        assert _cost(weights, fixed, free, each, found.sizes) == pytest.approx(best, rel=1e-12)


def test_where_compiling_gains_nothing_nothing_is_compiled():
    weights = {size: 1.0 for size in range(1, 9)}
    found = choose(weights, lambda size: size * 1.0, count=4, free=lambda size: size * 1.0)
    assert found.sizes == ()
    dear = choose(weights, lambda s: s * 1.0, count=4, free=lambda s: s * 1.1, each=100.0)
    assert dear.sizes == ()
    assert len(choose(weights, lambda s: s * 1.0, count=9, free=lambda s: s * 1.1).sizes) == 8


def test_nothing_to_choose_from_is_said():
    with pytest.raises(DataError, match="0 sizes to choose 3 from"):
        choose({5: 0.0}, float, count=3)


def test_a_curve_goes_through_its_points_and_never_below_them():
    curve = Curve(((2.0, 4.0), (4.0, 5.0), (8.0, 9.0)))
    assert [curve(x) for x in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)] == [
        4.0, 4.0, 4.5, 5.0, 7.0, 9.0, 11.0,
    ]  # fmt: skip
    assert Curve(((3.0, 7.0),))(100.0) == 7.0
