"""Pruning of single weights: so many zeros, where they belong, that last and compose."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from laconic.core.errors import RecipeError
from laconic.core.task import Task
from laconic.methods.base import Context, method_class
from laconic.methods.prune.channels import PruneChannels
from laconic.methods.prune.magnitude import Magnitude
from laconic.methods.prune.nm import Nm
from laconic.methods.prune.obs import Obs
from laconic.methods.prune.wanda import Wanda
from laconic.methods.quantize.static import QuantizeStatic
from laconic.methods.share.cluster import Cluster
from laconic.program.capture import capture
from laconic.program.freezing import freeze
from laconic.program.sites import Sites
from laconic.testing import zoo
from laconic.testing.contracts import own_outputs

FREE = ["prune.magnitude", "prune.taylor", "prune.fisher", "prune.wanda", "prune.obs"]


def setting(model="resnet", task=None):
    program = zoo.captured(model)
    return program, Context(task=task or own_outputs(program), original=program)


class Chain(nn.Module):
    """Layers whose inputs are correlated, so that weights can stand in for each other."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    mixing = torch.randn(4, 12)
    data = [torch.randn(64, 4) @ mixing + 0.1 * torch.randn(64, 12) for _ in range(4)]
    program = capture(Chain().eval(), data[0][:2])
    with torch.no_grad():
        pairs = [((x,), program(x)) for x in data]
    task = Task(
        loss=lambda y, t: (y - t).square().mean(),
        metric=lambda y, t: -(y - t).square().mean(1),
        train=pairs,
        validation=pairs[:1],
        split=lambda batch: batch,
    )
    return program, Context(task=task, original=program), torch.cat(data)


def error(program, made, x):
    with torch.no_grad():
        return float((made(x) - program(x)).square().mean() / program(x).var())


@pytest.mark.parametrize("name", FREE)
def test_the_ratio_is_reached_and_the_rest_is_counted(name, chain):
    program, context, _ = chain
    outcome = method_class(name)(ratio=0.6).apply(program, Sites(), context)
    made, kept = outcome.program, outcome.figures["kept"]
    assert made.sparse == {"first.weight", "last.weight"}
    for weight, (count, size) in kept.items():
        tensor = made.tensor(weight).detach()
        assert int(tensor.count_nonzero()) == count and tensor.numel() == size
        assert not bool(torch.signbit(tensor[tensor == 0]).any())
    gone = sum(size - count for count, size in kept.values())
    assert gone == pytest.approx(0.6 * 256, abs=16)  # wanda rounds in each of its 20 rows
    if name != "prune.wanda":
        assert gone == round(0.6 * 256)


@pytest.mark.parametrize("name", FREE)
def test_ratio_0_changes_nothing(name, chain):
    program, context, _ = chain
    made = method_class(name)(ratio=0.0).apply(program, Sites(), context).program
    assert made.sparse == frozenset()
    for one, two in zip(program.tensors(), made.tensors(), strict=True):
        assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_obs_is_ahead_of_scores_that_repair_nothing(ratio, chain):
    program, context, x = chain
    errors = {
        name: error(program, method_class(name)(ratio=ratio).apply(program, Sites(), context).program, x)
        for name in FREE
    }  # fmt: skip
    assert errors["prune.obs"] < 0.5 * min(e for n, e in errors.items() if n != "prune.obs")


def test_obs_takes_from_each_layer_what_it_is_told_to(chain):
    """As many as magnitudes would, by default; by Fisher information as many as prune.fisher."""
    program, context, _ = chain
    for allocation in ("magnitude", "fisher"):
        guide = (
            method_class(f"prune.{allocation}")(ratio=0.6).apply(program, Sites(), context).program
        )
        kept = (
            Obs(ratio=0.6, allocation=allocation).apply(program, Sites(), context).resolved["kept"]
        )
        if allocation == "magnitude":
            assert kept == {name: int((guide.tensor(name) != 0).sum()) for name in kept}
        assert sum(kept.values()) == sum(int((guide.tensor(n) != 0).sum()) for n in kept)


def test_global_magnitude_is_that_of_torch(chain):
    program, context, _ = chain
    made = Magnitude(ratio=0.5).apply(program, Sites(), context).program
    every = torch.cat([program.tensor(n).detach().flatten().abs() for n in sorted(made.sparse)])
    edge = float(every.sort().values[len(every) // 2])
    for name in made.sparse:
        old = program.tensor(name).detach()
        assert torch.equal(made.tensor(name), old * (old.abs() >= edge))


@pytest.mark.parametrize("score", ["l1", "fisher", "wanda", "obs"])
def test_patterns_run_over_inputs_and_input_channels(score):
    program, context = setting("plain_cnn")
    made = Nm(n=1, m=2, score=score, samples=8).apply(program, Sites(), context).program
    assert made.sparse
    for name in made.sparse:
        weight = made.tensor(name).detach()
        whole = weight.shape[1] // 2 * 2
        pairs = (weight[:, :whole].unflatten(1, (-1, 2)) != 0).sum(2)
        assert bool((pairs == 1).all()) and bool((weight[:, whole:] != 0).all())


def test_a_pattern_that_does_not_fit_is_refused_or_noted():
    with pytest.raises(ValidationError, match="n is at most m"):
        Nm(n=5, m=4)
    program, context = setting("plain_cnn")
    first = next(iter(Nm(n=4, m=1000, score="l1").apply(program, Sites(), context).notes))
    assert "fewer than 1000 inputs" in first


@pytest.mark.parametrize("name", ["prune.magnitude", "prune.wanda", "prune.obs", "prune.nm"])
def test_grouped_convolutions_and_quantised_weights(name):
    program, context = setting("grouped")
    options = {} if name == "prune.magnitude" else {"samples": 8}
    method = method_class(name)(**options)
    made = method.apply(program, Sites(), context).program
    coded = QuantizeStatic(samples=8).apply(made, Sites(), context).program
    again = method.apply(coded, Sites(), context).program
    for one in (made, coded, again, freeze(coded)):
        assert one.sparse == made.sparse
        for weight in made.sparse:
            zeros = made.tensor(weight).detach() == 0
            assert bool((one.tensor(weight).detach()[zeros] == 0).all())


def test_pruning_again_keeps_what_was_zero_and_goes_on(chain):
    program, context, _ = chain
    once = Magnitude(ratio=0.4).apply(program, Sites(), context).program
    for method in (Obs(ratio=0.6), Wanda(ratio=0.6), Obs(ratio=0.2)):
        twice = method.apply(once, Sites(), context).program
        for name in once.sparse:
            zeros = once.tensor(name).detach() == 0
            assert bool((twice.tensor(name).detach()[zeros] == 0).all())


def test_channels_are_cut_from_sparse_weights():
    program, context = setting("resnet")
    sparse = Magnitude(ratio=0.5).apply(program, Sites(), context).program
    options = {"ratio": 0.3, "block": 1, "samples": 16, "compensate": False}
    outcome = PruneChannels(**options).apply(sparse, Sites(), context)
    for name in sparse.sparse & set(outcome.changes):
        whole = sparse.tensor(name).detach()
        for dim, kept in outcome.changes[name].items():
            whole = whole.index_select(dim, kept)
        assert torch.equal(outcome.program.tensor(name), whole)
    assert outcome.program.sparse == sparse.sparse


def test_a_refit_after_cutting_channels_keeps_the_zeros():
    program, context = setting("plain_cnn")
    sparse = Magnitude(ratio=0.5).apply(program, Sites(), context).program
    outcome = PruneChannels(ratio=0.3, block=1, samples=16).apply(sparse, Sites(), context)
    assert outcome.figures["refit_error"]
    for name in sparse.sparse:
        old, new = sparse.tensor(name).detach(), outcome.program.tensor(name).detach()
        for dim, kept in outcome.changes.get(name, {}).items():
            old = old.index_select(dim, kept)
        assert bool((new[old == 0] == 0).all())


@pytest.mark.parametrize("name", ["prune.wanda", "prune.obs"])
def test_calibration_of_zeros_falls_back_to_magnitude(name, chain):
    program, context, _ = chain
    zeros = [((torch.zeros(8, 12),), torch.zeros(8, 4))]
    task = Task(
        loss=context.task.loss, metric=context.task.metric, train=zeros,
        split=lambda batch: batch,
    )  # fmt: skip
    dull = Context(task=task, original=program)
    outcome = method_class(name)(ratio=0.5).apply(program, Sites.of("first"), dull)
    assert any("magnitude" in note and "first.weight" in note for note in outcome.notes)
    assert outcome.figures["sparsity"] == 0.5


def test_sites_choose_weights_and_others_are_refused(chain):
    program, context, _ = chain
    made = Magnitude(ratio=0.5).apply(program, Sites.of("last*"), context).program
    assert made.sparse == {"last.weight"}
    with pytest.raises(RecipeError, match="last"):
        Magnitude(ratio=0.5).apply(program, Sites.of("lasr.weight"), context)


def test_weights_in_another_form_are_named_as_the_reason(chain):
    program, context, _ = chain
    shared = Cluster(bits=2).apply(program, Sites(), context).program
    outcome = Magnitude().apply(shared, Sites(), context)
    assert not outcome.program.sparse
    assert any("2 weights are stored in another form" in note for note in outcome.notes)
