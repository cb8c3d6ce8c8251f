import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.solvers.search.knapsack import choose, hull

option = st.tuples(st.integers(0, 30), st.integers(0, 30).map(float))
items = st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(items, st.integers(0, 80))
def test_within_budget_and_within_one_step_of_the_optimum(items, budget):
    found = choose(items, budget)
    every = [
        (sum(o[1] for o in picked), sum(o[0] for o in picked))
        for picked in itertools.product(*items)
    ]
    fitting = [harm for harm, cost in every if cost <= budget]
    assert (found is None) == (not fitting)
    if found is None:
        return
    picked = [options[i] for options, i in zip(items, found, strict=True)]
    assert sum(cost for cost, _ in picked) <= budget
    step = max(  # the bound: the harm of one step on one hull
        (
            options[b][1] - options[a][1]
            for options in items
            for a, b in itertools.pairwise(hull(options))
        ),
        default=0.0,
    )
    assert sum(harm for _, harm in picked) <= min(fitting) + step + 1e-9


@settings(max_examples=80, deadline=None)
@given(st.lists(option, min_size=1, max_size=8))
def test_the_hull_is_convex_and_supports_every_option(options):
    corners = [options[i] for i in hull(options)]
    assert corners[0][1] == min(harm for _, harm in options)
    assert corners[-1][0] == min(cost for cost, _ in options)
    rates = [(h2 - h1) / (c1 - c2) for (c1, h1), (c2, h2) in itertools.pairwise(corners)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(rates))
    for (c1, h1), (c2, h2) in itertools.pairwise(corners):  # nothing lies below an edge
        for cost, harm in options:
            if c2 <= cost <= c1:
                assert harm >= h1 + (h2 - h1) * (c1 - cost) / (c1 - c2) - 1e-9
