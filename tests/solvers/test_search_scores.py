"""Predictor, proxies and strategies: what they are on cases that can be worked out."""

from math import log

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laconic.core.errors import BudgetError, DataError, RecipeError
from laconic.core.task import classification
from laconic.program.capture import capture
from laconic.solvers.search import member_search, proxies
from laconic.solvers.search.member_scores import some_of
from laconic.solvers.search.member_search import Trial
from laconic.solvers.search.score_model import ScoreModel
from laconic.solvers.search.search_space import Knob, Space
from laconic.solvers.search.strategies import Evolution, Random, Within

SPACE = Space(tuple(Knob("width", str(i), (8, 6, 4, 2)) for i in range(6)))


def worth(member):
    return sum((place + 1) * count for place, count in enumerate(member.values()))


def used(member):
    return sum(member.values()) / 48


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_predictor_learns_scores_that_add_up():
    drawn = generator()
    members = [SPACE.random(drawn) for _ in range(40)]
    model = ScoreModel(SPACE, members, [worth(m) for m in members])
    assert model.correlation > 0.98
    for member in [SPACE.random(drawn) for _ in range(10)]:
        assert model(member) == pytest.approx(worth(member), abs=0.02 * worth(SPACE.full()))


def test_members_within_a_budget_leave_no_room():
    within = Within(SPACE, lambda member: used(member) / 0.6 - 1)
    drawn = generator()
    for _ in range(20):
        member = within.repaired(SPACE.random(drawn), drawn)
        assert used(member) <= 0.6 < used(member) + 2 / 48
    with pytest.raises(BudgetError):
        Within(SPACE, lambda member: used(member) / 0.2 - 1)


def test_evolution_finds_what_random_does_not():
    """Six knobs under a budget: the best spends it on the last knobs."""
    best = {}
    for strategy in (Random, Evolution):
        walk = strategy(Within(SPACE, lambda m: used(m) / 0.6 - 1), generator())
        scores = []
        for _ in range(120):
            member = walk.ask()
            scores.append(worth(member))
            walk.tell(member, [scores[-1]])
        best[strategy] = max(scores)
        if strategy is Evolution:
            assert sum(scores[60:]) > sum(scores[:60])
    assert best[Evolution] >= best[Random]


def test_random_sizes_spread_over_the_space():
    drawn = generator()
    sizes = torch.tensor([used(SPACE.random(drawn)) for _ in range(200)])
    assert float(sizes.min()) < 0.4 and float(sizes.max()) > 0.9


def test_mutation_turns_something_every_time():
    drawn = generator()
    member = SPACE.random(drawn)
    assert all(SPACE.mutated(member, 0.0, drawn) != member for _ in range(10))


def chain(width):
    model = nn.Sequential(
        nn.Linear(3, width, bias=False), nn.ReLU(), nn.Linear(width, 2, bias=False)
    )
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(-0.5)
    return capture(model, (torch.zeros(2, 3),))


def test_synflow_is_the_flow_through_absolute_weights():
    """R = 2 outputs x width paths x 3 inputs x 0.25, and each of two layers contributes R."""
    for width in (1, 4):
        program = chain(width)
        got = proxies.synflow(program, [program.example], lambda out: out.sum())
        assert got == pytest.approx(log(2 * 2 * width * 3 * 0.25))


def test_jacobian_prefers_samples_that_differ():
    torch.manual_seed(0)
    inputs = (torch.randn(6, 8),)
    same = capture(nn.Linear(8, 2), (torch.zeros(2, 8),))  # one gradient for every sample
    apart = capture(
        nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2)), (torch.zeros(2, 8),)
    )
    one, two = (proxies.jacobian(p, [inputs], lambda out: out.sum()) for p in (same, apart))
    assert two > one


def test_zico_is_higher_where_gradients_agree():
    torch.manual_seed(0)
    program = capture(nn.Linear(4, 2, bias=False), (torch.zeros(2, 4),))
    noise = [torch.randn(8, 4) for _ in range(4)]
    steady = [(1 + 0.1 * batch,) for batch in noise]
    wild = [(1 + 10 * batch,) for batch in noise]

    def loss(out):
        return out.sum()

    assert proxies.zico(program, steady, loss) > proxies.zico(program, wild, loss)
    assert proxies.zico(program, [(torch.ones(8, 4),)], loss) == 0.0  # no deviation at all


def test_jacobian_refuses_what_has_no_gradients_to_compare():
    words = capture(nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)).eval(),
                    (torch.zeros(2, 3, dtype=torch.int64),))  # fmt: skip
    with pytest.raises(RecipeError, match="takes none"):
        proxies.jacobian(words, [words.example], lambda out: out.sum())
    with pytest.raises(DataError, match="found one"):
        proxies.jacobian(chain(2), [(torch.randn(1, 3),)], lambda out: out.sum())


def test_a_score_that_is_no_number_is_the_least():
    space = Space((Knob("width", "a", (4, 3, 2, 1)),))
    scores = {4: float("nan"), 3: 0.2, 2: float("nan"), 1: 0.3}
    trials = [Trial({"a": n}, score, 1.0, {"macs": 1 / n}) for n, score in scores.items()]
    assert max(trials, key=member_search.worth).score == 0.3
    assert [t.score for t in member_search.front(trials, "macs")] == [0.2, 0.3]
    plain = Trial({"width:a": 4}, float("nan"), 1.0, {}).plain(space, float)
    assert plain == {"genes": [0], "score": None, "share": 1.0}
    told = []

    class Ones(Random):
        def tell(self, member, values):
            told.append(values)

    within = Within(space, lambda member: -1.0)
    member_search.explore(
        Ones(within, generator()), lambda *_: float("nan"), {"macs": lambda _: 0.5}, 2,
        ("score", "macs"),
    )  # fmt: skip
    assert told == [[member_search.worth(trials[0]), -0.5]] * 2


def test_scored_samples_spread_over_data_that_stand_class_by_class():
    labels = torch.arange(4).repeat_interleave(8)
    rows = torch.randn(32, 3)
    batches = list(zip(rows.split(4), labels.split(4), strict=True))
    loader = DataLoader(TensorDataset(rows, labels), batch_size=4)

    class Stream:
        def __iter__(self):
            return iter(batches)

    def seen(validation, samples):
        task = classification(validation=validation)
        return torch.cat([y for _, y in some_of(task, samples)]).tolist()

    assert seen(batches, 16) == [c for c in range(4) for _ in range(4)]
    assert seen(loader, 8) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert seen(Stream(), 6) == [0] * 8  # all that can be had without going through it
    for validation in (batches, loader, Stream()):
        assert seen(validation, 1000) == labels.tolist()
