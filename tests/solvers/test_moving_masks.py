"""Masks that change in training: by hand on one layer, where every number is known."""

import math

import pytest
import torch
from torch import nn

from laconic.program.capture import capture
from laconic.solvers.weights.moving_masks import MovingMasks, Rule
from laconic.solvers.weights.sparsity_ramp import Ramp
from laconic.solvers.weights.weight_masks import Amount
from laconic.training.optimizers import forget
from laconic.training.plan import Plan

NAME = "weight"


def program_with(values):
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return capture(layer.eval(), torch.randn(2, len(values))).train()


def by_ratio(scores, ratio):
    return Amount(ratio=ratio, scope="global").kept(scores)


class Run:
    """Plain gradient descent with gradients that are dictated."""

    def __init__(self, values, steps, lr=1.0, pruned=(), **rule):
        self.program = program_with(values)
        self.masks = MovingMasks([NAME], Rule(**rule), by_ratio, pruned)
        self.optimizer = torch.optim.SGD([self.program.tensor(NAME)], lr=lr)
        self.masks.begin(self.program, Plan(steps=steps))
        self.done = 0

    def step(self, *gradient):
        weight = self.program.tensor(NAME)
        weight.grad = torch.tensor([gradient])
        self.done += 1
        self.masks.before(self.done)
        self.optimizer.step()
        self.masks.after(self.done, self.optimizer)
        return weight.detach()[0].tolist()


def test_what_learns_unseen_comes_back_with_what_it_has_learned():
    run = Run([4.0, 3.0, 2.0, 1.0], 3, ratio=0.5, end=1.0, curve="linear", every=1)
    # sparsity after the three steps: 1/6, 1/3, 1/2 of four weights, rounded: 1, 1, 2 zeros
    assert run.step(0.0, 0.0, 0.0, 0.0) == [4, 3, 2, 0]
    assert run.step(0.0, 0.0, 0.0, -6.0) == [4, 3, 0, 7]
    assert run.step(3.5, 0.0, 0.0, 0.0) == [0, 3, 0, 7]
    assert run.step(1.0, 1.0, 1.0, 1.0) == [0, 2, 0, 6]  # the masks are final


def test_what_rests_comes_back_with_the_value_it_had():
    run = Run([4.0, 3.0, 2.0, 1.0], 2, ratio=0.5, masked="rest", end=1.0, every=1, curve="linear")
    assert run.step(0.0, 0.0, 0.0, 0.0) == [4, 3, 2, 0]
    assert run.step(0.0, 2.5, 1.5, -5.0) == [4, 0, 0, 1]


def test_what_is_gone_stays_gone():
    run = Run([4.0, 3.0, 2.0, 1.0], 3, ratio=0.5, masked="gone", end=1.0, every=1, curve="linear")
    assert run.step(0.0, 0.0, 0.0, 0.0) == [4, 3, 2, 0]
    assert run.step(3.5, 0.0, 0.0, -9.0) == [0.5, 3, 2, 0]
    assert run.step(0.0, 0.0, 0.0, -9.0) == [0, 3, 2, 0]


def test_growing_takes_the_largest_gradients_and_starts_at_zero():
    run = Run(
        [5.0, 4.0, 3.0, 2.0, 1.0, 0.9], 4, ratio=0.5, masked="gone", regrow=0.99, end=1.0, every=2
    )
    # step 2: 1/2 (1 - 1/8) of six weights go: 3 stay, of which half (0.99 / 2) change places
    run.step(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    keep = run.masks._keep[NAME]
    assert bool(keep.all())
    after = run.step(0.0, 0.0, 0.0, 0.1, 0.2, 0.0)
    kept = run.masks._keep[NAME][0].tolist()
    assert kept == [True, True, False, False, True, False]
    assert after == [5, 4, 0, 0, pytest.approx(0.8), 0]  # it was there before: it keeps its value
    assert run.step(0.0, 0.0, 9.0, 0.0, 0.0, 0.0)[2] == 0  # masked: the optimizer never sees it
    run.step(0.0, 0.0, 9.0, 0.0, 0.0, 0.0)
    assert run.masks._keep[NAME][0].tolist() == [True, True, False, False, True, False]


def test_movement_is_the_sum_of_minus_gradient_times_weight():
    run = Run([1.0, 2.0, -3.0], 2, lr=0.0, ratio=0.34, score="movement", masked="rest", end=1.0)
    run.step(1.0, 0.5, 1.0)
    run.step(-2.0, 0.5, -0.5)
    assert run.masks._scores[NAME][0].tolist() == [1.0, -2.0, 1.5]
    assert run.program.tensor(NAME)[0].tolist() == [1, 0, -3]


@pytest.mark.parametrize("masked", ["learn", "rest", "gone"])
def test_what_is_pruned_already_stays_and_counts(masked):
    regrow = 0.9 if masked == "gone" else 0.0
    run = Run(
        [4.0, 0.0, 3.0, 2.0], 3, pruned=[NAME], ratio=0.5, masked=masked, regrow=regrow,
        end=1.0, every=1,
    )  # fmt: skip
    assert run.masks._ramp.first == 0.25
    for _ in range(4):
        after = run.step(0.0, -9.0, 0.0, 0.0)
    assert after[1] == 0
    assert after.count(0) == 2


def test_only_states_of_the_final_sparsity_count():
    run = Run([4.0, 3.0, 2.0, 1.0], 10, ratio=0.5, end=0.8)
    assert [step for step in range(11) if run.masks.judged(step)] == [8, 9, 10]


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
])  # fmt: skip
def test_momentum_from_before_moves_zeros_unless_it_is_forgotten(make):
    """The known weak point: a gradient of zero does not hold what an optimizer remembers."""
    moved = {}
    for forgetting in (False, True):
        weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        optimizer = make([weight])
        weight.grad = torch.ones(3)
        optimizer.step()
        gone = torch.tensor([True, False, False])
        weight.data.masked_fill_(gone, 0.0)
        if forgetting:
            forget(optimizer, weight, gone)
        for _ in range(3):
            weight.grad = torch.ones(3).masked_fill(gone, 0.0)
            optimizer.step()
        moved[forgetting] = weight.detach().clone()
    assert float(moved[False][0]) != 0
    assert float(moved[True][0]) == 0
    assert torch.equal(moved[True][1:], moved[False][1:])


def test_the_ramp_rises_between_its_ends_and_changes_at_the_last_step_of_it():
    ramp = Ramp.over(100, (0.1, 0.6), (0.2, 0.9), 7)
    changes = [step for step in range(101) if ramp.due(step)]
    assert changes == [10, 17, 24, 31, 38, 45, 52, 59, 60]
    values = [ramp.at(step) for step in range(101)]
    assert values == sorted(values)
    assert values[10] == pytest.approx(0.2)
    assert set(values[60:]) == {0.9}
    for steps in (1, 2, 3, 1000):
        short = Ramp.over(steps, (0.0, 0.75), (0.0, 0.5))
        assert short.due(short.end)
        assert 1 <= short.end <= steps
        assert math.isclose(short.at(steps), 0.5)
