"""Learned roundings end on the grid, and where they are bound to."""

import pytest
import torch

from laconic.forms import affine
from laconic.solvers.quantization import ranges
from laconic.solvers.quantization.soft_rounding import SoftWeight


def made(way, *, group=None, axis=0, bits=3, **options):
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    grid = ranges.weight_grid(weight, axis, "mse", bits, group=group, symmetric=False)
    return weight, grid, SoftWeight(weight, axis, grid, way, **options)


def codes(weight, axis, grid):
    return affine.encode(weight, grid.scale, grid.zero_point, axis, grid.qmin, grid.qmax)


@pytest.mark.parametrize("way", ["straight", "sigmoid"])
@pytest.mark.parametrize(("group", "axis"), [(None, 0), (4, 0), (None, 1), (2, 1), (None, None)])
def test_untouched_it_is_rounding_to_nearest(way, group, axis):
    weight, grid, soft = made(way, group=group, axis=axis)
    values, after = soft.settled()
    assert torch.equal(values, ranges.on_grid(weight, axis, grid))
    assert torch.equal(after.scale, grid.scale)
    if way == "straight":
        torch.testing.assert_close(soft.values().detach(), values)


@pytest.mark.parametrize("options", [{"way": "sigmoid"}, {"way": "straight", "reach": 0.5}])
def test_codes_end_at_most_one_from_the_nearest(options):
    weight, grid, soft = made(**options)
    with torch.no_grad():
        soft.codes.add_(torch.randn(soft.codes.shape) * 9)
        soft.hold()
    values, after = soft.settled()
    away = codes(values, 0, after).int() - codes(weight, 0, grid).int()
    assert int(away.abs().max()) == 1


@pytest.mark.parametrize("way", ["straight", "sigmoid"])
def test_settled_values_stay_on_the_grid_bit_for_bit(way):
    weight, _, soft = made(way)
    optimizer = torch.optim.Adam([soft.codes, soft.factors], lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        ((soft.values() - weight.roll(1, 1)).square().mean() + soft.undecided(4)).backward()
        optimizer.step()
    values, grid = soft.settled()
    assert torch.equal(ranges.on_grid(values, 0, grid), values)
    assert not torch.equal(values, ranges.on_grid(weight, 0, grid))


def test_the_regulariser_is_nothing_once_decided():
    _, _, soft = made("sigmoid")
    assert float(soft.undecided(2).detach()) > 0
    with torch.no_grad():
        soft.codes.copy_(soft.codes.sign() * 10)
    assert float(soft.undecided(2).detach()) == 0
    torch.testing.assert_close(soft.values().detach(), soft.settled()[0])


def test_pruned_weights_stay_zero():
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    weight[:, ::3] = 0
    grid = ranges.weight_grid(weight, 0, "mse", 2, symmetric=False)
    soft = SoftWeight(weight, 0, grid, "straight", zeros=True)
    with torch.no_grad():
        soft.codes.add_(3)
    assert not bool(soft.settled()[0][:, ::3].any())
    assert not bool(soft.values()[:, ::3].any())


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_their_definitions(symmetric):
    """Straight: a step inside of the range, none outside. Sigmoid: the rectified sigmoid's slope."""
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    grid = ranges.weight_grid(weight, 0, "mse", 3, symmetric=symmetric)
    scale, zero = grid.scale[:, None], grid.zero_point[:, None].float()
    upper = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    for way in ("straight", "sigmoid"):
        soft = SoftWeight(weight, 0, grid, way)
        with torch.no_grad():
            soft.codes.add_(2 * torch.randn(4, 12, generator=torch.Generator().manual_seed(2)))
        held, below = soft.codes.detach(), (weight / scale).floor()
        if way == "straight":
            place, slope = held + zero, torch.ones_like(held)
        else:
            part = torch.sigmoid(held)
            up = part * 1.2 - 0.1
            place = below + up.clamp(0, 1) + zero
            slope = 1.2 * part * (1 - part) * ((up > 0) & (up < 1))
        inside = (place >= grid.qmin) & (place <= grid.qmax)
        assert 0 < int(inside.sum()) < inside.numel() or way == "sigmoid"
        made = soft.values()
        (made * upper).sum().backward()
        torch.testing.assert_close(soft.codes.grad, upper * scale * slope * inside)
        by_scale = (upper * made.detach()).sum(1, keepdim=True)  # of a factor that is 1 as yet
        torch.testing.assert_close(soft.factors.grad, by_scale)
