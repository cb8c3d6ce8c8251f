"""prune.dynamic: channels leave a network in training, and nothing else is disturbed."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from laconic.core.errors import BudgetError, DataError, RecipeError
from laconic.core.task import classification
from laconic.methods.base import Context, method_of
from laconic.methods.distill.logits import Logits
from laconic.methods.prune.dynamic import Dynamic
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.program.surgery import sliced
from laconic.solvers.channels.activity import Activity
from laconic.solvers.channels.shedding import Timetable
from laconic.testing import zoo
from laconic.training.job import Loss

TRAINING = {"steps": 8, "precision": "fp32", "evaluations": 2, "teacher": "torch", "lr": 0.01}
SHORT = {**TRAINING, "block": 1, "cuts": 2, "end": 0.6}
ALIVE = torch.tensor([0, 1, 3, 4, 6])


class Net(nn.Module):
    """[batch, 3, 6, 6] -> [batch, 5]; with `dead`, three of eight channels do nothing at all."""

    def __init__(self, dead=False):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.c, self.d = nn.Linear(12, 16), nn.Linear(16, 5)
        zoo.shake(self)
        if dead:
            gone = [c for c in range(8) if c not in ALIVE.tolist()]
            with torch.no_grad():
                self.na.weight[gone], self.na.bias[gone] = 0.0, 0.0
                self.b.weight[:, gone] = 0

    def forward(self, x):
        x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
        return self.d(F.relu(self.c(x.mean((2, 3)))))


def captured(net) -> Program:
    return capture(net.eval(), torch.randn(2, 3, 6, 6))


@pytest.fixture
def program() -> Program:
    return captured(Net())


def context(program, original=None, **options):
    generator = torch.Generator().manual_seed(5)
    images = [torch.randn(16, 3, 6, 6, generator=generator) for _ in range(4)]
    original = original or program.clone()
    return Context(task=classification(train=images), original=original, seed=1, **options)


def run(program, sites="*", around=None, **options):
    made = Dynamic(**{**SHORT, **options})
    return made.apply(program, Sites.of(sites), around or context(program))


def same(left, right):
    one, two = left.state_dict(), right.state_dict()
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


VARIANTS = {
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.02},
    "adamw": {"optimizer": "adamw", "lr": 0.002},
    "ema": {"optimizer": "sgd", "ema": 0.7},
    "several": {"optimizer": "sgd", "accumulate": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_when_dead_channels_leave_later_steps_are_those_of_the_masked_network(variant):
    """Dead channels are their own mask: all their gradients are zero in the network kept whole."""
    options = VARIANTS[variant]
    program = captured(Net(dead=True))
    around = context(program, original=captured(Net()))
    ratio = 1 - cost(zoomed(program)).macs / cost(program).macs
    made = run(program, sites="a.out", around=around, ratio=ratio, cuts=1, end=0.4, **options)
    ((kept,),) = [list(step.values()) for step in made.resolved["replay"].values()]
    assert kept == ALIVE.tolist()  # the least active ones are those that are never active
    whole = Logits(**{**TRAINING, **options}).apply(program, Sites(), around)
    for name, tensor in made.program.tensors():
        wanted = sliced(whole.program.tensor(name).detach(), made.changes.get(name, {}))
        # sums over 8 and over 5 channels round differently, eight steps carry it on
        torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-5)
        before = sliced(program.tensor(name).detach(), made.changes.get(name, {}))
        assert tensor.numel() == 1 or not torch.equal(tensor, before)


def zoomed(program) -> Program:
    from laconic.program.surgery import cut

    return cut(program, {"a.out": ALIVE})[0]


@pytest.mark.parametrize("activity", ["flow", "mean", "apoz", "entropy"])
def test_channels_that_never_fire_go_first(activity):
    program = captured(Net(dead=True))
    made = run(program, sites="a.out", ratio=0.3, of="channels", cuts=1, activity=activity)
    ((kept,),) = [list(step.values()) for step in made.resolved["replay"].values()]
    assert len(kept) == 5
    assert kept == ALIVE.tolist()


@pytest.mark.parametrize("of", ["macs", "parameters", "channels"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_it_gets_smaller_cut_by_cut_down_to_the_ratio(program, of, scope):
    made = run(program, ratio=0.5, of=of, scope=scope, cuts=3)
    small = cost(made.program)
    gone = {
        "macs": 1 - small.macs / cost(program).macs,
        "parameters": 1 - small.params / cost(program).params,
        "channels": 1
        - sum(group.size for group in groups(made.program))
        / sum(group.size for group in groups(program)),
    }[of]
    assert 0.5 <= gone < 0.75
    steps, macs = zip(*made.figures["macs_by_step"], strict=True)
    assert len(steps) >= 3
    assert list(macs) == sorted(macs, reverse=True)
    assert macs[0] == cost(program).macs and macs[-1] == small.macs
    assert max(steps) <= 5 and made.figures["best_step"] > max(steps)


def test_changes_lead_from_the_input_to_the_result(program):
    made = run(program, ratio=0.5, of="channels", scope="layer", cuts=3)
    for name, tensor in program.tensors():
        assert sliced(tensor, made.changes.get(name, {})).shape == made.program.tensor(name).shape
    assert any(len(dims) == 2 for dims in made.changes.values())


def test_activity_is_the_mean_over_what_the_next_layer_reads(program):
    found = groups(program)
    seen = Activity("mean")
    seen.aim(program, [found.find("a.out")])
    batches = context(program).task.train

    def objective(forward, batch, number):
        return Loss(forward(batch)[0].sum(), len(batch))

    value = seen.watching(objective)(program.run_flat, batches[0], 0).value
    assert torch.equal(value, program(batches[0]).sum())
    seen.watching(objective)(program.run_flat, batches[1], 1)
    with torch.no_grad():
        norm = [
            program.tensor(f"na.{n}") for n in ("running_mean", "running_var", "weight", "bias")
        ]
        x = torch.cat(batches[:2])
        read = F.relu(
            F.batch_norm(F.conv2d(x, program.tensor("a.weight"), padding=1), *norm, eps=1e-5)
        )
    wanted = read.abs().mean((0, 2, 3)).double()
    torch.testing.assert_close(seen.scores()["a.out"], wanted / wanted.mean(), rtol=1e-4, atol=1e-6)


def test_watching_changes_nothing_that_is_learned(program):
    """Replayed without measuring, the run is the same bit for bit."""
    first = run(program, window=100)
    second = method_of(Dynamic(**first.resolved).step(), "step 1").apply(
        program, Sites.of("nothing.of.that.name"), context(program)
    )
    assert same(first.program, second.program)
    assert second.resolved == first.resolved
    assert second.figures["history"] == first.figures["history"]


@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_run_that_was_stopped_goes_on(program, tmp_path, at):
    """Before, in the window of, and after a cut; the folder holds all there is to know."""
    options = {"save_every": 0, "ema": 0.5, "cuts": 2, "end": 0.6}
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
    assert resumed.resolved == whole.resolved
    assert resumed.figures["history"] == whole.figures["history"]
    for name, dims in whole.changes.items():
        assert all(torch.equal(resumed.changes[name][dim], kept) for dim, kept in dims.items())


def test_features_are_compared_where_shapes_stay(program):
    made = run(program, features=1.0, nodes=["relu_2"], ratio=0.3)
    assert made.program.tensor("c.weight").shape[0] == 16
    assert cost(made.program).macs <= 0.7 * cost(program).macs
    assert any("c.out: left whole" in note for note in made.notes)


def test_the_timetable_ends_where_it_should():
    times = Timetable(cuts=8, begin=0.0, end=0.5, window=4)
    assert times.marks(160) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert times.marks(4) == [1, 2]  # fewer steps than cuts: cuts fall together
    assert times.marks(1) == [1]


def test_nothing_to_do_is_said(program):
    made = run(program, ratio=0.0)
    assert same(made.program, program)
    assert "nothing is to go" in made.notes
    assert made.resolved["ratio"] == 0, "a replay does nothing, too"


@pytest.mark.parametrize(
    ("options", "sites", "error", "message"),
    [
        ({}, "b.outt", RecipeError, "b.out"),
        ({}, "d.out", RecipeError, "cannot shrink"),
        ({"ratio": 0.95, "limit": 0.2}, "*", BudgetError, "at most"),
    ],
)
def test_what_cannot_be_done_is_refused(program, options, sites, error, message):
    before = program.clone()
    with pytest.raises(error, match=message):
        run(program, sites=sites, **options)
    assert same(program, before)


def test_missing_data_and_bad_options_are_refused(program):
    empty = Context(task=classification(), original=program.clone())
    with pytest.raises(DataError, match="no train or calibration data"):
        run(program, around=empty)
    for options in ({"ratio": 1.0}, {"begin": 0.6, "end": 0.5}, {"cuts": 0}, {"activity": "mood"}):
        with pytest.raises(ValidationError):
            Dynamic(**options)
