"""Costs against counts by hand, and the cost model against what cutting gives."""

import numpy as np
import pytest
import torch
from torch import nn

from laconic.program.capture import capture
from laconic.program.cost import CostModel, cost
from laconic.program.groups import groups
from laconic.program.surgery import cut
from laconic.testing import zoo


def rows(program):
    return {row.node: row for row in cost(program).rows if row.macs}


def test_convolutions_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3),
    )
    program = capture(model, (torch.randn(2, 3, 16, 16),))
    expected = [8 * 3 * 9 * 8 * 8, 12 * 2 * 9 * 6 * 6, 12 * 2 * 4 * 6 * 6]
    assert [row.macs for row in rows(program).values()] == expected
    assert cost(program).macs == sum(expected)
    assert cost(program).params == sum(p.numel() for p in model.parameters())
    assert cost(program).bytes == 4 * cost(program).params


def test_attention_by_hand():
    model, inputs = zoo.make("fused_view")
    found = rows(capture(model, inputs))
    by_operator = {}
    for row in found.values():
        by_operator[row.operator] = by_operator.get(row.operator, 0) + row.macs
    assert by_operator["aten.scaled_dot_product_attention"] == 2 * 4 * 9 * 9 * 8
    assert by_operator["aten.linear"] == 9 * (6 * 32 + 32 * 96 + 32 * 32 + 2 * 32 * 48) + 32 * 5


def test_the_batch_does_not_count():
    model, inputs = zoo.make("batched_heads")
    wide = tuple(torch.cat([x] * 3) for x in inputs)
    assert cost(capture(model, inputs)).macs == cost(capture(model, wide)).macs


def test_work_that_does_not_depend_on_the_batch_counts_once():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))

        def forward(self, x):
            return x @ (self.one @ self.two)

    assert cost(capture(Folded(), (torch.randn(4, 6),))).macs == 6**3 + 6 * 6


def test_tied_and_shared_tensors_count_once():
    model, inputs = zoo.make("tied_language_model")
    found = cost(capture(model, inputs))
    assert found.params == sum(p.numel() for p in model.parameters())


def test_unknown_operators_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x).renorm(2, 0, 1.0)

    assert cost(capture(Odd(), (torch.randn(2, 4),))).unknown == {"aten.renorm": ("renorm",)}


@pytest.mark.parametrize("name", zoo.names())
def test_the_model_agrees_with_cutting(zoo_program, name):
    program = zoo_program(name)
    found = groups(program)
    foretold = CostModel(program, found)
    full = cost(program)
    assert not full.unknown
    assert (foretold.macs({}), foretold.params({})) == (full.macs, full.params)
    generator = np.random.default_rng(0)
    sizes = {group.name: int(generator.integers(1, group.size + 1)) for group in found}
    after = cost(cut(program, {name: range(size) for name, size in sizes.items()}, found)[0])
    assert (foretold.macs(sizes), foretold.params(sizes)) == (after.macs, after.params)


def test_many_choices_at_once_and_the_price_of_one_index(zoo_program):
    program = zoo_program("densenet")
    foretold = CostModel(program, groups(program))
    generator = np.random.default_rng(1)
    choices = generator.integers(1, foretold.sizes + 1, size=(7, len(foretold.names)))
    assert foretold.macs_of(choices).tolist() == [foretold.macs(row) for row in choices]
    macs, params = foretold.per_index()
    for place, name in enumerate(foretold.names):
        fewer = {name: int(foretold.sizes[place]) - 1}
        assert foretold.macs({}) - foretold.macs(fewer) == macs[place]
        assert foretold.params({}) - foretold.params(fewer) == params[place]
    with pytest.raises(KeyError, match="nobody"):
        foretold.macs({"nobody": 1})
