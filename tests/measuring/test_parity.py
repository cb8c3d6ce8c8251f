"""The check passes what is right, and fails what is not, naming it."""

import numpy as np
import pytest
import torch
from torch import nn

from laconic.core.errors import DataError
from laconic.measuring.parity import Bounds, bounds, float_tolerance, parity
from laconic.program.capture import capture


@pytest.fixture
def program():
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    return capture(model, torch.randn(4, 6))


def _runner(program, change=lambda y: y):
    def run(arrays):
        with torch.no_grad():
            return [change(y).numpy() for y in program.run_flat(*map(torch.from_numpy, arrays))]

    return run


def _batches():
    return [(torch.randn(20, 6),), (torch.randn(7, 6),)]


def test_itself_is_exact(program):
    report = parity(program, _runner(program), _batches(), conditions={"runtime": "none"})
    (output,) = report.outputs
    assert report.ok
    assert (output.max_abs, output.relative, output.top1, output.samples) == (0, 0, 1, 27)
    assert output.cosine_min == pytest.approx(1)
    assert report.to_json()["conditions"] == {"runtime": "none"}


def test_the_tolerance_covers_another_order_of_summing_and_little_more(program):
    double = program.clone().double()
    x = torch.randn(200, 6)
    with torch.no_grad():
        wanted, given = double.run_flat(x.double())[0], program.run_flat(x)[0]
    error = float((given - wanted).abs().max() / wanted.abs().max())
    tolerance = float_tolerance(program)
    assert error < tolerance < 1000 * error
    assert tolerance == pytest.approx(4 * 2**-24 * (1 + 6**0.5 + 32**0.5))


def test_an_error_is_named_with_its_size(program):
    report = parity(program, _runner(program, lambda y: y + 0.01), _batches())
    assert not report.ok
    assert "relative error" in report.failures[0]


def test_other_classes_are_found_in_low_precision(program):
    report = parity(program, _runner(program, lambda y: y.roll(1, 1)), _batches(), precision="int8")
    text = " ".join(report.failures)
    assert "best class differs" in text
    assert "cosine" in text


def test_low_precision_forgives_small_errors_but_not_nan(program):
    noise = lambda y: y + 1e-3 * y.abs().max()  # noqa: E731
    assert parity(program, _runner(program, noise), _batches(), precision="bf16").ok
    broken = lambda y: y * float("nan")  # noqa: E731
    assert not parity(program, _runner(program, broken), _batches(), precision="bf16").ok
    assert not parity(program, _runner(program, broken), _batches()).ok


def test_bounds_follow_precision(program):
    assert bounds(program, "fp32").relative is not None
    assert bounds(program, "bf16").cosine_mean > bounds(program, "int8").cosine_mean
    limits = Bounds(relative=1.0)
    assert parity(program, _runner(program, lambda y: y * 1.5), _batches(), limits=limits).ok


def test_outputs_of_another_number_or_shape_are_refused(program):
    with pytest.raises(DataError, match="2 outputs, expected 1"):
        parity(program, lambda arrays: [np.zeros(1)] * 2, _batches())
    with pytest.raises(DataError, match="shape"):
        parity(program, lambda arrays: [np.zeros((2, 2))], _batches())
    with pytest.raises(DataError, match="no batch"):
        parity(program, _runner(program), [])
