import pytest

from laconic.core.errors import RecipeError
from laconic.solvers.channels.channel_block import STEPS, WIDTH, measured, preferred

FLAT = dict.fromkeys([WIDTH, *(WIDTH - step for step in STEPS)], 1.0)


def test_the_smallest_step_that_pays_half_its_work():
    exact = {width: (width / WIDTH) ** 2 for width in FLAT}
    assert preferred(exact) == 1
    assert preferred({**FLAT, WIDTH - 16: 0.7}) == 16
    assert preferred({**FLAT, WIDTH - 4: 0.93, WIDTH - 16: 0.7}) == 4
    assert preferred({**FLAT, WIDTH - 4: 0.95, WIDTH - 16: 0.7}) == 16
    assert preferred(FLAT) == 1


def test_every_width_is_measured_in_the_runtime():
    times = measured("onnxruntime", 1)
    assert sorted(times) == sorted(FLAT)
    assert all(time > 0 for time in times.values())
    assert preferred(times) in (1, *STEPS)


def test_an_unknown_runtime_is_named():
    with pytest.raises(RecipeError, match="onnxruntime"):
        measured("onnxruntim", 1)
