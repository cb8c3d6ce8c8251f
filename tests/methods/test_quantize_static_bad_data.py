"""quantize.static: data and weights that are odd or wrong, and networks of every kind."""

import pytest
import torch
from torch import nn

from laconic.core.errors import DataError
from laconic.methods.base import Context
from laconic.methods.quantize.static import QuantizeStatic
from laconic.program.capture import capture
from laconic.program.freezing import form_of
from laconic.program.sites import Sites
from laconic.testing import zoo

from .test_quantize_static import Residual, images, quantised_inputs, quantize


def test_nan_in_calibration_names_the_batch(generator):
    data = images(generator)
    program = capture(zoo.shake(Residual()), data[0])
    data[1][0][3, 1, 2, 2] = torch.nan
    with pytest.raises(DataError, match="input x: 1 of"):
        quantize(program, data)


def test_infinite_activations_name_the_node(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.two(torch.exp(self.one(x) * 1000))

    model = zoo.shake(Net())
    program = capture(model, torch.zeros(2, 4))
    with pytest.raises(DataError, match="exp"):
        quantize(program, [(torch.randn(8, 4, generator=generator),)])


def test_no_calibration_data_is_an_error(generator):
    program = capture(zoo.shake(Residual()), images(generator)[0])
    with pytest.raises(DataError, match="empty"):
        quantize(program, [])


def test_an_activation_that_was_always_zero_stays_float(generator):
    model = zoo.shake(Residual())
    with torch.no_grad():
        model.stem.bias.fill_(-1e3)
    data = images(generator)
    outcome = quantize(capture(model, data[0]), data)
    assert any("only zeros" in note and note.startswith("relu:") for note in outcome.notes)
    assert quantised_inputs(outcome.program)["conv2d_1"][:2] == (False, True)
    assert bool(outcome.program(*data[0]).isfinite().all())


@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_an_outlier_of_1e30_leaves_its_tensor_float_and_says_so(rule, generator):
    data = images(generator)
    data[0][0][0, 0, 0, 0] = 1e30
    program = capture(zoo.shake(Residual()), images(generator)[0])
    outcome = quantize(program, data, range=rule)
    assert any(note.startswith("x:") and "outliers" in note for note in outcome.notes)
    x = images(generator)[0]
    assert bool(outcome.program(*x).isfinite().all())


def test_percentiles_ignore_an_outlier(generator):
    data = images(generator, (32, 3, 8, 8))
    program = capture(zoo.shake(Residual()), data[0])
    data[0][0][0, 0, 0, 0] = 300.0
    made = quantize(program, data, range="percentile", percentile=99.9, skip_above=None).program
    assert float(made.tensor("activations.x_scale")) < 5 / 127


def test_a_place_whose_error_dominates_stays_float(generator):
    data = images(generator)
    program = capture(zoo.shake(Residual()), data[0])
    free = quantize(program, data, skip_above=None)
    assert free.figures["sensitivity"] == {}
    guarded = quantize(program, data, skip_above=1e-9)
    assert guarded.figures["activations"] == 0
    assert all("moves the outputs" in note for note in guarded.notes)
    assert len(guarded.resolved["keep_float"]) == 6


def test_constant_and_zero_weights_are_quantised_without_harm(generator):
    model = zoo.shake(Residual())
    with torch.no_grad():
        model.one.weight[2] = 0
        model.two.weight.fill_(0.25)
        model.head.weight.zero_()
    data = images(generator)
    program = capture(model, data[0])
    made = quantize(program, data, skip_above=None).program
    assert bool((made.tensor("head.weight_scale") > 0).all())
    assert torch.allclose(form_of(made, "head.weight").decode(), torch.zeros(5, 8))
    assert bool(made(*data[0]).isfinite().all())


@pytest.mark.parametrize("name", zoo.names())
def test_the_whole_zoo_can_be_quantised(name):
    """Every model: input untouched, outputs close, weights in forms."""
    from laconic.testing import contracts

    program = capture(*zoo.make(name))
    code = str(program.graph)
    task = contracts.own_outputs(program)
    outcome = QuantizeStatic(samples=8).apply(
        program, Sites(), Context(task=task, original=program)
    )
    assert str(program.graph) == code
    for one, two in zip(
        contracts.outputs(program), contracts.outputs(outcome.program), strict=True
    ):
        if one.is_floating_point() and one.numel():
            assert (one - two).square().sum() <= 0.1 * one.square().sum() + 1e-9, name
