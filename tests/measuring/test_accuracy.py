"""Scores per sample, means and drops."""

import numpy as np
import pytest
import torch
from torch import nn

from laconic.core import task as tasks
from laconic.core.errors import DataError
from laconic.measuring import accuracy, intervals


def _batches(n=10, size=4):
    x = torch.randn(n, 3)
    y = torch.arange(n) % 2
    return [(x[i : i + size], y[i : i + size]) for i in range(0, n, size)]


def test_evaluate_gives_one_score_per_sample_in_order():
    batches, model = _batches(), nn.Linear(3, 2)
    scores = accuracy.evaluate(model, tasks.classification(), batches)
    whole = model(torch.cat([x for x, _ in batches])).argmax(1)
    assert scores.tolist() == (whole == torch.cat([y for _, y in batches])).double().tolist()


def test_keyword_inputs_reach_the_model():
    task = tasks.classification(split=lambda batch: ({"x": batch[0]}, batch[1]))
    seen = []

    def predict(*, x):
        seen.append(len(x))
        return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 2).float()

    scores = accuracy.evaluate(predict, task, _batches())
    assert seen == [4, 4, 2]
    assert scores.sum() == 5


def _task(metric, **options):
    return tasks.classification(metric=metric, **options)


@pytest.mark.parametrize(
    ("task", "batches", "words"),
    [
        (tasks.classification(), [], "empty"),
        (tasks.classification(), [torch.zeros(2, 3)], "no targets"),
        (_task(lambda o, t: 0.5), _batches(), "float"),
        (_task(lambda o, t: (o.argmax(1) == t).float().mean()), _batches(), "not their mean"),
        (_task(lambda o, t: o[:, 0] * float("nan"), binary=False), _batches(), "NaN"),
        (_task(lambda o, t: o[:, 0]), _batches(), "right or wrong"),
    ],
)
def test_what_is_no_score_is_refused(task, batches, words):
    with pytest.raises(DataError, match=words):
        accuracy.evaluate(nn.Linear(3, 2), task, batches)


def test_mean_of_right_and_wrong_has_wilsons_interval():
    found = accuracy.mean(torch.tensor([1.0] * 9 + [0.0]), tasks.classification())
    low, high = intervals.wilson(9, 10)
    assert (found.value, found.low, found.high) == pytest.approx((90, 100 * low, 100 * high))
    assert (found.unit, found.repeats) == ("%", 10)


def test_mean_of_other_scores_brackets_the_mean_and_repeats_itself():
    scores = torch.linspace(0, 1, 50)
    first = accuracy.mean(scores, tasks.regression())
    assert first.low < 0.5 < first.high
    assert first == accuracy.mean(scores, tasks.regression())


def test_drop_counts_losses_and_certifies_with_enough_samples():
    task = tasks.classification()
    same = torch.ones(600)
    found = accuracy.drop(same, same, task)
    assert (found.value, found.losses, found.gains, found.exact) == (0, 0, 0, True)
    assert found.certifies(0.5)
    assert not accuracy.drop(same[:500], same[:500], task).certifies(0.5)
    worse = same.clone()
    worse[:3] = 0
    found = accuracy.drop(same, worse, task)
    assert found.value == pytest.approx(0.5)
    assert (found.losses, found.gains) == (3, 0)
    assert found.low < found.value < found.bound < found.high
    assert not found.certifies(0.5)


def test_a_drop_is_positive_when_worse_whatever_the_direction():
    rng = np.random.default_rng(0)
    errors = torch.from_numpy(rng.uniform(1, 2, 200))
    found = accuracy.drop(errors, errors + 0.25, tasks.regression())
    assert found.value == pytest.approx(0.25)
    assert found.losses == 200
    assert found.bound >= 0.25
    assert not found.exact
    assert accuracy.drop(errors, errors - 0.25, tasks.regression()).value == pytest.approx(-0.25)


def test_scores_of_different_samples_do_not_pair():
    with pytest.raises(DataError, match="pair"):
        accuracy.drop(torch.ones(3), torch.ones(4), tasks.classification())
