"""Bad input to the methods that make a network smaller: an error in words, or a fallback in words.

In every case the Program that was given stays what it was, bit for bit.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.errors import BudgetError, DataError, LaconicError, RecipeError
from laconic.core.recipe import Step
from laconic.core.task import classification
from laconic.methods.base import Context, method_of
from laconic.program.capture import capture
from laconic.program.sites import Sites

TRAINING = {"steps": 2, "precision": "fp32", "evaluations": 1, "teacher": "torch"}


class Net(nn.Module):
    """[batch, 3, 4, 4] -> [batch, 4]: convolutions, a residual branch, two heads, a hidden layer."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.q, self.o = nn.Linear(8, 24), nn.Linear(8, 8)
        self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.n(self.a(x)))
        x = (x + F.relu(self.b(x))).flatten(2).transpose(1, 2)
        q, k, v = self.q(x).view(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, 8)
        return self.d(F.gelu(self.c((x + self.o(y)).mean(1))))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Net().eval(), torch.randn(2, 3, 4, 4))


@pytest.fixture(autouse=True)
def untouched(program):
    code, before = str(program.graph), {k: t.clone() for k, t in program.state_dict().items()}
    yield
    assert str(program.graph) == code and not program.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())


def apply(program, method, options, data, sites="*"):
    context = Context(task=classification(calibration=data), original=program.clone(), seed=1)
    made = method_of(Step(method=method, options=options), "step 1")
    return made.apply(program, Sites.of(sites), context)


def few(count=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, 4, 4, generator=generator)]


RATIOS = [
    "prune.channels", "prune.heads", "prune.magnitude", "prune.wanda", "prune.taylor",
    "prune.fisher", "prune.obs", "prune.gradual", "prune.rewind", "prune.regularized",
    "prune.dynamic", "factorize.svd", "simplify.drop_layers", "share.hash",
]  # fmt: skip


@pytest.mark.parametrize("method", RATIOS)
def test_a_ratio_outside_its_range(program, method):
    for ratio in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(RecipeError, match="ratio"):
            apply(program, method, {"ratio": ratio}, few())


@pytest.mark.parametrize("method", ["prune.nm", "prune.gradual"])
def test_more_of_every_m_than_there_are(program, method):
    with pytest.raises(RecipeError, match="n is at most m"):
        apply(program, method, {"n": 5, "m": 4}, few())


BUDGETS = [
    ("prune.channels", {"block": 1}),
    ("prune.heads", {"of": "macs"}),
    ("prune.dynamic", {"block": 1, **TRAINING}),
    ("prune.regularized", {"block": 1, **TRAINING}),
    ("factorize.svd", {}),
]


@pytest.mark.parametrize(("method", "options"), BUDGETS)
def test_a_budget_below_what_is_possible(program, method, options):
    """It says how low it can go, and what is in the way."""
    with pytest.raises(BudgetError, match=r"can fall by .*% at most.* 99\.0% was asked") as caught:
        apply(program, method, {"ratio": 0.99, **options}, few(16))
    assert caught.value.where and "holds most of what is left" in str(caught.value.hint)


BROKEN = [
    ("prune.channels", {"importance": "l1", "compensate": False}),
    ("prune.heads", {}),
    ("prune.magnitude", {}),
    ("prune.obs", {}),
    ("prune.gradual", TRAINING),
    ("factorize.svd", {"weighting": "none", "repair": "none"}),
    ("simplify.drop_layers", {"importance": "l1"}),
    ("share.cluster", {}),
    ("share.hash", {}),
]


@pytest.mark.parametrize(("method", "options"), BROKEN)
def test_weights_that_are_not_finite(program, method, options):
    """The first of them is named, whether or not the method would have looked at data."""
    broken = program.clone()
    weight = broken.tensor("b.weight").detach().clone()
    weight[1, 2] = torch.nan
    broken.set_tensor("b.weight", weight)
    with pytest.raises(DataError, match="NaN or infinite") as caught:
        apply(broken, method, options, few(4))
    assert caught.value.where == "b.weight"


NEAR = [
    (["prune.channels", "prune.dynamic", "prune.regularized"], "c.oot", "c.out"),
    (["prune.heads"], "q.haeds", "q.heads"),
    (
        ["prune.magnitude", "prune.wanda", "prune.taylor", "prune.fisher", "prune.obs", "prune.nm",
         "prune.gradual", "prune.rewind", "share.cluster", "share.vector", "share.hash",
         "factorize.svd"],
        "c.wieght",
        "c.weight",
    ),
    (["simplify.linearize"], "relu_7", "relu_1"),
    (["simplify.drop_layers"], "ad_1", "add_1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "wrong", "right"), [(m, *names) for methods, *names in NEAR for m in methods]
)
def test_sites_that_match_nothing(program, method, wrong, right):
    with pytest.raises(RecipeError, match="match nothing") as caught:
        apply(program, method, {}, few(), sites=wrong)
    assert right in str(caught.value.hint)


RESOLVED = [
    ("prune.obs", {"kept": {"c.wieght": 3}}),
    ("share.cluster", {"codebooks": {"c.wieght": [[-1.0, 1.0]]}}),
    ("share.vector", {"dim": 4, "found": {"c.wieght": [[0.0] * 4]}}),
    ("factorize.svd", {"ranks": {"c.wieght": [2]}}),
]


@pytest.mark.parametrize(("method", "options"), RESOLVED)
def test_what_was_resolved_for_other_weights(program, method, options):
    with pytest.raises(RecipeError, match="c.wieght") as caught:
        apply(program, method, options, few(16))
    assert "c.weight" in str(caught.value.hint)


@pytest.mark.parametrize("method", ["prune.channels", "prune.heads", "prune.regularized"])
@pytest.mark.parametrize(
    ("kept", "message"), [([], "no index is kept"), ([99], "the group has 2"), ([-1], "from -1")]
)
def test_a_layer_left_without_channels(program, method, kept, message):
    options = TRAINING if method == "prune.regularized" else {}
    with pytest.raises(LaconicError, match=message):
        apply(program, method, {"keep": {"q.heads": kept}, **options}, few())


def test_a_layer_left_without_channels_in_training(program):
    with pytest.raises(LaconicError, match="no index is kept"):
        apply(program, "prune.dynamic", {"replay": {1: {"c.out": []}}, **TRAINING}, few())


def test_a_layer_left_without_weights(program):
    outcome = apply(program, "prune.magnitude", {"threshold": 1e9}, few())
    assert any("c.weight: none of its 128 weights is left" in note for note in outcome.notes)


SMALL = {"ratio": 0.4, "block": 1, "of": "channels"}
DATA = [
    ("prune.channels", SMALL, "same constant", ""),
    ("prune.channels", {"importance": "taylor", **SMALL}, "same constant", "constant input"),
    ("prune.channels", {"importance": "entropy", **SMALL}, "same constant", "constant input"),
    ("prune.heads", {"count": 1}, "same constant", "constant input"),
    ("prune.wanda", {}, "scored by magnitude", ""),
    ("prune.taylor", {}, "gradients are all zero", ""),
    ("prune.fisher", {}, "gradients are all zero", ""),
    ("prune.obs", {}, "pruned by magnitude", "more samples would help"),
    ("prune.nm", {}, "pruned by magnitude", "more samples would help"),
    ("prune.regularized", {**SMALL, **TRAINING}, "same constant", ""),
    ("prune.dynamic", {**SMALL, "cuts": 1, **TRAINING}, "same constant", ""),
    ("prune.gradual", TRAINING, "same constant", ""),
    ("factorize.svd", {}, "every direction counts alike", "is singular, damped"),
    ("simplify.linearize", {"count": 1, "rise": None, "merge": "never"}, "same constant", ""),
    ("simplify.drop_layers", {"count": 1}, "same constant", ""),
    ("simplify.drop_layers", {"count": 1, "replace": "linear"}, "none takes its place", ""),
    ("simplify.merge_neurons", {"dead": "data", "tolerance": 0.3}, "same constant", ""),
    ("simplify.merge_neurons", {"refit": True, "tolerance": 0.3}, "same constant", ""),
    ("share.cluster", {"clusters": 4, "weighted": "hessian"}, "clustered unweighted", ""),
    ("share.vector", {"codewords": 4, "dim": 4, "weighted": "hessian"}, "unweighted", ""),
    ("share.hash", {"weighted": "fisher"}, "fitted unweighted", ""),
]


@pytest.mark.parametrize(("method", "options", "zeros", "single"), DATA)
def test_data_that_say_little(program, method, options, zeros, single):
    """Constant zeros, and one sample: fewer rows than channels, a singular covariance.

    What is made is finite, and what was fallen back to stands in the notes.
    """
    for data, words in (([torch.zeros(8, 3, 4, 4)] * 2, zeros), (few(), single)):
        outcome = apply(program, method, options, data)
        tensors = [t for _, t in outcome.program.tensors() if t.is_floating_point()]
        with torch.no_grad():
            made = outcome.program.run_flat(*program.example)
        assert all(bool(t.isfinite().all()) for t in (*tensors, *made))
        assert not words or any(words in note for note in outcome.notes), outcome.notes
