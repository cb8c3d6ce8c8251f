import pytest
import torch

from laconic.core.budget import Budget
from laconic.core.errors import DataError
from laconic.core.task import classification, embedding
from laconic.measuring import intervals
from laconic.planning import guard

TASK = classification()


def scores(n: int, wrong: slice) -> torch.Tensor:
    made = torch.ones(n, dtype=torch.float64)
    made[wrong] = 0
    return made


def test_a_drop_has_its_exact_bound():
    found = guard.drop(scores(1000, slice(0, 0)), scores(1000, slice(0, 3)), TASK, Budget())
    assert found.value == pytest.approx(0.3)
    assert found.high == pytest.approx(100 * intervals.drop_bound(3, 0, 1000))
    assert found.conditions["losses"] == 3
    assert guard.within(found, Budget(max_drop=1.0))
    assert not guard.within(found, Budget(max_drop=0.3))
    assert "beyond the budget of 0.1 points" in guard.reason(found, TASK, Budget(max_drop=0.1))


@pytest.mark.parametrize("max_drop", [0.5, 2.0])
def test_the_samples_that_are_needed_are_just_enough(max_drop):
    budget = Budget(max_drop=max_drop)
    least = guard.needed(TASK, budget)
    assert least is not None
    for n, holds in ((least, True), (least - 1, False)):
        unchanged = scores(n, slice(0, 5))
        assert guard.within(guard.drop(unchanged, unchanged, TASK, budget), budget) is holds


def test_too_few_samples_are_told_from_too_large_a_drop():
    same = scores(200, slice(0, 5))
    found = guard.drop(same, same, TASK, Budget())
    assert "200 validation samples are too few" in guard.reason(found, TASK, Budget())
    assert "takes 598 without a loss" in guard.reason(found, TASK, Budget())


def test_scores_of_other_samples_do_not_pair():
    with pytest.raises(DataError, match="the same samples in the same order"):
        guard.drop(scores(10, slice(0)), scores(9, slice(0)), TASK, Budget())


def test_a_score_that_is_not_right_or_wrong():
    draw = torch.Generator().manual_seed(0)
    before = torch.rand(500, generator=draw, dtype=torch.float64)
    found = guard.drop(before, before - 0.01, embedding(), Budget(max_drop=0.02))
    assert found.value == pytest.approx(0.01)
    assert found.high is not None
    assert 0.01 <= found.high <= 0.011
    assert guard.needed(embedding(), Budget()) is None
