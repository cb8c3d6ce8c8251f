"""What is asked for is what is kept."""

import pytest
import torch
from torch import nn

from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.solvers.channels.selection import Wish, select
from laconic.solvers.importance.base import Scene


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6, 0.7, 0.8])
def test_a_ratio_that_is_no_binary_fraction_takes_no_more_than_it_says(ratio):
    """A fifth of 100 is 20, although 100 * (1 - 0.8) is 19.999... in floating point."""
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 3))
    program = capture(model, torch.randn(2, 4))
    found = groups(program)
    (group,) = found
    wish = Wish((group.name,), ratio, of="channels", importance="l1", scope="layer")
    keep = select(Scene(program, ()), found, [wish], 1, lambda kept: (program, found))
    assert len(keep[group.name]) == round(100 * (1 - ratio))
