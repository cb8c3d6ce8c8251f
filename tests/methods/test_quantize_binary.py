"""quantize.binary: signs that train, in a graph that is led past them; codes of one bit after."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from laconic import runtimes, storage
from laconic.core.errors import DataError, RecipeError
from laconic.core.task import classification
from laconic.forms.levels import Levels
from laconic.methods.base import Context, method_of
from laconic.methods.distill.logits import Logits
from laconic.methods.quantize.binary import QuantizeBinary
from laconic.program.capture import capture
from laconic.program.freezing import form_of, freeze, is_frozen
from laconic.program.normalize import base_name
from laconic.program.program import FAKE_LEVELS
from laconic.program.sites import Sites
from laconic.solvers.quantization import binary_layers, placement
from laconic.solvers.quantization.binary_grids import BinaryGrids
from laconic.solvers.quantization.weight_sites import weight_sites

SHORT = {
    "steps": 8, "evaluations": 2, "precision": "fp32", "teacher": "torch", "samples": 16,
    "lr": 0.01, "first": 0.5,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "weights": {"activations": False},
    "tanh": {"estimator": "tanh", "balanced": False},
    "as it is": {"prelu": False, "shortcuts": False, "first": 0.0, "ema": 0.8},
    "adamw": {"optimizer": "adamw", "fold": False, "accumulate": 2},
}
ONE_BIT = ["a.weight", "b.weight", "down.weight"]


class Net(nn.Module):
    """[batch, 3, 8, 8] -> [batch, 4]: a residual block of two convolutions, and a third."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.down, self.bn3 = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn0(self.stem(x)))
        y = torch.relu(self.bn1(self.a(x)))
        x = torch.relu(self.bn2(self.b(y)) + x)
        return self.head(torch.relu(self.bn3(self.down(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.head.weight.mul_(20)
        net.bn1.weight[2] *= -1
        net.bn3.running_mean.normal_()
    return capture(net.eval(), torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def task(program):
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(6)]
    with torch.no_grad():
        batches = [(each, program(each).argmax(1)) for each in x]
    return classification(train=batches[:4], validation=batches[4:])


def apply(program, task, sites="*", workdir=None, **options):
    context = Context(task=task, original=program, seed=2, workdir=workdir)
    return QuantizeBinary(**{**SHORT, **options}).apply(program, Sites.of(sites), context)


def tensors(program):
    return {name: tensor.detach().clone() for name, tensor in program.tensors()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def outputs(program, x):
    with torch.no_grad():
        return program(x)


def images(count=5, seed=4):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def signs(program):
    """Nodes that give one bit: of weights, of activations."""
    nodes = [node for node in program.graph.nodes if node.target is FAKE_LEVELS]
    stored = [node for node in nodes if node.args[0].op == "get_attr"]
    return len(stored), len(nodes) - len(stored)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_replay_is_bit_for_bit_and_weights_have_one_bit(program, task, options):
    before = tensors(program)
    made = apply(program, task, **options)
    assert same(tensors(program), before)
    assert signs(made.program) == (3, 3 if options.get("activations", True) else 0)
    for name in ONE_BIT:
        held = form_of(made.program, name)
        assert isinstance(held, Levels)
        assert held.name == "binary"
        assert bool((held.scale > 0).all())
    left = {base_name(node) for node in made.program.graph.nodes}
    assert not left & {"detach", "tanh", "rsqrt", "type_as"}  # what only training needs
    assert not [n for n, _ in made.program.tensors() if n.startswith("binary.")]
    assert ("batch_norm" in left) is (options.get("fold") is False)
    assert ("prelu" in left) is (options.get("activations", True) and options.get("prelu", True))
    again = method_of(QuantizeBinary(**made.resolved).step(), "step 1").apply(
        program, Sites(), Context(task=task, original=program, seed=2)
    )
    assert same(tensors(again.program), tensors(made.program))
    assert again.resolved == made.resolved


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("part", [0.5, 0.85], ids=["first step", "second step"])
def test_stopped_and_resumed_equals_uninterrupted(program, task, resumes, options, part):
    options = {"save_every": 0, **options}
    resumes(lambda held, **more: apply(program, held, **options, **more), task, part)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_frozen_and_stored_give_the_same_bits_and_train_on(program, task, tmp_path, options):
    made = apply(program, task, **options).program
    frozen = freeze(made)
    assert is_frozen(frozen)
    storage.save(frozen, tmp_path / "frozen.laconic")
    loaded = storage.load(tmp_path / "frozen.laconic")
    x = images()
    assert torch.equal(outputs(frozen, x), outputs(made, x))
    assert torch.equal(outputs(loaded, x), outputs(made, x))
    context = Context(task=task, original=program)
    after = Logits(steps=2, teacher="torch", lr=0.05).apply(made, Sites(), context).program
    assert not torch.equal(after.tensor("a.weight"), made.tensor("a.weight"))
    assert signs(after) == signs(made)


def test_a_weight_takes_one_bit_in_a_form(program, task):
    made = freeze(apply(program, task).program)
    for name in ONE_BIT:
        held = form_of(made, name)
        scales = 4 * held.scale.numel()
        assert held.nbytes() == (program.tensor(name).numel() + 7) // 8 + scales


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("options", [{}, {"activations": False}], ids=["w1a1", "w1"])
def test_runtimes_agree(program, task, tmp_path, name, options):
    pytest.importorskip(name)
    made = apply(program, task, **options).program
    runtime = runtimes.get(name)
    path = runtime.write(made, tmp_path / f"m{runtime.suffix}", "fp32")
    x = images(64)
    (found,) = runtime.load(path, "fp32", 1).run([x.numpy()])
    wanted = outputs(made, x).numpy()
    # a sum next to zero may fall on the other side there: few signs of many
    assert np.median(np.abs(found - wanted)) < 1e-4 * np.abs(wanted).max()
    assert np.abs(found - wanted).mean() < 0.01 * np.abs(wanted).max()


def test_the_trained_value_is_sign_times_scale_and_the_gradient_goes_through():
    """y = scale * sign(flat(w)); dy/dflat = scale, and of a scale the sum of its signs."""
    torch.manual_seed(0)
    for balanced in (True, False):
        net = nn.Linear(5, 3, bias=False)
        made = capture(net, torch.randn(2, 5))
        (site,) = weight_sites(made)[0]
        held = binary_layers.insert_weight(made, site, "straight", balanced=balanced)
        made.recompile()
        made.train()
        eye = torch.eye(5)
        value = made(eye).T
        weight, scale = made.tensor("weight"), made.tensor(held.scale)
        flat = binary_layers.balanced(weight, 0) if balanced else weight
        assert torch.equal(value, torch.where(flat >= 0, 1.0, -1.0) * scale[:, None])
        assert torch.allclose(scale, weight.abs().mean(1))
        upper = torch.randn(3, 5)
        (value * upper).sum().backward()
        (wanted,) = torch.autograd.grad((flat * scale.detach()[:, None] * upper).sum(), [weight])
        assert torch.allclose(weight.grad, wanted, atol=1e-6)
        assert torch.allclose(scale.grad, (value / scale[:, None] * upper).sum(1), atol=1e-5)
        before = outputs(made, eye)
        binary_layers.settle(made, [held], [], even=balanced)
        assert torch.equal(outputs(made, eye), before)


def test_the_sharpening_gradient_is_that_of_the_tanh():
    torch.manual_seed(0)
    made = capture(nn.Linear(5, 3, bias=False), torch.randn(2, 5))
    (site,) = weight_sites(made)[0]
    held = binary_layers.insert_weight(made, site, "tanh", balanced=False)
    made.recompile()
    made.train()
    buffers = dict(made.named_buffers())
    buffers["binary.sharpness"].fill_(3.0)
    buffers["binary.height"].fill_(0.7)
    made(torch.eye(5)).sum().backward()
    weight, scale = made.tensor("weight"), made.tensor(held.scale).detach()
    slope = 0.7 * 3.0 * (1 - torch.tanh(3.0 * weight.detach()) ** 2) * scale[:, None]
    assert torch.allclose(weight.grad, slope, atol=1e-6)


def test_gradients_of_a_binary_activation_are_those_of_its_definition():
    """y = a sign(x - s): dy/dx = 1 for |x - s| <= a and 0 beyond, dy/ds = -dy/dx, LSQ's for a.

    With "tanh" y = a sign(k tanh(t (x - s))), with the slope of the tanh in between.
    """
    for estimator in ("straight", "tanh"):
        torch.manual_seed(0)
        made = capture(nn.Conv2d(3, 2, 1, bias=False).eval(), torch.randn(2, 3, 4, 4)).clone()
        made.propagate()
        (place,) = placement.places(made, weight_sites(made)[0], [])
        shift, scale = torch.tensor([0.3, -0.2, 0.0]), torch.tensor(0.8)
        step = binary_layers.insert_activation(made, place, shift, scale, estimator)
        made.recompile()
        made.train()
        sharp, height = 2.0, 0.7
        if estimator == "tanh":
            held = dict(made.named_buffers())
            held["binary.sharpness"].fill_(sharp)
            held["binary.height"].fill_(height)
        x = torch.randn(5, 3, 4, 4).requires_grad_()
        upper = torch.randn(5, 2, 4, 4)
        (made(x) * upper).sum().backward()
        weight = made.tensor("weight").detach()
        grad = torch.nn.functional.conv_transpose2d(upper, weight)  # at what is rounded
        moved, slope = x.detach() - shift[:, None, None], torch.ones_like(grad)
        if estimator == "tanh":
            slope = height * sharp * (1 - torch.tanh(sharp * moved) ** 2)
            moved = height * torch.tanh(sharp * moved)
        inside = moved.abs() <= scale
        assert int(inside.sum()) > 0
        torch.testing.assert_close(x.grad, grad * inside * slope)
        by_shift = made.tensor(f"activations.{place.name}_shift").grad
        torch.testing.assert_close(by_shift, -(grad * inside * slope).sum((0, 2, 3)))
        signs = torch.where(moved >= 0, 1.0, -1.0)
        by_scale = (grad * (signs - torch.where(inside, moved / scale, 0.0))).sum()
        torch.testing.assert_close(made.tensor(step.scale).grad, by_scale, rtol=1e-4, atol=1e-4)


def test_weights_are_floats_first_and_bits_from_then_on(program, task, monkeypatch):
    seen = []
    real = BinaryGrids.after

    def after(self, step, optimizer):
        seen.append((step, self._floats))
        real(self, step, optimizer)

    monkeypatch.setattr(BinaryGrids, "after", after)
    made = apply(program, task, first=0.5, evaluations=8)
    assert [floats for _, floats in seen] == [True] * 4 + [False] * 4
    assert made.figures["best_step"] >= 4
    seen.clear()
    apply(program, task, activations=False)  # nothing to do first
    assert not any(floats for _, floats in seen)


def test_every_convolution_has_a_shortcut_where_shapes_allow(program, task):
    """a: its own input; b: the block's sum takes a's output; down: another shape, none."""
    made = apply(program, task)
    assert made.figures["shortcuts"] == 2
    sums = [n for n in made.program.graph.nodes if base_name(n) == "add"]
    plain = apply(program, task, shortcuts=False)
    less = [n for n in plain.program.graph.nodes if base_name(n) == "add"]
    assert plain.figures["shortcuts"] == 0
    assert len(sums) == len(less) + 1


def test_prelu_of_slope_0_is_the_relu(program):
    made = program.clone()
    x = images()
    relu = next(node for node in made.graph.nodes if base_name(node) == "relu")
    binary_layers.soften(made, relu)
    made.recompile()
    made.tensor(f"activations.{relu.name}_slope").data.zero_()
    assert torch.equal(outputs(made, x), outputs(program, x))


def test_the_loss_falls(program, task):
    bare = classification(train=task.train)
    made = apply(program, bare, steps=150, evaluations=5, lr=0.02, first=0.2)
    losses = [entry["loss"] for entry in made.figures["history"] if entry["loss"] is not None]
    assert losses[-1] < 0.7 * losses[0]


def test_sites_first_and_last_and_what_cannot_be(program, task):
    made = apply(program, task, sites=["a", "b"], first_last=None).program
    assert signs(made) == (2, 2)
    whole = apply(program, task, first_last=None).program
    assert signs(whole) == (5, 5)
    with pytest.raises(RecipeError, match="down"):
        apply(program, task, sites="donw")
    with pytest.raises(ValidationError, match="compile"):
        QuantizeBinary(compile=True)
    lone = apply(program, task, sites="stem")
    assert any("no weight is left" in note for note in lone.notes)
    broken = [(torch.full((8, 3, 8, 8), float("nan")), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(DataError, match="x"):
        apply(program, classification(train=broken))
