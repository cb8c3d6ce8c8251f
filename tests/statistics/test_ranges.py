import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from laconic.core.errors import DataError
from laconic.statistics.histogram import Histogram
from laconic.statistics.min_max import MinMax
from laconic.statistics.moments import Moments
from laconic.statistics.zeros import Zeros

floats = st.lists(st.floats(-1e6, 1e6, width=32), min_size=0, max_size=30)


@settings(max_examples=60, deadline=None)
@given(floats, floats)
@example([262144.0], [-(2.0**-135)])  # the quotient is too small for a float
def test_histogram_does_not_depend_on_order_or_split(left, right):
    one, two, both = Histogram(16), Histogram(16), Histogram(16)
    one.update(torch.tensor(left))
    two.update(torch.tensor(right))
    both.update(torch.tensor(right + left))
    one.merge(two)
    assert one.width == both.width
    assert torch.equal(one.counts, both.counts)
    assert one.total == both.total == len(left) + len(right)
    assert (one.minimum, one.maximum) == (both.minimum, both.maximum)


def test_histogram_counts_as_numpy_does(generator):
    values = torch.randn(5000, generator=generator)
    found = Histogram(256)
    for part in values.split(700):
        found.update(part * 1.0)
    counts, _ = np.histogram(values.double().numpy(), bins=found.edges.numpy())
    assert found.counts.tolist() == counts.tolist()
    assert float(values.abs().max()) > found.width * 256 / 4  # the finest grid that fits


def test_percentiles_are_within_a_bin(generator):
    values = torch.rand(20000, generator=generator)
    found = Histogram()
    found.update(values)
    for fraction in (0.0, 0.01, 0.5, 0.999, 1.0):
        exact = (
            float(torch.quantile(values.double()[:10000], fraction))
            if fraction in (0.0, 1.0)
            else fraction
        )
        assert abs(found.percentile(fraction) - exact) < 0.02
    assert found.percentile(1.0) == float(values.max())
    with pytest.raises(DataError):
        Histogram().percentile(0.5)


def test_constant_zero_has_one_bin():
    found = Histogram(8)
    found.update(torch.zeros(5))
    assert int(found.counts.max()) == 5
    assert found.percentile(0.5) == 0.0


def test_moments_match_torch(generator):
    data = torch.randn(6, 3, 5, generator=generator) * 4 + 100
    found = Moments(axis=1)
    for part in data.split(2):
        found.update(part)
    assert torch.allclose(found.mean, data.double().mean((0, 2)), rtol=1e-12)
    assert torch.allclose(found.variance, data.double().var((0, 2), unbiased=False), rtol=1e-10)


@pytest.mark.parametrize("statistic", [MinMax, Histogram, Moments])
def test_not_finite_is_refused(statistic):
    with pytest.raises(DataError, match="1 of 2 values"):
        statistic().update(torch.tensor([1.0, torch.nan]))


def test_different_settings_do_not_merge():
    with pytest.raises(DataError, match="axis"):
        MinMax(0).merge(MinMax(1))
    with pytest.raises(DataError, match="bins"):
        Histogram(8).merge(Histogram(16))
    channels = MinMax(0)
    channels.update(torch.zeros(3, 2))
    with pytest.raises(DataError, match="2 channels after 3"):
        channels.update(torch.zeros(2, 2))


# Channels apart -----------------------------------------------------------------------------

rows = st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 3), min_size=0, max_size=12)


@settings(max_examples=40, deadline=None)
@given(rows, rows)
def test_channels_counted_apart_merge_exactly(left, right):
    def fed(statistic, *parts):
        for part in parts:
            statistic.update(torch.tensor(part).reshape(-1, 3))
        return statistic

    one, both = fed(Histogram(16, -1), left), fed(Histogram(16, -1), right + left)
    one.merge(fed(Histogram(16, -1), right))
    assert one.width == both.width and one.total == both.total
    assert torch.equal(one.counts, both.counts)
    together = fed(Histogram(16), left, right)  # the same grid as for all of them together
    assert one.width == together.width
    if one.total:
        assert torch.equal(one.counts.sum(0), together.counts)
    zeros, all_zeros = fed(Zeros(-1), left), fed(Zeros(-1), left, right)
    zeros.merge(fed(Zeros(-1), right))
    assert torch.equal(zeros.zeros, all_zeros.zeros) and zeros.count == all_zeros.count


def test_entropy_of_even_bins_is_their_logarithm():
    found = Histogram(16, 1)
    values = torch.arange(8.0)
    found.update(torch.stack([values, values // 2 * 2, torch.zeros(8)], 1))
    assert torch.allclose(found.entropy(), torch.tensor([3.0, 2.0, 0.0]).double(), atol=1e-12)
    assert float(Histogram(8).entropy()) == 0.0


def test_zeros_are_exact_zeros_of_each_channel():
    found = Zeros(axis=1)
    found.update(torch.tensor([[0.0, 1.0], [0.0, -0.0]]))
    found.update(torch.tensor([[1e-30, 2.0], [3.0, 4.0]]))
    assert found.zeros.tolist() == [2, 1] and found.share.tolist() == [0.5, 0.25]
    whole = Zeros()
    whole.update(torch.tensor([[0.0, 1.0]]))
    assert whole.share.item() == 0.5


@pytest.mark.parametrize("make", [lambda axis: Histogram(8, axis), Zeros])
def test_channels_that_change_or_other_axes_are_refused(make):
    found = make(0)
    found.update(torch.ones(3, 2))
    with pytest.raises(DataError, match="2 channels after 3"):
        found.update(torch.ones(2, 2))
    with pytest.raises(DataError, match="axis"):
        found.merge(make(1))
    with pytest.raises(DataError, match="1 of 2 values"):
        make(0).update(torch.tensor([1.0, torch.nan]))


def test_percentiles_need_all_values_together():
    found = Histogram(8, 0)
    found.update(torch.ones(2, 2))
    with pytest.raises(DataError, match="apart"):
        found.percentile(0.5)
