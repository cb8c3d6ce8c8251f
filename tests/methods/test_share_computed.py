"""Sharing names the weights that it leaves out because the graph computes them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from laconic.core.task import Task, regression
from laconic.methods.base import Context, method_class
from laconic.program.capture import capture
from laconic.program.sites import Sites


@pytest.mark.parametrize("method", ["share.vector", "share.hash", "share.layers", "share.cluster"])
def test_a_computed_weight_is_named(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 16)
    )
    program = capture(model.eval(), (torch.randn(4, 16),))
    data = [(torch.randn(4, 16), torch.randn(4, 16))]
    task: Task = regression(train=data, calibration=data)
    found = method_class(method)().apply(program, Sites(), Context(task=task, original=program))
    assert any("0.parametrizations" in note and "simplify.fold" in note for note in found.notes)
