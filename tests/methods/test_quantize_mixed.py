"""quantize.mixed: few bits where they do no harm, within a budget."""

import pytest
import torch
from torch import nn

from laconic.core.errors import BudgetError, RecipeError
from laconic.core.task import Task, classification
from laconic.methods.base import Context
from laconic.methods.quantize.mixed import QuantizeMixed
from laconic.program.capture import capture
from laconic.program.freezing import freeze
from laconic.program.sites import Sites

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def program():
    """Three layers of one size; what the second one gives hardly counts."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)
            self.last = nn.Linear(16, 8)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)) + 1e-3 * torch.relu(self.second(x)))

    return capture(Net().eval(), X[:2])


def mixed(program, sites="*", data=X, **options):
    task = Task(
        loss=lambda o, t: nn.functional.cross_entropy(o, t), metric=lambda o, t: o.sum(1),
        logits=lambda o: o, calibration=[((data,), None)],
    )  # fmt: skip
    context = Context(task=task, original=program)
    return QuantizeMixed(**options).apply(program, Sites.of(sites), context)


@pytest.mark.parametrize("harm", ["output", "loss", "fisher"])
def test_the_layer_that_hardly_counts_gets_the_fewest_bits(program, harm):
    outcome = mixed(program, mean_bits=8.0, widths=(2, 4, 8), harm=harm, symmetric=True)
    bits = outcome.figures["bits"]
    assert bits["second.weight"] == 2
    assert bits["first.weight"] > 2
    assert outcome.figures["effective_bits"] <= 8.0


def test_measured_harm_is_what_the_width_alone_does(program):
    outcome = mixed(program, mean_bits=9.0, widths=(3, 8))
    harm = outcome.figures["harm"]["first.weight"]
    alone = mixed(program, "first.weight", mean_bits=16.0, widths=(3,)).program
    with torch.no_grad():
        wanted, found = program(X), alone(X)
    error = float((found - wanted).square().sum() / wanted.square().sum())
    assert harm[3] == pytest.approx(error, rel=1e-4)
    assert harm[8] < harm[3] / 100


def test_harm_can_be_the_rise_of_the_tasks_loss(program):
    labels = torch.arange(64) % 8
    task = classification(calibration=[(X, labels)])
    context = Context(task=task, original=program)
    options = {"mean_bits": 16.0, "widths": (2, 8), "harm": "loss"}
    harm = QuantizeMixed(**options).apply(program, Sites(), context).figures["harm"]
    alone = mixed(program, "first.weight", mean_bits=16.0, widths=(2,)).program
    with torch.no_grad():
        rise = task.loss(alone(X), labels) - task.loss(program(X), labels)
    assert harm["first.weight"][2] == pytest.approx(max(float(rise), 0.0), rel=1e-3, abs=1e-6)
    assert any(found[2] > found[8] for found in harm.values())


def test_it_is_better_than_the_same_bits_for_all(program):
    def error(made):
        with torch.no_grad():
            return float((made(X) - program(X)).square().mean())

    even = mixed(program, widths=(4,), mean_bits=16.0)
    best = mixed(program, mean_bits=even.figures["effective_bits"])
    assert best.figures["effective_bits"] <= even.figures["effective_bits"]
    assert error(best.program) < 0.5 * error(even.program)


def test_a_budget_that_cannot_be_kept_says_how_low_it_goes(program):
    with pytest.raises(BudgetError, match=r"2 bits a weight cannot be kept") as caught:
        mixed(program, mean_bits=2.0, widths=(4, 8))
    assert "goes down to" in str(caught.value)


def test_resolved_bits_replay_and_have_to_fit(program):
    outcome = mixed(program, mean_bits=7.0)
    again = mixed(program, **outcome.resolved)
    assert again.figures["bits"] == outcome.figures["bits"]
    with torch.no_grad():
        assert torch.equal(again.program(X), outcome.program(X))
        assert torch.equal(freeze(outcome.program)(X), outcome.program(X))
    with pytest.raises(RecipeError, match="no bits for"):
        mixed(program, bits={"first.weight": 4})


def test_widths_out_of_range_are_refused():
    with pytest.raises(ValueError, match="expected some of 2 to 8"):
        QuantizeMixed(widths=(1, 4))
    with pytest.raises(ValueError, match="expected some of 2 to 8"):
        QuantizeMixed(widths=())
