import math
from dataclasses import replace

import pytest
import torch

from laconic.core.errors import DataError, TaskError
from laconic.engine.check import check_task, example_of

from .conftest import batches


def test_a_sound_task_passes(program, task):
    check_task(program, task)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"validation": []}, DataError, r"task.validation: the loader is empty"),
        ({"validation": None}, DataError, "no validation data"),
        ({"train": None}, DataError, "neither calibration nor train"),
        ({"validation": iter(batches())}, DataError, "only once"),
        ({"validation": 3}, DataError, "is a int"),
        (
            {"calibration": [torch.full((2, 4), math.nan)]},
            DataError,
            r"task.calibration, batch 1: 8 of 8 input values are NaN",
        ),
        (
            {"calibration": [torch.zeros(2, 4), torch.tensor([[0, 0, math.inf, 0]])]},
            DataError,
            "batch 2: 1 of 4",
        ),
        (
            {"train": [(torch.zeros(2, 5), torch.zeros(2).long())]},
            DataError,
            r"task.train, batch 1: inputs of shapes \[\(2, 5\)\] do not fit",
        ),
        ({"metric": lambda o, t: 0.5}, TaskError, "returned float, expected a tensor"),
        ({"metric": lambda o, t: torch.tensor(0.5)}, TaskError, r"shape \(\) for 8 samples"),
        ({"metric": lambda o, t: o[:, 0] / 0}, TaskError, "NaN or infinite scores"),
        ({"metric": lambda o, t: 1 / 0}, TaskError, "failed with ZeroDivisionError"),
        ({"loss": lambda o, t: "low"}, TaskError, "returned str, not one number"),
        ({"loss": lambda o, t: o.sum() * math.nan}, TaskError, "is nan for the original"),
        ({"split": lambda b: (b[0], b[1])}, TaskError, "inputs of type Tensor"),
    ],
)
def test_bad_data_is_named(program, task, change, error, says):
    with pytest.raises(error, match=says):
        check_task(program, replace(task, **change))


def test_example_inputs_come_from_the_data(task):
    (x,), place = example_of(task)
    assert x.shape == (8, 4)
    assert place == "task.validation, batch 1"
    with pytest.raises(DataError, match="no data at all"):
        example_of(replace(task, train=None, validation=None, test=None))
