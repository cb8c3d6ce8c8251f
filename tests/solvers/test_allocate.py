import itertools

import pytest
import torch
from torch import nn

from laconic.core.errors import BudgetError
from laconic.program.capture import capture
from laconic.program.cost import CostModel, cost
from laconic.program.groups import groups
from laconic.program.surgery import cut
from laconic.solvers.channels.allocate import Costs, allocate, choice, index_block
from laconic.solvers.weights.elimination import Removal, by_score
from laconic.testing import zoo


def net():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    program = capture(model, torch.randn(2, 6))
    return program, groups(program)


def setting(of="macs", block=1, floor=1):
    program, found = net()
    scores = {g.name: by_score(torch.arange(1, g.size + 1).double() ** 2) for g in found}
    choices = [choice(g, scores[g.name], block=block, floor=floor) for g in found]
    return program, found, choices, Costs(CostModel(program, found), of, [g.name for g in found])


@pytest.mark.parametrize("of", ["macs", "parameters", "channels"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_target_is_met_and_hardly_undercut(of, scope):
    program, found, choices, costs = setting(of)
    full = int(costs.of(costs.full)[0])
    counts = allocate(choices, costs, 0.6 * full, scope=scope)
    small, _ = cut(program, {name: list(range(n)) for name, n in counts.items()}, found)
    reached = {
        "macs": cost(small).macs,
        "parameters": cost(small).params,
        "channels": sum(counts.values()),
    }[of]
    assert 0.45 * full < reached <= 0.6 * full


def test_global_allocation_is_near_the_best_of_all():
    """Every combination tried out: the greedy result is within one step of the optimum."""
    _, _, choices, costs = setting()
    target = 0.55 * int(costs.of(costs.full)[0])

    def harm(counts):
        return sum(
            float(c.harm[list(c.counts).index(n)]) for c, n in zip(choices, counts, strict=True)
        )

    fitting = [
        c
        for c in itertools.product(*(c.counts.tolist() for c in choices))
        if int(costs.of(torch.tensor(c).numpy())[0]) <= target
    ]
    best = min(harm(c) for c in fitting)
    found = allocate(choices, costs, target)
    step = max(float((c.harm[1:] - c.harm[:-1]).max()) for c in choices)
    assert best <= harm(found.values()) <= best + step


def test_a_dip_in_a_curve_does_not_stop_the_descent():
    _, found, _, costs = setting()
    steep = Removal(torch.arange(8), torch.tensor([50.0] + [0.0] * 6 + [1e9]).double())
    flat = by_score(torch.full((12,), 20.0))
    choices = [choice(found[0], steep), choice(found[1], flat)]
    counts = allocate(choices, costs, 0.5 * int(costs.of(costs.full)[0]))
    assert counts[found[0].name] <= 3  # 50 once beats 20 over and over


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_kept_sizes_are_multiples_of_the_block(scope):
    _, _, choices, costs = setting(block=4)
    counts = allocate(choices, costs, 0.6 * int(costs.of(costs.full)[0]), scope=scope)
    assert all(n % 4 == 0 for n in counts.values())


def test_a_layerwise_part_is_the_same_for_all():
    _, found, choices, costs = setting("channels")
    counts = allocate(choices, costs, 10, scope="layer")
    assert [counts[g.name] for g in found] == [4, 6]


def test_a_round_part_of_a_wide_group_is_hit_exactly():
    """300 is wider than the finest grid of sizes; a fifth of it is one of them all the same."""
    model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
                          nn.Linear(100, 3))  # fmt: skip
    found = groups(capture(model, torch.randn(2, 4)))
    for group, wanted in zip(found, ((150, 120, 90, 60), (50, 40, 30, 20)), strict=True):
        counts = choice(group, by_score(torch.arange(group.size).double())).counts.tolist()
        assert set(wanted) <= set(counts)


def test_an_impossible_target_says_how_low_and_what_is_in_the_way():
    _, found, choices, costs = setting(floor=6)
    with pytest.raises(BudgetError, match=r"at most.*90\.0%.*may not go below 6 of") as caught:
        allocate(choices, costs, 0.1 * int(costs.of(costs.full)[0]))
    assert caught.value.where in {g.name for g in found}
    with pytest.raises(BudgetError, match="no group"):
        allocate([], costs, 0.0)


def test_a_group_without_a_curve_stays_whole():
    _, found, choices, costs = setting("channels")
    held = [choice(found[0], None), choices[1]]
    counts = allocate(held, costs, 12)
    assert counts[found[0].name] == 8
    assert counts[found[1].name] == 4


def test_a_head_counts_as_its_channels():
    module, inputs = zoo.make("per_head")
    found = groups(capture(module, inputs))
    for group in found:
        (first, *_) = group.by_role("producer") or group.members
        width = int((group.index(first) == 0).sum())
        assert index_block(group, 8) * width % 8 == 0
