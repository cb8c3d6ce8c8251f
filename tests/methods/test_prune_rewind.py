"""prune.rewind: what goes in a round, what is gone back to, replay and resume bit for bit."""

import dataclasses
import hashlib

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from laconic import storage
from laconic.core.errors import RecipeError, StorageError
from laconic.core.progress import Progress
from laconic.core.task import classification
from laconic.methods.base import Context, method_of
from laconic.methods.distill.logits import Logits
from laconic.methods.prune.magnitude import Magnitude
from laconic.methods.prune.rewind import Rewind
from laconic.methods.quantize.static import QuantizeStatic
from laconic.program.capture import capture
from laconic.program.freezing import is_frozen
from laconic.program.sites import Sites
from laconic.solvers.teaching.rewinding import Snapshot, levels

TRAINING = {"steps": 5, "evaluations": 2, "precision": "fp32", "teacher": "torch"}
SHORT = {**TRAINING, "ratio": 0.6, "each": 0.4}
VARIANTS = {
    "rate": {},
    "rate from step 2": {"rewind_steps": 2, "scope": "tensor"},
    "weights": {"rewind": "weights", "alpha": 0.0},
    "weights of step 2": {"rewind": "weights", "rewind_steps": 2, "optimizer": "adamw", "ema": 0.5},
}
WEIGHTS = ["stem.weight", "head.weight"]


class Net(nn.Module):
    """[batch, 3, 6, 6] -> [batch, 4]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.stem(x))).mean((2, 3)))


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
    x = [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(5)]
    with torch.no_grad():
        batches = [(each, program(each).argmax(1)) for each in x]
    return classification(train=batches[:3], validation=batches[3:])


def apply(program, task, sites="*", method=Rewind, **options):
    more = {key: options.pop(key) for key in ("workdir", "progress") if key in options}
    context = Context(task=task, original=program, seed=2, **more)
    return method(**{**SHORT, **options}).apply(program, Sites.of(sites), context)


def tensors(program):
    return {name: tensor.detach().clone() for name, tensor in program.tensors()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def zeros(program):
    return torch.cat([(program.tensor(name).detach() == 0).flatten() for name in WEIGHTS])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_sparsity_is_exact_the_input_untouched_and_the_replay_bit_for_bit(
    program, task, options
):
    before = tensors(program)
    made = apply(program, task, **options)
    assert same(tensors(program), before)
    mask = zeros(made.program)
    if options.get("scope") == "tensor":
        sizes = [made.program.tensor(name).numel() for name in WEIGHTS]
        assert [int(m.sum()) for m in mask.split(sizes)] == [round(0.6 * size) for size in sizes]
    else:
        assert int(mask.sum()) == round(0.6 * len(mask))
    assert made.program.sparse == set(WEIGHTS)
    rounds = [round(entry["sparsity"], 3) for entry in made.figures["rounds"]]
    assert rounds == [0.0] * ("weights" in options.values()) + [0.4, 0.6]
    again = method_of(Rewind(**made.resolved).step(), "step 1").apply(
        program, Sites(), Context(task=task, original=program, seed=2)
    )
    assert same(tensors(again.program), tensors(made.program))
    assert again.resolved == made.resolved


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_stopped_and_resumed_equals_uninterrupted(program, task, tmp_path, options):
    told, fail_at = [], None

    def split(batch):
        told.append(0)
        if len(told) == fail_at:
            raise RuntimeError("power cut")
        return (batch[0],), batch[1]

    counted = classification(train=task.train, validation=task.validation, split=split)
    options = {"save_every": 0, **options}
    whole = apply(program, counted, **options)
    every, fail_at = len(told), len(told) - 4  # in the last round
    told.clear()
    with pytest.raises(RuntimeError, match="power cut"):
        apply(program, counted, workdir=tmp_path, **options)
    fail_at = None
    told.clear()
    again = apply(program, counted, workdir=tmp_path, **options)
    assert len(told) < every // 2  # finished rounds are taken as they are
    assert same(tensors(again.program), tensors(whole.program))
    assert again.figures["history"] == whole.figures["history"]


def test_one_round_of_rate_is_a_cut_and_a_training(program, task):
    """The same as prune.magnitude and distill.logits behind it, bit for bit."""
    made = apply(program, task, each=0.6, ratio=0.6)
    context = Context(task=task, original=program, seed=2)
    cut = Magnitude(ratio=0.6).apply(program, Sites(), context).program
    trained = Logits(**TRAINING).apply(cut, Sites(), context).program
    assert same(tensors(made.program), tensors(trained))


def test_rounds_only_ever_drop_and_take_the_smallest(program, task):
    """The run to 0.6 begins with the round that the run to 0.4 is."""
    masks = [zeros(apply(program, task, ratio=ratio).program) for ratio in (0.4, 0.6)]
    first = zeros(Magnitude(ratio=0.4).apply(
        program, Sites(), Context(task=task, original=program)
    ).program)  # fmt: skip
    assert torch.equal(masks[0], first)
    assert bool(masks[1][masks[0]].all())


def tiny(program, task, **options):
    """Steps so small that a float32 weight does not move: what it was put back to is seen."""
    return apply(program, task, lr=1e-30, weight_decay=0.0, optimizer="sgd", **options)


@pytest.mark.parametrize("kind", ["safetensors", "laconic"])
def test_weights_go_back_to_the_early_state_that_is_given(program, task, tmp_path, kind):
    early = program.clone()
    for name, tensor in program.named_parameters():
        early.set_tensor(name, torch.randn_like(tensor))
    path = tmp_path / f"early.{kind}"
    if kind == "laconic":
        storage.save(early, path)
    else:
        save_file(tensors(early), path)
    made = tiny(program, task, rewind="weights", initial=str(path), each=0.6)
    mask = zeros(made.program)
    cut = Magnitude(ratio=0.6).apply(program, Sites(), Context(task=task, original=program))
    assert torch.equal(mask, zeros(cut.program))  # judged by the given Program, once
    assert len(made.figures["rounds"]) == 1
    for name in WEIGHTS:
        weight = made.program.tensor(name)
        assert torch.equal(weight, early.tensor(name).masked_fill(weight == 0, 0.0))


def test_the_early_state_is_part_of_what_the_step_is(program, task, tmp_path):
    path = tmp_path / "early.safetensors"
    save_file(tensors(program), path)
    options = {"rewind": "weights", "initial": str(path)}
    made = apply(program, task, **options)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert made.resolved["initial_hash"] == digest
    assert Rewind(**options).files() == (str(path),)
    assert Rewind().files() == ()
    again = method_of(Rewind(**made.resolved).step(), "step 1").apply(
        program, Sites(), Context(task=task, original=program, seed=2)
    )
    assert same(tensors(again.program), tensors(made.program))
    save_file({name: tensor + 1 for name, tensor in tensors(program).items()}, path)
    with pytest.raises(RecipeError, match="is not the file that the step was resolved with"):
        apply(program, task, **options, initial_hash=digest)


def test_without_one_they_go_back_to_the_state_of_the_first_training(program, task):
    made = tiny(program, task, rewind="weights")
    for name in WEIGHTS:
        weight = made.program.tensor(name)
        assert torch.equal(weight, program.tensor(name).masked_fill(weight == 0, 0.0))


def test_the_state_after_some_steps_is_remembered(program):
    early = Snapshot(2)
    copy = program.clone().train()
    optimizer = torch.optim.SGD(copy.parameters(), lr=1.0)
    early.begin(copy, None)
    for step in (1, 2, 3):
        copy.tensor("head.bias").data.fill_(step)
        early.after(step, optimizer)
    assert early.values["head.bias"].tolist() == [2.0] * 4
    assert torch.equal(early.values["stem.weight"], program.tensor("stem.weight"))


def test_what_is_pruned_before_stays_and_counts(program, task):
    context = Context(task=task, original=program)
    first = Magnitude(ratio=0.5).apply(program, Sites(), context).program
    made = apply(first, task, rewind="weights")
    assert bool(zeros(made.program)[zeros(first)].all())
    assert [round(entry["sparsity"], 3) for entry in made.figures["rounds"]] == [0.5, 0.6]
    idle = apply(first, task, ratio=0.4)
    assert same(tensors(idle.program), tensors(first))
    assert any("zero already" in note for note in idle.notes)


def test_weights_stored_as_integers_stay_so_and_get_their_zeros(program, task):
    context = Context(task=task, original=program)
    static = QuantizeStatic(activations=False, freeze=True, bits=8, bias_correction="none")
    stored = static.apply(program, Sites(), context).program
    made = apply(stored, task, rewind="weights").program
    assert is_frozen(made)
    codes = [made.tensor(name) for name in WEIGHTS]
    assert all(not code.is_floating_point() for code in codes)
    free = sum(int((code != 0).sum()) for code in codes)
    assert free <= sum(code.numel() for code in codes) * 0.4 + 1  # small weights round to 0 too


def test_minutes_are_those_of_all_rounds_and_replay(program, task):
    made = apply(program, task, steps=None, minutes=0.01)
    assert made.resolved["minutes"] is None
    again = Rewind(**made.resolved).apply(
        program, Sites(), Context(task=task, original=program, seed=2)
    )
    assert same(tensors(again.program), tensors(made.program))


def test_progress_names_the_rounds(program, task):
    said = []

    class Told(Progress):
        def say(self, text):
            said.append(text)

    apply(program, task, progress=Told())
    assert said == [
        "round 1 of 2: 40.0% of the weights are zero",
        "round 2 of 2: 60.0% of the weights are zero",
    ]


def test_what_every_round_says_stands_once(program, task, monkeypatch):
    learn = Rewind.learn

    def noting(self, *args, **options):
        return dataclasses.replace(learn(self, *args, **options), notes=["said"])

    monkeypatch.setattr(Rewind, "learn", noting)
    outcome = apply(program, task)
    assert [note for note in outcome.notes if "said" in note] == ["round 1: said"]


def test_levels():
    assert levels(0.0, 0.0, 0.2) == []
    assert levels(0.5, 0.4, 0.2) == []
    assert levels(0.0, 0.9, 0.5) == [0.5, 0.75, 0.875, 0.9]
    assert levels(0.0, 0.75, 0.5) == [0.5, 0.75]
    assert levels(0.75, 0.9, 0.5) == [0.875, 0.9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "less than 1"),
        ({"each": 0.0}, "greater than 0"),
        ({"initial": "a.safetensors"}, "initial is for rewind: weights"),
        ({"initial_hash": "0"}, "initial_hash is that of initial"),
        ({"steps": 5, "rewind_steps": 5}, "rewind_steps 5 leaves none of the 5 steps"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Rewind(**options)


def test_an_early_state_that_does_not_fit_is_refused(program, task, tmp_path):
    path = tmp_path / "early.safetensors"
    with pytest.raises(StorageError, match=r"early\.safetensors: cannot be read"):
        apply(program, task, rewind="weights", initial=str(path))
    held = tensors(program)
    save_file({**held, "head.weight": torch.zeros(3, 6)}, path)
    with pytest.raises(RecipeError, match=r"shape \[3, 6\], the program's \[4, 6\]"):
        apply(program, task, rewind="weights", initial=str(path))
    held["head.wait"] = held.pop("head.weight")
    save_file(held, path)
    with pytest.raises(RecipeError, match=r"no tensor 'head.weight' .*head\.wait"):
        apply(program, task, rewind="weights", initial=str(path))


def test_rewinding_behind_the_end_is_refused(program, task):
    with pytest.raises(RecipeError, match="rewind_steps 3 leaves none of the 3 steps"):
        apply(program, task, steps=None, epochs=1, rewind_steps=3)
