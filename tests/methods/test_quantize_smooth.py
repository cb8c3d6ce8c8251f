"""quantize.smooth: outliers leave the activations, the function stays."""

import pytest
import torch
from torch import nn

from laconic.core.errors import RecipeError
from laconic.core.task import Task
from laconic.methods.base import Context
from laconic.methods.quantize.smooth import QuantizeSmooth
from laconic.program.capture import capture
from laconic.program.sites import Sites


class Block(nn.Module):
    """A norm and what reads it: one channel of the norm's output is a hundred times the others."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.weight[3] = 100.0

    def forward(self, x):
        return self.linear(self.norm(x))


def smoothed(program, data, sites="*", **options):
    task = Task(loss=lambda o, t: o.sum(), metric=lambda o, t: o.sum((1, 2)),
                calibration=[((x,), None) for x in data])  # fmt: skip
    context = Context(task=task, original=program)
    return QuantizeSmooth(**options).apply(program, Sites.of(sites), context)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return capture(Block().eval(), torch.randn(2, 4, 8)), [torch.randn(6, 4, 8) for _ in range(3)]


def test_the_outlier_moves_into_the_weight(block):
    program, data = block
    outcome = smoothed(program, data)
    assert outcome.figures["smoothed"] == 1
    made = outcome.program
    norm = made.tensor("norm.weight").abs()
    assert norm.max() / norm.median() < 0.5 * 100
    with torch.no_grad():
        torch.testing.assert_close(made(data[0]), program(data[0]), rtol=1e-4, atol=1e-3)


def test_strength_zero_leaves_no_spread_in_the_weight(block):
    program, data = block
    columns = smoothed(program, data, strength=0.0).program.tensor("linear.weight").abs().amax(0)
    assert torch.allclose(columns, columns.mean().expand(8), rtol=1e-3)


def test_even_activations_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5)).eval()
    program = capture(model, torch.randn(2, 4, 8))
    outcome = smoothed(program, [torch.randn(6, 4, 8)])
    assert outcome.figures["smoothed"] == 0
    assert any("stand out" in note for note in outcome.notes)


def test_sites_that_match_nothing_are_refused(block):
    program, data = block
    with pytest.raises(RecipeError, match="nowhere"):
        smoothed(program, data, "nowhere")
