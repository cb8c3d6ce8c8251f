"""Cell networks: every cell runs, starts the same each time, and searches pay the same price."""

import pytest
import torch

from laconic.core.task import classification
from laconic.program.cost import cost
from laconic.solvers.search import cells


@pytest.fixture(scope="module")
def bench():
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4) for _ in range(2)]
    task = classification(train=data, calibration=data, validation=data[:1])
    return cells.Bench(
        task=task, example=torch.zeros(2, 3, 8, 8), classes=4, channels=4, batch=8,
        plan=cells.Plan(lr=0.05, evaluations=1, precision="fp32"),
    )  # fmt: skip


def test_a_cell_is_the_sum_over_its_edges():
    net = cells._Cell((1, 0, 1, 1, 2, 1), 4).eval()  # 1 = x, 2 = x, 3 = x + pool(x) + x
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    pooled = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(net(x), 2 * x + pooled)


def test_random_cells_are_connected_and_differ():
    generator = torch.Generator().manual_seed(0)
    drawn = [cells.random_cell(generator) for _ in range(50)]
    assert all(cells.is_connected(cell) for cell in drawn) and len(set(drawn)) > 40
    assert len({cells.named(cell) for cell in drawn}) == len(set(drawn))


def test_a_network_starts_the_same_each_time_and_training_leaves_the_start_alone(bench):
    cell = (4, 0, 3, 0, 1, 2)
    start = {name: t.clone() for name, t in bench.network(cell).tensors()}
    tried = [bench.trained(cell, 2) for _ in range(2)]
    assert all(torch.equal(t, start[name]) for name, t in bench.network(cell).tensors())
    one, two = (dict(trial.program.tensors()) for trial in tried)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], start[name]) for name in one)
    assert tried[0].price == 3 * cost(tried[0].program).macs * 8 * 2


def test_random_search_spends_no_less_than_the_search(bench):
    found = cells.halving(bench, drawn=2, trained=2, steps=4)
    assert [trial.steps for trial in found.tried] == [1, 1, 4]
    beside = cells.at_random(bench, found.price, 4)
    assert beside.price >= found.price > beside.price - max(t.price for t in beside.tried)
    assert found.best.score == found.tried[-1].score
    assert beside.best.score == max(trial.score for trial in beside.tried)
