"""`common_part`: what is left is what the codes' mean cannot mend, and bits are spent where they pay."""

import pytest
import torch

from laconic.solvers.sharing.common_part import whole_steps


def entropy(codes):
    """Bits of the codes, each tensor with a table of its own."""
    total = 0.0
    for each in codes:
        counts = each.unique(return_counts=True)[1].double()
        total -= float((counts * (counts / counts.sum()).log2()).sum())
    return total


def left(values, codes, common):
    return float((values - codes - common).square().mean())


@pytest.fixture
def values():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.35, 0.5, 0.6]).double().view(3, 1, 1)
    return 3 + torch.randn(3, 50, 80, generator=generator).double() * spread


def test_equal_tensors_need_no_codes(values):
    same = values[:1].expand(3, -1, -1)
    codes, common = whole_steps(same)
    assert not bool(codes.any())
    assert torch.allclose(common, values[0])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_whole_differences_are_found_without_error(values, count):
    """The middle value is one of them (for an even count the lower one), so all steps are whole."""
    steps = torch.randint(-2, 3, (count, 50, 80), generator=torch.Generator().manual_seed(1))
    given = values[0] + steps.double()
    codes, common = whole_steps(given, price=0.0)
    assert torch.allclose(codes + common, given)
    assert torch.equal(codes, codes.round())


def test_the_common_part_leaves_no_mean(values):
    codes, common = whole_steps(values)
    assert torch.allclose((values - codes - common).mean(0), torch.zeros(50, 80).double())


def test_ahead_of_rounding_each_difference_from_the_mean(values):
    """No more bits than plain rounding with a dead zone takes, and less than 0.7 of its error.

    Rate and distortion bound it: three tensors that are known but for a common part are two
    independent ones, which is 2 of 3 codes at the same step.
    """
    plain = values - values.mean(0)
    codes = torch.where(plain.abs() < 0.6, 0.0, plain.round())
    bits, error = entropy(codes), float((plain - codes).square().mean())
    scale = 1.0
    found, common = whole_steps(values)
    while entropy(found) > bits:
        scale *= 1.02
        found, common = whole_steps(values / scale)
    assert left(values / scale, found, common) * scale**2 < 0.7 * error


def test_a_price_trades_bits_for_error(values):
    cheap, dear = (whole_steps(values, price) for price in (0.3, 0.02))
    assert entropy(cheap[0]) < entropy(dear[0])
    assert left(values, *cheap) > left(values, *dear)


def test_what_was_given_stays(values):
    before = values.clone()
    whole_steps(values)
    assert torch.equal(values, before)
