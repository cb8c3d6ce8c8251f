import math
from dataclasses import dataclass

import pytest
import torch

from laconic.core import task
from laconic.core.errors import DataError


def test_classification_scores_each_sample():
    made = task.classification()
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]])
    scores = made.metric({"logits": logits}, torch.tensor([0, 1, 1]))
    assert scores.tolist() == [1.0, 1.0, 0.0]
    assert made.binary and made.higher_is_better


def test_language_modelling_ignores_padding():
    made = task.language_modelling()
    logits = torch.zeros(2, 3, 5)
    targets = torch.tensor([[1, 2, -100], [-100, -100, -100]])
    assert torch.allclose(made.metric(logits, targets), torch.tensor([math.log(5), 0.0]))


def test_regression_scores_are_squared_errors():
    made = task.regression()
    scores = made.metric(torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [0, 0, 3]]))
    assert torch.allclose(scores, torch.tensor([1.0, 3.0]))
    assert not made.higher_is_better


def test_embedding_scores_are_cosines():
    made = task.embedding()
    scores = made.metric(torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
    assert torch.allclose(scores, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("batch", "inputs", "targets"),
    [
        ((1, 2), (1,), 2),
        (((1, 3), 2), (1, 3), 2),
        (({"ids": 1}, 2), {"ids": 1}, 2),
        ((5,), (5,), None),
    ],
)
def test_split_pair(batch, inputs, targets):
    assert task.split_pair(batch) == (inputs, targets)


def test_split_refuses_what_it_does_not_know():
    with pytest.raises(DataError, match="split"):
        task.split_pair({"a": 1})


@dataclass
class Answer:
    loss: torch.Tensor
    logits: torch.Tensor | None


def test_first_tensor_looks_for_logits_then_for_anything():
    tensor = torch.ones(1)
    assert task.first_tensor({"loss": torch.zeros(1), "logits": tensor}) is tensor
    assert task.first_tensor((None, [tensor])) is tensor
    assert task.first_tensor(Answer(loss=torch.zeros(1), logits=tensor)) is tensor
    assert task.first_tensor([Answer(loss=tensor, logits=None)]) is tensor
    with pytest.raises(DataError, match="no tensor"):
        task.first_tensor((1, "a"))


def test_missing_split_is_named():
    with pytest.raises(DataError, match="no calibration or train data"):
        task.classification().batches("calibration", "train")
