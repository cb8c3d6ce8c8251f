"""prune.gradual: exact sparsity, replay and resume bit for bit, zeros that last."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from laconic.core.errors import RecipeError, TrainingError
from laconic.core.task import classification, regression
from laconic.methods.base import Context, method_of
from laconic.methods.distill.logits import Logits
from laconic.methods.prune.gradual import Gradual
from laconic.methods.prune.magnitude import Magnitude
from laconic.methods.quantize.static import QuantizeStatic
from laconic.program.capture import capture
from laconic.program.freezing import is_frozen
from laconic.program.sites import Sites

TRAINING = {"steps": 8, "evaluations": 3, "precision": "fp32", "teacher": "torch"}
SHORT = {**TRAINING, "every": 2, "end": 0.75}
VARIANTS = {
    "learn": {},
    "rest": {"masked": "rest", "optimizer": "adamw", "lr": 0.01},
    "gone": {"masked": "gone", "scope": "tensor"},
    "regrow": {"masked": "gone", "regrow": 0.4},
    "movement": {"score": "movement", "masked": "rest", "alpha": 0.5},
    "movement learns": {"score": "movement"},
    "ema": {"ema": 0.8},
    "accumulate": {"accumulate": 2, "masked": "gone", "regrow": 0.3},
}


class Net(nn.Module):
    """[batch, 3, 6, 6] -> [batch, 4]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.inner(torch.relu(self.bn(self.stem(x))))).mean((2, 3)))


WEIGHTS = ["stem.weight", "inner.weight", "head.weight"]


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.head.weight.mul_(20)
    return capture(net.eval(), torch.randn(2, 3, 6, 6))


@pytest.fixture(scope="module")
def task(program):
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(6)]
    with torch.no_grad():
        batches = [(each, program(each).argmax(1)) for each in x]
    return classification(train=batches[:4], validation=batches[4:])


def apply(program, task, sites="*", method=Gradual, workdir=None, **options):
    context = Context(task=task, original=program, seed=2, workdir=workdir)
    return method(**{**SHORT, **options}).apply(program, Sites.of(sites), context)


def tensors(program):
    return {name: tensor.detach().clone() for name, tensor in program.tensors()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def zeros(program, names=tuple(WEIGHTS)):
    return {name: program.tensor(name).detach() == 0 for name in names}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_sparsity_is_exact_the_input_untouched_and_the_replay_bit_for_bit(
    program, task, options
):
    before = tensors(program)
    made = apply(program, task, ratio=0.7, **options)
    assert same(tensors(program), before)
    found = zeros(made.program)
    sizes = {name: mask.numel() for name, mask in found.items()}
    if options.get("scope") == "tensor":
        for name, mask in found.items():
            assert int(mask.sum()) == round(0.7 * sizes[name])
    else:
        assert sum(int(m.sum()) for m in found.values()) == round(0.7 * sum(sizes.values()))
    assert made.program.sparse == set(WEIGHTS)
    assert made.figures["best_step"] >= 6  # the masks are final after 3/4 of 8 steps
    assert any("not faster" in note for note in made.notes)
    step = Gradual(**made.resolved).step()
    again = method_of(step, "step 1").apply(
        program, Sites(), Context(task=task, original=program, seed=2)
    )
    assert same(tensors(again.program), tensors(made.program))
    assert again.resolved == made.resolved


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_stopped_and_resumed_equals_uninterrupted(program, task, tmp_path, options):
    options = {"ratio": 0.7, "save_every": 0, **options}
    told, fail_at = [], None

    def split(batch):
        told.append(0)
        if len(told) == fail_at:
            raise RuntimeError("power cut")
        return (batch[0],), batch[1]

    counted = classification(train=task.train, validation=task.validation, split=split)
    whole = apply(program, counted, **options)
    every, fail_at = len(told), len(told) * 2 // 3
    told.clear()
    with pytest.raises(RuntimeError, match="power cut"):
        apply(program, counted, workdir=tmp_path, **options)
    fail_at = None
    told.clear()
    again = apply(program, counted, workdir=tmp_path, **options)
    assert len(told) < every // 2 + 3  # it went on, it did not begin afresh
    assert same(tensors(again.program), tensors(whole.program))
    assert again.figures["history"] == whole.figures["history"]


@pytest.mark.parametrize("masked", ["learn", "rest", "gone"])
def test_ratio_0_is_plain_training(program, task, masked):
    """All masks are True: the same steps, bit for bit."""
    bare = classification(train=task.train)  # nothing is judged: the last state is the result
    made = apply(program, bare, ratio=0.0, masked=masked)
    context = Context(task=bare, original=program, seed=2)
    plain = Logits(**TRAINING).apply(program, Sites(), context)
    assert same(tensors(made.program), tensors(plain.program))
    assert made.figures["history"] == plain.figures["history"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_last_through_further_training(program, task, optimizer):
    made = apply(program, task, ratio=0.6).program
    before = zeros(made)
    more = {**TRAINING, "steps": 6, "optimizer": optimizer, "weight_decay": 0.1, "lr": 0.05}
    context = Context(task=classification(train=task.train), original=program)
    after = Logits(**more).apply(made, Sites(), context).program
    for name, mask in zeros(after).items():
        assert torch.equal(mask, before[name])
        assert not torch.equal(after.tensor(name), made.tensor(name))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_weights_pruned_before_stay_zero(program, task, options):
    context = Context(task=task, original=program)
    first = Magnitude(ratio=0.3).apply(program, Sites(), context).program
    held = zeros(first)
    made = apply(first, task, ratio=0.6, **options).program
    for name, mask in zeros(made).items():
        assert bool(mask[held[name]].all())


def test_sites_are_what_is_pruned_and_everything_trains(program, task):
    made = apply(program, task, sites="inner", ratio=0.5).program
    assert made.sparse == {"inner.weight"}
    assert int((made.tensor("inner.weight") == 0).sum()) == 6 * 8 * 9 // 2
    for name in ("stem.weight", "head.bias", "bn.weight"):
        assert not torch.equal(made.tensor(name), program.tensor(name))


@pytest.mark.parametrize("options", [{}, {"masked": "gone", "regrow": 0.5}])
def test_a_pattern_of_n_of_every_m_inputs(program, task, options):
    made = apply(program, task, n=1, m=3, **options)
    for name in ("stem.weight", "inner.weight"):
        weight = made.program.tensor(name).detach()
        blocks = weight.unflatten(1, (-1, 3))  # of the input channels at each place of the kernel
        assert set((blocks != 0).sum(2).unique().tolist()) == {1}
    head = made.program.tensor("head.weight").detach()
    assert set((head[:, :6].unflatten(1, (2, 3)) != 0).sum(2).unique().tolist()) == {1}
    assert bool((head[:, 6:] != 0).all())  # a rest that fills no pattern
    again = Gradual(**made.resolved).apply(
        program, Sites(), Context(task=task, original=program, seed=2)
    )
    assert same(tensors(again.program), tensors(made.program))


def test_weights_without_room_for_a_pattern_stay_whole(program, task):
    made = apply(program, task, n=2, m=8)
    assert made.program.sparse == {"head.weight"}
    assert sum("fewer than 8 inputs" in note for note in made.notes) == 2


def test_a_pattern_that_no_weight_has_room_for_replays_as_nothing(program, task):
    made = apply(program, task, n=2, m=128)
    again = Gradual(**made.resolved).apply(program, Sites(), Context(task=task, original=program))
    for outcome in (made, again):
        assert same(tensors(outcome.program), tensors(program))
        assert sum("fewer than 128 inputs" in note for note in outcome.notes) == 3


def test_it_ends_closer_to_the_original_than_one_cut():
    """At sparsity 0.8; random weights have no small ones, so a cut alone costs much."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    original = capture(net.eval(), torch.randn(2, 12))
    x = torch.randn(64, 12)
    task = regression(train=[x[:32], x[32:]])
    made = apply(original, task, ratio=0.8, steps=150, lr=0.01)
    context = Context(task=task, original=original)
    cut = Magnitude(ratio=0.8).apply(original, Sites(), context).program

    def distance(other):
        with torch.no_grad():
            return float((other(x) - original(x)).square().mean())

    assert distance(made.program) < 0.5 * distance(cut)


def test_weights_stored_as_integers_stay_so_and_get_their_zeros(program, task):
    context = Context(task=task, original=program)
    static = QuantizeStatic(activations=False, freeze=True, bits=8, bias_correction="none")
    stored = static.apply(program, Sites(), context).program
    made = apply(stored, task, ratio=0.6).program
    assert is_frozen(made)
    codes = [made.tensor(name) for name in WEIGHTS]
    assert all(not code.is_floating_point() for code in codes)
    free = sum(int((code != 0).sum()) for code in codes)
    assert free <= sum(code.numel() for code in codes) * 0.4 + 1  # small weights round to 0 too


def test_minutes_become_steps_that_replay(program, task):
    made = apply(program, task, ratio=0.5, steps=None, minutes=0.01, every=None)
    assert made.resolved["steps"] >= 1
    assert made.resolved["minutes"] is None
    again = Gradual(**made.resolved).apply(
        program, Sites(), Context(task=task, original=program, seed=2)
    )
    assert same(tensors(again.program), tensors(made.program))


def test_nan_before_the_sparsity_is_reached_is_an_error(program, task):
    with pytest.raises(TrainingError, match="before any state worth keeping"):
        apply(program, task, lr=1e30, clip=None)


def test_nothing_to_prune_is_said(task):
    made = capture(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 3))
    outcome = apply(made, classification(train=[torch.randn(2, 3)]))
    assert any("nothing to prune" in note for note in outcome.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "less than 1"),
        ({"begin": 0.5, "end": 0.4}, "begin 0.5 is not before end 0.4"),
        ({"n": 2}, "a pattern needs both"),
        ({"n": 5, "m": 4}, "n 5 of every m 4 cannot stay"),
        ({"n": 2, "m": 4, "ratio": 0.5}, "n and m take the place of ratio"),
        ({"regrow": 0.3}, "regrow 0.3 is for masked: gone, not learn"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Gradual(**options)


def test_sites_that_match_nothing_name_the_nearest(program, task):
    with pytest.raises(RecipeError, match=r"inner\.weight"):
        apply(program, task, sites="iner.weight")
