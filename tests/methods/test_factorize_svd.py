"""What `factorize.svd` promises: full rank is the original, ranks obey the budget, replay, clear refusals."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from laconic.core.errors import BudgetError, RecipeError
from laconic.core.task import classification
from laconic.methods.base import Context
from laconic.methods.factorize.svd import FactorizeSvd
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.sites import Sites
from laconic.testing import zoo
from laconic.testing.contracts import case as contract
from laconic.testing.contracts import own_outputs, replay_is_exact, survives_storage, trains_on

KINDS = ["channel", "spatial", "tucker2", "cp"]


def setting(model, **options):
    program = zoo.captured(model)
    return program, Context(task=own_outputs(program), original=program, **options)


def run(model, sites="*", **options):
    program, context = setting(model)
    return program, FactorizeSvd(**{"samples": 16, **options}).apply(
        program, Sites.of(sites), context
    )


class Planted(nn.Module):
    """Every weight is a product of smaller ones, of exactly the given rank and kind."""

    def __init__(self, kind, rank=3):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.conv = nn.Conv2d(16, 20, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1))
            self.head = nn.Linear(20, 12)
            self.conv.weight = nn.Parameter(self.planted(kind, rank))
            self.head.weight = nn.Parameter(torch.randn(12, rank) @ torch.randn(rank, 20))

    @staticmethod
    def planted(kind, rank):
        def draw(*size):
            return torch.randn(*size) / math.sqrt(size[-1])

        if kind == "channel":
            return torch.einsum("or,rihw->oihw", draw(20, rank), draw(rank, 16, 3, 5))
        if kind == "spatial":
            return torch.einsum("orw,rih->oihw", draw(20, rank, 5), draw(rank, 16, 3))
        if kind == "tucker2":
            core = draw(rank, rank, 3, 5)
            return torch.einsum("op,prhw,ri->oihw", draw(20, rank), core, draw(rank, 16))
        modes = [torch.linalg.qr(draw(n, rank))[0] for n in (20, 16, 3, 5)]
        return torch.einsum("or,ir,hr,wr->oihw", *modes)

    def forward(self, x):
        return self.head(F.relu(self.conv(F.relu(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"weighting": "none", "repair": "none"}, {"repair": "none"}, {}]
)
def test_a_weight_of_that_rank_comes_back_exactly(kind, options):
    program = capture(Planted(kind).eval(), torch.randn(2, 3, 10, 12))
    context = Context(task=own_outputs(program, batches=24), original=program)
    ranks = {"conv.weight": [3, 3] if kind == "tucker2" else [3], "head.weight": [3]}
    outcome = FactorizeSvd(kind=kind, ranks=ranks, **options).apply(program, Sites(), context)
    assert outcome.resolved["ranks"] == ranks
    assert not any("left whole" in note for note in outcome.notes)
    x = torch.randn(5, 3, 10, 12)
    with torch.no_grad():
        miss = (outcome.program(x) - program(x)).abs().max() / program(x).abs().max()
    # a fit ends where its error no longer moves; the others are exact up to float32
    assert float(miss) < (2e-2 if kind == "cp" else 2e-4)
    before, after = cost(program), cost(outcome.program)
    assert after.macs < before.macs and after.params < before.params
    assert outcome.figures["macs"] == [before.macs, after.macs]


def test_the_new_tensors_stand_beside_the_old_ones_and_keep_their_origin():
    program = capture(Planted("tucker2").eval(), torch.randn(2, 3, 10, 12))
    context = Context(task=own_outputs(program), original=program)
    ranks = {"conv.weight": [4, 5], "head.weight": [3]}
    made = FactorizeSvd(kind="tucker2", ranks=ranks, repair="none").apply(program, Sites(), context)
    shapes = {name: tuple(t.shape) for name, t in made.program.tensors()}
    assert shapes["conv.reduce.weight"] == (4, 16, 1, 1)
    assert shapes["conv.core.weight"] == (5, 4, 3, 5)
    assert shapes["conv.expand.weight"] == (20, 5, 1, 1)
    assert shapes["head.reduce.weight"] == (3, 20)
    assert "conv.weight" not in shapes and shapes["conv.bias"] == (20,)
    nodes = [n for n in made.program.graph.nodes if n.op == "call_function"]
    origins = [n.meta["origin"] for n in nodes if "conv2d" in str(n.target)]
    assert origins == ["stem", "conv", "conv", "conv"]
    assert [n.meta["origin"] for n in nodes if "linear" in str(n.target)] == ["head", "head"]


def test_truncation_is_the_best_one_for_the_outputs():
    """Reduced rank regression: the mean squared error of the outputs is the discarded spectrum."""
    torch.manual_seed(0)
    mix = torch.randn(24, 24) * torch.logspace(0, -2, 24)
    data = [torch.randn(256, 24) @ mix + 1 for _ in range(2)]
    program = capture(nn.Linear(24, 20).eval(), torch.randn(2, 24))
    context = Context(task=classification(calibration=data), original=program)
    x = torch.cat(data).double()

    def loss(**options):
        made = FactorizeSvd(ranks={"weight": [4]}, repair="none", **options).apply(
            program, Sites(), context
        )
        with torch.no_grad():
            y, z = program(x.float()).double(), made.program(x.float()).double()
        return float((y - z).square().sum() / len(x)), y

    by_data, y = loss(damping=1e-9)
    plain, _ = loss(weighting="none")
    spectrum = torch.linalg.svdvals(y - y.mean(0)).square() / len(x)
    assert abs(by_data - float(spectrum[4:].sum())) < 1e-3 * by_data
    assert by_data < 0.5 * plain


@pytest.mark.parametrize("of", ["macs", "parameters"])
@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker2"])
def test_the_ratio_is_reached_and_hardly_more(kind, of):
    program, outcome = run("resnet", ratio=0.25, of=of, kind=kind, repair="none")
    before, after = cost(program), cost(outcome.program)
    gone = {
        "macs": 1 - after.macs / before.macs,
        "parameters": 1 - after.params / before.params,
    }[of]
    assert 0.25 <= gone < 0.32
    lost = outcome.figures["lost"]
    assert set(lost) == set(outcome.resolved["ranks"]) and all(0 < h < 1 for h in lost.values())


def test_energy_bounds_what_every_layer_loses():
    _, outcome = run("plain_cnn", energy=0.8, weighting="none", repair="none")
    assert outcome.figures["lost"]
    assert all(lost <= 0.2 for lost in outcome.figures["lost"].values())


def test_one_share_for_every_layer():
    program, outcome = run("plain_cnn", ratio=0.4, scope="layer", weighting="none", repair="none")
    before = {row.tensors[0]: row.macs for row in cost(program).rows if row.macs}
    after = cost(outcome.program).rows
    for name in outcome.resolved["ranks"]:
        path = name.removesuffix("weight")
        now = sum(row.macs for row in after if row.tensors and row.tensors[0].startswith(path))
        assert 0.3 * before[name] < now <= 0.6 * before[name]


def test_refitting_pays_and_covariance_pays():
    program, context = setting("resnet")
    task = own_outputs(program, batches=64)
    context = Context(task=task, original=program)

    def error(**options):
        made = FactorizeSvd(ratio=0.3, samples=96, **options).apply(program, Sites(), context)
        held = own_outputs(program, batches=16, seed=9)
        with torch.no_grad():
            return sum(float(-held.metric(made.program(**x), t).mean()) for x, t in held.train)

    plain = error(weighting="none", repair="none")
    weighted = error(repair="none")
    refitted = error()
    assert weighted < plain
    assert refitted < weighted


@pytest.mark.parametrize("options", [{}, {"kind": "tucker2", "repair": "norms"}, {"kind": "cp"}])
def test_replays_survives_storage_and_trains_on(options):
    held = contract("factorize.svd", "resnet", energy=None, ratio=0.2, **options)
    assert held.outcome.resolved["ranks"]
    for check in (replay_is_exact, survives_storage, trains_on):
        check(held)


def test_batch_norms_can_be_measured_anew():
    program, outcome = run("resnet", ratio=0.3, repair="norms")
    means = [name for name, _ in program.tensors() if name.endswith("running_mean")]
    assert any(
        not torch.equal(program.tensor(name), outcome.program.tensor(name)) for name in means
    )


# What stays -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "site", "words"),
    [
        ("grouped", "one.weight", "grouped convolutions"),
        ("mobilenet", "depth.0.weight", "depthwise and grouped"),
        ("shared_module", "step.weight", "tied or used by several"),
        ("volume", "one.weight", "1-d or 2-d"),
        ("unet", "up.weight", "1-d or 2-d"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused_in_words(model, site, words):
    program, outcome = run(model, sites=site, energy=0.5)
    assert any(note.startswith(site) and words in note for note in outcome.notes)
    for name, tensor in program.tensors():
        assert torch.equal(tensor, outcome.program.tensor(name))


def test_tied_weights_stay_tied():
    program, outcome = run("tied_autoencoder", energy=0.5)
    assert any("tied" in note for note in outcome.notes)
    assert set(dict(program.tensors())) == set(dict(outcome.program.tensors()))


def test_spatial_needs_two_dimensions():
    _, outcome = run("sound", sites="stem.weight", kind="spatial", energy=0.5)
    assert any("two spatial dimensions" in note for note in outcome.notes)


def test_ranks_that_are_not_cheaper_are_left_out():
    program, outcome = run("plain_cnn", ranks={"first.weight": [24], "head.weight": [1]})
    assert outcome.resolved["ranks"] == {"head.weight": [1]}
    assert any(note.startswith("first.weight") and "not cheaper" in note for note in outcome.notes)


def test_nothing_to_do_says_why():
    _, outcome = run("plain_cnn", ratio=0.0)
    assert outcome.notes == ["ratio is 0: nothing is replaced"]


def test_constant_inputs_fall_back_to_the_plain_decomposition():
    program, _ = setting("plain_cnn")
    zeros = [torch.zeros(8, 3, 8, 8)]
    context = Context(task=classification(calibration=zeros), original=program)
    outcome = FactorizeSvd(ranks={"body.0.0.weight": [4]}).apply(program, Sites(), context)
    assert any("constant input" in note for note in outcome.notes)
    assert all(bool(torch.isfinite(t).all()) for _, t in outcome.program.tensors())


def test_fewer_samples_than_columns_is_damped_and_said():
    _, outcome = run("plain_cnn", sites="first.weight", samples=4, ratio=0.02)
    assert any("singular" in note and "0.001" in note for note in outcome.notes)


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, "less than 1"),
        ({"energy": 0.0}, "greater than 0"),
        ({"kind": "tucker"}, "tucker2"),
        ({"damping": 0.0}, "greater than 0"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        FactorizeSvd(**options)


def test_an_impossible_ratio_says_how_far_it_can_go():
    with pytest.raises(BudgetError, match=r"at most.*99\.0%") as caught:
        run("resnet", ratio=0.99, weighting="none")
    assert caught.value.where


def test_a_share_of_every_layer_says_how_far_each_can_go():
    _, outcome = run("resnet", ratio=0.85, scope="layer", weighting="none", repair="none")
    assert any("macs can fall by" in note and "left whole" in note for note in outcome.notes)
    with pytest.raises(
        BudgetError, match=r"at most, and of no other one further.*99\.9%"
    ) as caught:
        run("resnet", ratio=0.999, scope="layer", weighting="none")
    assert caught.value.where


def test_energy_that_no_cheaper_rank_keeps_is_noted():
    _, outcome = run("plain_cnn", energy=1.0, weighting="none", repair="none")
    assert any("keep less of its energy" in note for note in outcome.notes)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [({"firs.weight": [2]}, "first.weight"), ({"first.weight": [2, 2]}, "expected 1")],
)
def test_ranks_that_fit_no_layer_are_refused(ranks, words):
    with pytest.raises(RecipeError, match=words):
        run("plain_cnn", ranks=ranks)


def test_layers_without_anything_between_are_both_replaced():
    """The second one reads what took the place of the first."""
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)).eval()
    program = capture(model, torch.randn(2, 12))
    context = Context(task=own_outputs(program), original=program)
    made = FactorizeSvd(samples=16, ratio=0.5).apply(program, Sites(), context).program
    assert sum(node.op == "call_function" for node in made.graph.nodes) == 4
    assert made(*program.example).isfinite().all()


def test_inputs_too_large_to_be_squared_fall_back_in_words():
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    program = capture(model.eval(), torch.randn(2, 6))
    program.set_tensor("0.weight", 1e25 * program.tensor("0.weight").detach())
    program.set_tensor("1.weight", 1e-25 * program.tensor("1.weight").detach())
    context = Context(
        task=classification(calibration=[torch.randn(64, 6)]), original=program.clone()
    )
    outcome = FactorizeSvd(energy=0.5).apply(program, Sites(), context)
    assert any("1.weight: its inputs are too large" in note for note in outcome.notes)
    assert all(bool(t.isfinite().all()) for _, t in outcome.program.tensors())


def test_zeros_of_pruned_weights_are_told_lost():
    program, context = setting("plain_cnn")
    name = next(name for name, t in program.tensors() if t.ndim == 4 and len(t) > 4)
    program.sparse = frozenset([name])
    options = {"energy": 0.3, "weighting": "none", "repair": "none"}
    outcome = FactorizeSvd(**options).apply(program, Sites.of(name), context)
    assert name in outcome.resolved["ranks"]
    assert f"{name}: its zeros are gone, the factors are dense" in outcome.notes
    assert not outcome.program.sparse
