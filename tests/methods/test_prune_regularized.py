"""prune.regularized: what fades is gone before it is cut, the strength is found, the rest trains."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from laconic.core.errors import BudgetError, DataError, RecipeError
from laconic.core.task import classification
from laconic.methods.base import Context, method_of
from laconic.methods.prune.regularized import Regularized
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.program.surgery import cut
from laconic.solvers.channels import proximal
from laconic.solvers.channels.fading import FadingGroups, left
from laconic.testing import zoo
from laconic.testing.contracts import own_outputs
from laconic.training.plan import Plan

SHORT = {
    "steps": 8, "precision": "fp32", "evaluations": 2, "teacher": "torch", "block": 1,
    "samples": 16, "importance": "l2", "lr": 0.01,
}  # fmt: skip
FOR_GROUPS = {
    "of": "channels", "importance": "l1", "block": 4, "limit": 0.5, "samples": 8, "keep": {"a": [0]},
}  # fmt: skip


class Net(nn.Module):
    """[batch, 3, 6, 6] -> [batch, 5], with batch norms, a residual stream and a hidden layer."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.c, self.nc = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.d, self.e = nn.Linear(8, 16), nn.Linear(16, 5)
        zoo.shake(self)

    def forward(self, x):
        x = F.relu(self.na(self.a(x)))
        x = F.relu(x + self.nc(self.c(F.relu(self.nb(self.b(x))))))
        return self.e(F.relu(self.d(x.mean((2, 3)))))


@pytest.fixture
def program() -> Program:
    return capture(Net().eval(), torch.randn(2, 3, 6, 6))


def context(program, **options):
    generator = torch.Generator().manual_seed(5)
    images = [torch.randn(16, 3, 6, 6, generator=generator) for _ in range(4)]
    task = classification(train=images)
    return Context(task=task, original=program.clone(), seed=1, **options)


def run(program, sites="*", around=None, **options):
    weights = options.get("penalty", "group") != "group"
    short = {k: v for k, v in SHORT.items() if not (weights and k in FOR_GROUPS)}
    made = Regularized(**{**short, **options})
    return made.apply(program, Sites.of(sites), around or context(program))


def same(left, right):
    one, two = left.state_dict(), right.state_dict()
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.9, 1.0])
def test_a_proximal_step_shrinks_its_norm_by_the_factor_and_solves_its_problem(factor, generator):
    values = torch.randn(200, generator=generator, dtype=torch.float64)
    thin, strength = proximal.l1(values, factor)
    assert float(thin.abs().sum()) == pytest.approx(factor * float(values.abs().sum()), abs=1e-12)
    near = thin + 0.01 * torch.randn(200, generator=generator, dtype=torch.float64)

    def price(v):
        return 0.5 * (v - values).square().sum() + strength * v.abs().sum()

    assert price(thin) < price(near)
    if factor:
        small, strength = proximal.l2(values, factor)
        # the derivative of 1/2 |v - w|^2 + strength / 2 |v|^2 is zero there
        torch.testing.assert_close(small - values + strength * small, torch.zeros_like(values))
    scales, strength = proximal.lasso(values.abs(), factor)
    assert torch.equal((values.abs() - strength).clamp(min=0) > 0, scales > 0)
    assert float((scales * values.abs()).sum()) == pytest.approx(
        factor * float(values.abs().sum()), abs=1e-12
    )


def test_the_plan_runs_from_all_to_nothing():
    for pace in (0.5, 1.0, 3.0):
        path = [left(step, 10, pace) for step in range(13)]
        assert path[0] == 1 and path[10:] == [0, 0, 0]
        assert all(one > two for one, two in itertools.pairwise(path[:11]))


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_fade_to_the_ratio_and_stay_zero(program, penalty, optimizer):
    made = run(program, penalty=penalty, ratio=0.7, optimizer=optimizer, ema=0.5)
    assert made.figures["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert made.program.sparse
    chosen = {n: made.program.tensor(n) == 0 for n in made.program.sparse}
    fast = run(program, penalty=penalty, ratio=0.7, optimizer=optimizer, fade=0.01)
    for name, zero in chosen.items():  # chosen at the start, whatever the training does
        assert torch.equal(zero, fast.program.tensor(name) == 0)
        live = made.program.tensor(name)[~zero]
        assert not torch.equal(live, program.tensor(name)[~zero])


def test_the_cut_changes_nothing_where_cutting_at_once_changes_much(program):
    made = run(program, ratio=0.5, of="channels")
    assert made.changes
    assert made.figures["cut_change"] < 1e-6  # a sum in float32 that leaves zeros out
    keep = made.resolved["keep"]
    hole = cut(program, keep)[0]
    x = context(program).task.train[0]
    with torch.no_grad():
        before, after = program(x), hole(x)
    assert (after - before).norm() / before.norm() > 0.05


def test_just_before_the_cut_the_network_is_the_one_after_it(program, monkeypatch):
    """On data, in eval mode: the function of the live program around its own cut."""
    x = context(program).task.train[1]
    seen = []

    def watched(self, step, inner=FadingGroups.cut):
        def outputs():
            self.program.eval()
            with torch.no_grad():
                found = self.program(x)
            self.program.train()
            return found

        before = outputs()
        changes = inner(self, step)
        if changes:
            seen.append((before, outputs()))
        return changes

    monkeypatch.setattr(FadingGroups, "cut", watched)
    run(program, ratio=0.5)
    ((before, after),) = seen
    # float32 sums over fewer terms, a handful of layers
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_the_order_of_groups_changes_nothing(program):
    """A weight between two groups fades with both, and its norm is measured after the first."""

    def faded(names):
        made = program.clone().train()
        fading = FadingGroups({name: torch.arange(4) for name in names}, 0.5, 2.0)
        fading.begin(made, Plan(steps=4))
        with torch.no_grad():
            fading.fade(0.5)
        return made.state_dict()

    one, two = faded(["a.out", "b.out"]), faded(["b.out", "a.out"])
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not torch.equal(one["b.weight"], program.state_dict()["b.weight"])


@pytest.mark.parametrize("of", ["macs", "parameters", "channels"])
def test_the_ratio_is_reached(program, of):
    made = run(program, ratio=0.4, of=of)
    small = cost(made.program)
    gone = {
        "macs": 1 - small.macs / cost(program).macs,
        "parameters": 1 - small.params / cost(program).params,
        "channels": 1
        - sum(group.size for group in groups(made.program))
        / sum(group.size for group in groups(program)),
    }[of]
    assert 0.4 <= gone < 0.6
    assert made.figures["macs"] == [cost(program).macs, small.macs]


@pytest.mark.parametrize("model", ["per_head", "fused_split", "grouped", "tied_autoencoder"])
def test_awkward_groups_fade_too(model):
    program = zoo.captured(model)
    around = Context(task=own_outputs(program), original=program.clone(), seed=1)
    made = run(program, around=around, ratio=0.3, of="channels")
    told = any("normalisation" in note for note in made.notes)
    assert made.changes
    assert made.figures["cut_change"] < 1e-5 or told
    assert not made.program.training


def test_a_strength_is_found_and_grows_where_the_loss_pushes_back(program):
    made = run(program, penalty="l2", ratio=0.5, steps=40, fade=1.0, warmup=0.0, momentum=0.0)
    strengths = made.figures["strength"]
    assert len(strengths) >= 5
    assert list(strengths.values()) == sorted(strengths.values())
    assert all(value > 0 for value in strengths.values())


@pytest.mark.parametrize("options", [{"penalty": "l1"}, {"penalty": "l2"}, {"of": "channels"}])
def test_replay_is_bit_exact(program, options):
    first = run(program, **options)
    step = Regularized(**first.resolved).step()
    second = method_of(step, "step 1").apply(program, Sites(), context(program))
    assert same(first.program, second.program)
    assert second.resolved == first.resolved


@pytest.mark.parametrize("options", [{"penalty": "l1"}, {"penalty": "group"}])
@pytest.mark.parametrize("at", [3, 7])
def test_a_run_that_was_stopped_goes_on(program, tmp_path, options, at):
    options = {**options, "save_every": 0, "ema": 0.5}
    whole = run(program, **options)
    calls = []

    def failing(batch):
        calls.append(0)
        if len(calls) == at:
            raise RuntimeError("power cut")
        return (batch,), None

    around = context(program, workdir=tmp_path)
    broken = classification(train=around.task.train, split=failing)
    with pytest.raises(RuntimeError, match="power cut"):
        run(program, around=Context(**{**vars(around), "task": broken}), **options)
    assert list(tmp_path.iterdir())
    resumed = run(program, around=around, **options)
    assert same(resumed.program, whole.program)
    assert resumed.figures["history"] == whole.figures["history"]
    assert resumed.figures["strength"] == whole.figures["strength"]


def test_sites_choose_the_groups(program):
    made = run(program, sites="b.out", ratio=0.5, of="channels")
    assert list(made.resolved["keep"]) == ["b.out"]
    assert made.program.tensor("b.weight").shape == (6, 8, 3, 3)


def test_nothing_to_do_is_said(program):
    for penalty in ("group", "l1"):
        made = run(program, penalty=penalty, ratio=0.0)
        assert same(made.program, program)
        assert "nothing is to go" in made.notes
        assert made.resolved["ratio"] == 0, "a replay does nothing, too"


@pytest.mark.parametrize(
    ("options", "sites", "error", "message"),
    [
        ({}, "b.outt", RecipeError, "b.out"),
        ({"penalty": "l1"}, "b.wait", RecipeError, "b.weight"),
        ({}, "e.out", RecipeError, "cannot shrink"),
        ({"features": 1.0, "nodes": ["relu_1"], "of": "channels"}, "b.out", RecipeError, "along"),
        ({"ratio": 0.95, "limit": 0.2}, "*", BudgetError, "at most"),
    ],
)
def test_what_cannot_be_done_is_refused(program, options, sites, error, message):
    before = program.clone()
    with pytest.raises(error, match=message):
        run(program, sites=sites, **options)
    assert same(program, before)


@pytest.mark.parametrize("name", FOR_GROUPS)
def test_options_for_groups_are_refused_for_single_weights(name):
    given = {name: FOR_GROUPS[name]}
    assert Regularized(**given)
    for penalty in ("l1", "l2"):
        with pytest.raises(ValidationError, match=f"{name}: for penalty: group only; {penalty}"):
            Regularized(penalty=penalty, **given)


def test_missing_data_and_bad_options_are_refused(program):
    empty = Context(task=classification(), original=program.clone())
    with pytest.raises(DataError, match="no train or calibration data"):
        run(program, around=empty)
    for options in ({"ratio": 1.0}, {"fade": 0.0}, {"importance": "obz"}, {"block": 0}):
        with pytest.raises(ValidationError):
            Regularized(**options)
