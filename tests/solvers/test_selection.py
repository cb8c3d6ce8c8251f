"""What is asked for is what is kept."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from laconic.core.errors import BudgetError
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.program.surgery import cut
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


def test_no_round_but_the_last_does_away_with_a_group():
    """Of two groups of a convolution one stays: then it has none, and no group of that name."""
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU()]
    program = capture(nn.Sequential(*layers, nn.Conv2d(8, 5, 1)), torch.randn(2, 3, 4, 4))
    found = groups(program)
    vanishing = next(group.name for group in found if group.size == 2)

    def shrink(kept):
        small = cut(program, kept, found)[0]
        return small, groups(small)

    names = tuple(group.name for group in found)
    wish = Wish(names, 0.6, of="channels", importance="l1", scope="layer")
    keep = select(Scene(program, ()), found, [wish], 3, shrink)
    assert len(keep[vanishing]) == 1 and vanishing not in shrink(keep)[1].by_name
    sizes = {group.name: len(keep.get(group.name, range(group.size))) for group in found}
    assert sum(sizes.values()) <= 0.4 * sum(group.size for group in found)
    with pytest.raises(BudgetError, match="% at most"):
        select(Scene(program, ()), found, [replace(wish, ratio=0.95)], 3, shrink)
