"""Grids without data: never worse than where they began, and not stretched by outliers."""

import pytest
import torch

from laconic.solvers.quantization import ranges
from laconic.solvers.quantization.half_quadratic import error, half_quadratic


def weights(shape=(6, 40), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 10])
@pytest.mark.parametrize("axis", [0, 1])
def test_never_worse_than_where_it_began(bits, symmetric, group, axis):
    weight = weights((6, 40) if axis == 0 else (40, 6))
    start = ranges.weight_grid(weight, axis, "minmax", bits, group=group, symmetric=symmetric)
    made = half_quadratic(weight, axis, start)
    before = error(weight, axis, start, 0.7, start.scale)
    after = error(weight, axis, made, 0.7, start.scale)
    assert bool((after <= before * (1 + 1e-6)).all())  # its scale is rounded to float32
    assert float(after.sum()) < float(before.sum())
    assert made.scale.shape == start.scale.shape
    assert made.zero_point.dtype == start.zero_point.dtype
    if symmetric:
        assert torch.equal(made.zero_point, start.zero_point)


def test_an_outlier_does_not_stretch_the_grid():
    weight = weights()
    weight[:, 0] = 30.0
    start = ranges.weight_grid(weight, 0, "minmax", 3, symmetric=False)
    made = half_quadratic(weight, 0, start)
    rest = [ranges.on_grid(weight, 0, grid)[:, 1:] - weight[:, 1:] for grid in (start, made)]
    assert float(rest[1].square().sum()) < float(rest[0].square().sum())


def test_constant_and_empty_channels():
    weight = torch.zeros(3, 8)
    weight[1] = 0.25
    start = ranges.weight_grid(weight, 0, "mse", 3, symmetric=False)
    made = half_quadratic(weight, 0, start)
    assert bool((made.scale > 0).all())
    torch.testing.assert_close(ranges.on_grid(weight, 0, made), weight)


def test_no_rounds_is_the_grid_it_began_with():
    weight = weights()
    start = ranges.weight_grid(weight, 0, "mse", 4, symmetric=False)
    made = half_quadratic(weight, 0, start, rounds=0)
    assert torch.equal(made.scale, start.scale)
    assert torch.equal(made.zero_point, start.zero_point)
