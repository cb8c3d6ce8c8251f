"""Amounts, ties, patterns and scores against their definitions."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from laconic.core.errors import DataError
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.solvers.weights import weight_scores
from laconic.solvers.weights.weight_masks import (
    Amount,
    Pruning,
    highest,
    highest_in_rows,
    patterned,
)
from laconic.statistics.layers import layers


@pytest.mark.parametrize("count", range(8))
def test_highest_keeps_exactly_so_many_whatever_the_ties(count):
    score = torch.tensor([[1.0, 1.0, 0.0, 1.0], [2.0, 0.0, 1.0, 2.0]])
    keep = highest(score, count)
    assert int(keep.sum()) == count
    if 0 < count < 8:
        assert float(score[keep].min()) >= float(score[~keep].max())


def test_of_equal_scores_the_later_stay():
    assert highest(torch.ones(4), 2).tolist() == [False, False, True, True]
    assert highest_in_rows(torch.ones(1, 3), 1).tolist() == [[False, False, True]]


def test_patterns_keep_n_of_every_m_and_a_rest():
    keep = patterned(torch.tensor([[3.0, 1, 2, 0, 5, 4, 0, 1, 0]]), 2, 4)
    assert keep.int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0, 1]]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.99])
def test_the_ratio_is_exact(scope, ratio):
    scores = {"a": torch.rand(20, 5), "b": 10 * torch.rand(4, 5, 5)}
    keep = Amount(ratio=ratio, scope=scope).kept(scores)
    gone = {name: int((~each).sum()) for name, each in keep.items()}
    assert sum(gone.values()) == round(200 * ratio)
    if scope == "tensor":
        assert gone == {"a": round(100 * ratio), "b": round(100 * ratio)}
    elif ratio == 0.5:
        assert gone["a"] > gone["b"]


def test_count_and_threshold():
    scores = {"a": torch.arange(6.0), "b": torch.arange(3.0)}
    kept = {s: Amount(count=4, scope=s).kept(scores) for s in ("tensor", "global")}
    assert [int(k.sum()) for k in kept["tensor"].values()] == [4, 3]
    assert sum(int(k.sum()) for k in kept["global"].values()) == 4
    above = Amount(threshold=2.0).kept(scores)
    assert [int(k.sum()) for k in above.values()] == [4, 1]


@pytest.mark.parametrize(
    "options", [{"ratio": 1.0}, {"ratio": -0.1}, {"count": 0}, {"threshold": -1.0},
                {"count": 3, "threshold": 0.1}, {"ratio": 0.3, "count": 3}],
)  # fmt: skip
def test_amounts_that_make_no_sense_are_refused(options):
    with pytest.raises(ValidationError):
        Amount(**options)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def held():
    torch.manual_seed(0)
    model = Net().eval()
    return model, capture(model, torch.randn(2, 4, 5, 5))


def test_wanda_is_weight_times_input_norm(held):
    model, program = held
    x = torch.randn(8, 4, 5, 5)
    readers = {layer.weight: [layer] for layer in layers(program)}
    found = weight_scores.wanda(program, readers, [(x[:4],), (x[4:],)])
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)  # [rows, 4 x 9]
    square = patches.square().mean(0).reshape(2, 2, 3, 3)  # of each group's two channels
    norms = square.sqrt().repeat_interleave(3, 0)
    assert torch.allclose(found["conv.weight"], model.conv.weight.abs() * norms, rtol=1e-5)
    hidden = torch.relu(model.conv(x)).mean((2, 3))
    norm = hidden.square().mean(0).sqrt()
    assert torch.allclose(found["head.weight"], model.head.weight.abs() * norm, rtol=1e-5)


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
def test_gradient_scores_are_those_of_autograd(held, kind):
    model, program = held
    batches = [torch.randn(2, 4, 5, 5), torch.randn(3, 4, 5, 5)]
    found = weight_scores.from_gradients(
        program, ["conv.weight"], [(x,) for x in batches], lambda y: y.square().sum(), kind
    )
    weight, total = model.conv.weight, 0
    for x in batches:
        (grad,) = torch.autograd.grad(model(x).square().sum(), weight)
        total = total + ((grad * weight).abs() if kind == "taylor" else grad.square())
    wanted = total / 5 if kind == "taylor" else total * weight.square() / 10
    assert torch.allclose(found["conv.weight"], wanted, rtol=1e-4, atol=1e-9)
    assert all(p.grad is None and p.requires_grad for p in program.parameters())


def test_no_batches_and_broken_gradients_are_named(held):
    _, program = held
    with pytest.raises(DataError, match="no batch"):
        weight_scores.from_gradients(program, ["conv.weight"], [], lambda y: y.sum(), "fisher")
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(DataError, match=r"conv\.weight"):
        weight_scores.from_gradients(
            program, ["conv.weight"], [(x,)], lambda y: y.sum() * float("nan"), "fisher"
        )


def test_inputs_of_zeros_fall_back_to_magnitude(held):
    _, program = held
    notes = []
    readers = {layer.weight: [layer] for layer in layers(program)}
    x = torch.zeros(2, 4, 5, 5)
    found = weight_scores.wanda(program, readers, [(x,)], notes=notes)
    assert torch.allclose(found["conv.weight"], program.tensor("conv.weight").abs())
    assert any("conv.weight" in note for note in notes)


def test_opening_and_closing_without_pruning_changes_nothing(held):
    _, program = held
    work = Pruning(program, Sites(), torch.device("cpu"))
    made = work.close({name: torch.ones_like(w).bool() for name, w in work.weights().items()})
    assert work.names == ["conv.weight", "head.weight"] and made.sparse == frozenset()
    for one, two in zip(program.tensors(), made.tensors(), strict=True):
        assert torch.equal(one[1], two[1])


def test_a_tensor_without_weights_left_is_noted(held):
    _, program = held
    work = Pruning(program, Sites.of("head"), torch.device("cpu"))
    work.close({"head.weight": torch.zeros(3, 6, dtype=torch.bool)})
    assert work.figures["kept"] == {"head.weight": [0, 18]} and work.figures["sparsity"] == 1.0
    assert any("none of its 18" in note for note in work.notes)
