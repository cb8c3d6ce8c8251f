import torch

from laconic.solvers.weights.elimination import Consumer, by_score, eliminate
from laconic.statistics.gram import Gram


def setting(size=5, width=2, out=3):
    rows = torch.randn(400, size * width, dtype=torch.float64) @ torch.randn(
        size * width, size * width, dtype=torch.float64
    )
    gram = Gram()
    gram.update(rows)
    weight = torch.randn(out, size * width, dtype=torch.float64)
    root = torch.randn(out, out, dtype=torch.float64)
    blocks = torch.arange(size * width).reshape(size, width)
    return gram, weight, root @ root.T, blocks


def best_loss(gram, weight, metric, blocks, removed):
    """1/2 min over W' on the kept columns of tr(D (W - W') S (W - W')^T)."""
    kept = [c for i in range(len(blocks)) if i not in removed for c in blocks[i].tolist()]
    s = gram.covariance
    refit = weight @ s[:, kept] @ torch.linalg.inv(s[kept][:, kept])
    change = weight.clone()
    change[:, kept] -= refit
    return 0.5 * float(torch.trace(metric @ change @ s @ change.T))


def test_the_sum_of_harms_is_what_the_best_refit_loses():
    gram, weight, metric, blocks = setting()
    removal = eliminate([Consumer(gram, weight, metric, blocks, ridge=0.0)], 5)
    total = 0.0
    for step in range(4):
        total += float(removal.harm[step])
        exact = best_loss(gram, weight, metric, blocks, removal.order[: step + 1].tolist())
        assert abs(total - exact) < 1e-6 * exact
    assert removal.harm[-1] == torch.inf
    assert sorted(removal.order.tolist()) == list(range(5))


def test_the_first_to_go_is_the_cheapest_of_all():
    gram, weight, metric, blocks = setting()
    removal = eliminate([Consumer(gram, weight, metric, blocks, ridge=0.0)], 5)
    losses = [best_loss(gram, weight, metric, blocks, [i]) for i in range(5)]
    assert int(removal.order[0]) == losses.index(min(losses))


def test_a_duplicate_costs_nothing():
    gram, weight, metric, blocks = setting(4, 1)
    rows = torch.randn(200, 3, dtype=torch.float64)
    twin = Gram()
    twin.update(torch.cat([rows, rows[:, :1]], 1))
    removal = eliminate([Consumer(twin, weight, metric, blocks, ridge=1e-9)], 4)
    assert int(removal.order[0]) in (0, 3)
    assert float(removal.harm[0]) < 1e-6 * float(removal.harm[1])


def test_consumers_add_up_and_large_groups_go_in_chunks():
    one, two = setting(), setting()
    both = eliminate([Consumer(*one, ridge=0.0), Consumer(*two, ridge=0.0)], 5)
    first = int(both.order[0])
    expected = best_loss(*one, [first]) + best_loss(*two, [first])
    assert abs(float(both.harm[0]) - expected) < 1e-6 * expected
    gram, weight, metric, blocks = setting(20, 1)
    coarse = eliminate([Consumer(gram, weight, metric, blocks)], 20, exact=5)
    assert sorted(coarse.order.tolist()) == list(range(20))
    assert bool((coarse.harm >= 0).all())


def test_dead_inputs_and_zero_gradients_do_not_break_it():
    gram = Gram()
    gram.update(torch.zeros(10, 4))
    weight, blocks = torch.randn(2, 4), torch.arange(4)[:, None]
    removal = eliminate([Consumer(gram, weight, torch.zeros(2, 2), blocks)], 4)
    assert removal.harm[:-1].tolist() == [0.0, 0.0, 0.0]


def test_scores_keep_the_largest():
    removal = by_score(torch.tensor([3.0, 1.0, 2.0]))
    assert removal.order.tolist() == [1, 2, 0]
    assert removal.harm.tolist() == [1.0, 2.0, 3.0]
    assert removal.kept(2).tolist() == [0, 2]
