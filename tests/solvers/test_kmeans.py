"""k-means on a line: the optimum where it can be enumerated, fixed points where it cannot."""

import itertools

import pytest
import torch

from laconic.core.errors import DataError
from laconic.solvers.sharing import kmeans


def drawn(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    return values, torch.rand(count, generator=generator, dtype=torch.float64) + 0.01


def best_by_trying(values, weights, clusters):
    """The least weighted squared error over all ways to cut the sorted values into intervals."""
    order = values.argsort()
    x, w = values[order], weights[order]
    found = []
    for cuts in itertools.combinations(range(1, len(x)), clusters - 1):
        ends = [0, *cuts, len(x)]
        total = 0.0
        for a, b in itertools.pairwise(ends):
            mean = (x[a:b] * w[a:b]).sum() / w[a:b].sum()
            total += float((w[a:b] * (x[a:b] - mean) ** 2).sum())
        found.append(total)
    return min(found)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("clusters", [1, 2, 4])
def test_exact_is_the_optimum(seed, clusters):
    values, weights = drawn(9, seed)
    chosen = kmeans.centroids(values, clusters, weights)
    assert len(chosen) == clusters
    least = best_by_trying(values, weights, clusters)
    assert kmeans.error(values, chosen, weights) == pytest.approx(least, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("start", ["exact", "linear", "plusplus"])
@pytest.mark.parametrize("clusters", [3, 16])
def test_every_centroid_is_the_mean_of_its_own_and_none_is_empty(start, clusters):
    values, weights = drawn(3000)
    chosen = kmeans.centroids(
        values, clusters, weights, start=start, generator=torch.Generator().manual_seed(1)
    )
    assert len(chosen) == clusters and bool((chosen.diff() > 0).all())
    code = (values[:, None] - chosen).abs().argmin(1)
    for number, value in enumerate(chosen):
        own = code == number
        mean = (values[own] * weights[own]).sum() / weights[own].sum()
        assert float(value) == pytest.approx(float(mean), rel=1e-9)


def test_empty_clusters_go_where_the_error_is_largest():
    """Values at equal distances from -100 to 100 leave nearly every cluster empty."""
    values = torch.cat([torch.linspace(-0.1, 0.1, 200), torch.tensor([-100.0, 100.0])])
    chosen = kmeans.centroids(values, 8, start="linear")
    assert len(chosen) == 8
    assert kmeans.error(values, chosen) < kmeans.error(values, torch.tensor([-100.0, 0.0, 100.0]))


def test_more_values_than_bins_come_out_better_than_lloyd_from_equal_distances():
    values, _ = drawn(20_000)
    errors = {
        s: kmeans.error(values, kmeans.centroids(values, 32, start=s)) for s in ("exact", "linear")
    }
    assert errors["exact"] < errors["linear"]


def test_few_different_values_are_kept_as_they_are():
    values = torch.tensor([0.5, -1.0, 0.5, 2.0, -1.0])
    for clusters in (3, 200):
        assert torch.equal(
            kmeans.centroids(values, clusters).float(), torch.tensor([-1.0, 0.5, 2.0])
        )


def test_weights_count_only_in_proportion():
    values, weights = drawn(400)
    one, other = (kmeans.centroids(values, 5, w) for w in (weights, 1024 * weights))
    assert torch.allclose(one, other, rtol=1e-12)
    plain = kmeans.centroids(values, 5)
    assert torch.equal(kmeans.centroids(values, 5, torch.zeros_like(values)), plain)
    assert kmeans.error(values, one, weights) <= kmeans.error(values, plain, weights)


def test_what_does_not_matter_still_gets_a_value_near_by():
    values = torch.tensor([0.0, 0.0, 5.0, 5.1, 9.0, 9.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    chosen = kmeans.centroids(values, 3, weights)
    assert torch.allclose(chosen, torch.tensor([0.0, 5.05, 9.0], dtype=torch.float64))


def test_draws_follow_the_generator():
    values, _ = drawn(500)
    runs = [
        kmeans.centroids(values, 6, start="plusplus", generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3)
    ]
    assert torch.equal(*runs)


def test_bad_input_is_refused():
    values = torch.tensor([1.0, float("nan"), 2.0])
    with pytest.raises(DataError, match="1 of 3 values"):
        kmeans.centroids(values, 2)
    with pytest.raises(DataError, match="weights"):
        kmeans.centroids(torch.ones(3), 2, torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(DataError, match="weights"):
        kmeans.centroids(torch.ones(3), 2, torch.ones(2))
