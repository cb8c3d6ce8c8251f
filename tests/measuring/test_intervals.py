"""Intervals against known values, scipy, and full enumeration of small samples."""

from math import lgamma

import numpy as np
import pytest
from scipy import special, stats

from laconic.core.errors import DataError
from laconic.measuring import intervals


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (9339, 10000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_and_clopper_pearson_are_scipys(k, n, confidence):
    test = stats.binomtest(k, n)
    theirs = test.proportion_ci(confidence, method="wilson")
    assert intervals.wilson(k, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    theirs = test.proportion_ci(confidence, method="exact")
    alpha = (1 - confidence) / 2
    ours = intervals.clopper_pearson(k, n, alpha, alpha)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize("n", [1, 10, 600, 10000])
def test_without_any_change_the_bound_is_that_of_never_seeing_a_loss(n):
    exact = 1 - 0.05 ** (1 / n)
    bound = intervals.drop_bound(0, 0, n)
    assert exact <= bound <= exact * 1.001


def test_six_hundred_samples_certify_half_a_point():
    assert intervals.drop_bound(0, 0, 600) < 0.005
    assert intervals.drop_bound(1, 0, 600) > 0.005
    assert intervals.drop_bound(0, 0, 590) > 0.005


def _coverage(n, confidence, steps=25):
    """The least probability, over a grid of truths, that the bound holds."""
    outcomes = np.array([(b, c) for b in range(n + 1) for c in range(n + 1 - b)])
    b, c = outcomes.T
    bound = np.array([intervals.drop_bound(*pair, n, confidence) for pair in outcomes.tolist()])
    log_ways = np.array(
        [lgamma(n + 1) - lgamma(i + 1) - lgamma(j + 1) - lgamma(n - i - j + 1) for i, j in outcomes]
    )
    least = 1.0
    for loss in np.linspace(0, 1, steps):
        for gain in np.linspace(0, 1 - loss, steps):
            rest = max(1 - loss - gain, 0.0)
            weight = np.exp(
                log_ways
                + special.xlogy(b, loss)
                + special.xlogy(c, gain)
                + special.xlogy(n - b - c, rest)
            )
            least = min(least, weight[bound >= loss - gain - 1e-9].sum())
    return least


@pytest.mark.parametrize("n", [1, 4, 9])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_bound_holds_as_often_as_it_says(n, confidence):
    coverage = _coverage(n, confidence)
    assert coverage >= confidence
    # ... and is not far too careful: somewhere it is nearly tight.
    assert coverage <= confidence + 0.02


@pytest.mark.parametrize(("losses", "gains"), [(3, 0), (5, 4), (30, 28)])
def test_the_bound_grows_with_losses_and_shrinks_with_gains(losses, gains):
    n = 1000
    bound = intervals.drop_bound(losses, gains, n)
    assert bound > (losses - gains) / n
    assert intervals.drop_bound(losses + 1, gains, n) > bound
    assert intervals.drop_bound(losses, gains + 3, n) < bound
    assert intervals.drop_bound(losses, gains, n, 0.99) > bound


def test_the_bound_nears_the_normal_one_for_large_samples():
    losses, gains, n = 150, 140, 10000
    normal = (losses - gains) / n + 1.645 * np.sqrt(losses + gains) / n
    assert intervals.drop_bound(losses, gains, n) == pytest.approx(normal, rel=0.02)


def test_edges_and_refusals():
    assert intervals.drop_bound(10, 0, 10) == 1.0
    low, high = intervals.drop_interval(2, 5, 50)
    assert -1 <= low < -3 / 50 < high
    assert intervals.drop_interval(5, 2, 50) == pytest.approx((-high, -low))
    for bad in [(1, 0, 0), (-1, 0, 5), (3, 3, 5)]:
        with pytest.raises(DataError):
            intervals.drop_bound(*bad)


def test_bootstrap_is_near_the_normal_interval_for_normal_scores(rng):
    scores = rng.normal(3, 1, 2000)
    low, high = intervals.mean_interval(scores, rng)
    half = 1.96 * scores.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=half / 8)


def test_bootstrap_covers_skewed_means_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = [
        intervals.mean_drop_bound(values, np.zeros(60), rng) >= 1.0
        for values in rng.exponential(1.0, (150, 60))
    ]
    assert np.mean(hits) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 150)


def test_unchanged_scores_do_not_give_an_empty_interval(rng):
    scores = np.linspace(0, 1, 600)
    bound = intervals.mean_drop_bound(scores, scores, rng)
    assert bound == pytest.approx(1 - 0.05 ** (1 / 600))
    wide = intervals.mean_drop_bound(scores, scores, rng, score_range=(-1, 1))
    assert wide == pytest.approx(2 * bound)
    constant = np.ones(50)
    assert intervals.mean_drop_bound(constant, constant, rng, score_range=(0, 1)) > 0.05


def test_one_changed_sample_is_not_taken_for_the_whole_risk(rng):
    before, after = np.ones(600), np.ones(600)
    after[0] = 0.0
    assert intervals.mean_drop_bound(before, after, rng) >= 1 - 0.05 ** (1 / 600)


def test_scores_that_are_not_finite_are_refused(rng):
    with pytest.raises(DataError, match="finite"):
        intervals.mean_interval(np.array([1.0, np.nan]), rng)
    with pytest.raises(DataError, match="at least one"):
        intervals.mean_interval(np.array([]), rng)
