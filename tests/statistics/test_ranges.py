import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.core.errors import DataError
from laconic.statistics.histogram import Histogram
from laconic.statistics.min_max import MinMax
from laconic.statistics.moments import Moments

floats = st.lists(st.floats(-1e6, 1e6, width=32), min_size=0, max_size=30)


@settings(max_examples=60, deadline=None)
@given(floats, floats)
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
