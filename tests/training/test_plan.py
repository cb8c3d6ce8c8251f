"""Schedules, lengths and what "auto" comes to."""

import math

import pytest
import torch
from pydantic import ValidationError

from laconic.training.plan import Plan, steps_within


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_to_its_peak_and_falls_to_zero(schedule):
    plan = Plan(steps=200, lr=0.5, warmup=0.1, schedule=schedule)
    rates = [plan.rate(step) for step in range(200)]
    assert rates[:20] == sorted(rates[:20])
    assert rates[0] == pytest.approx(0.5 / 21)
    assert max(rates) == rates[20] == 0.5
    assert rates[20:] == sorted(rates[20:], reverse=True)
    if schedule == "constant":
        assert set(rates[20:]) == {0.5}
    else:
        assert rates[110] == pytest.approx(0.25)  # half way down, for both
        assert rates[-1] < 0.01 * 0.5


def test_cosine_is_a_half_wave():
    plan = Plan(steps=100, lr=1.0, warmup=0)
    for step in range(100):
        assert plan.rate(step) == pytest.approx(0.5 * (1 + math.cos(math.pi * step / 100)))


def test_a_single_step_has_a_rate():
    assert Plan(steps=1, lr=1.0).rate(0) > 0


def test_only_one_length():
    with pytest.raises(ValidationError, match="one of steps, epochs and minutes"):
        Plan(steps=3, minutes=1)


def test_settled_decides_everything(program):
    plan = Plan().settled(program, torch.device("cpu"), 3)
    assert plan.optimizer == "sgd"  # batch norm
    assert plan.accumulate == 3
    assert plan.precision in ("bf16", "fp32")
    assert None not in (plan.lr, plan.weight_decay)
    assert plan.settled(program, torch.device("cpu"), 1) == plan  # settled stays settled


def test_minutes_count_batches_that_come_again_once_in_full():
    first, later = [9.0, 2.0, 2.0, 3.0], [7.0, 0.5, 0.5, 0.5]
    assert steps_within(100.0, first, [], 0) == (50, 2.0)
    assert steps_within(100.0, first, later, 10) == (10 + 160, 100 / 170)
    assert steps_within(15.0, first, later, 10) == (7, 2.0)  # over before anything comes again
    assert steps_within(0.1, first, later, 10)[0] == 1
