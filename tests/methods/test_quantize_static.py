"""quantize.static: where nodes stand, what they cost, what it refuses."""

import functools

import pytest
import torch
from torch import nn

from laconic.core.errors import RecipeError
from laconic.core.task import Task, classification
from laconic.forms.affine import Affine
from laconic.methods.base import Context
from laconic.methods.quantize.static import QuantizeStatic
from laconic.program.capture import capture
from laconic.program.freezing import form_of, freeze
from laconic.program.program import DEQUANTIZE, FAKE_QUANTIZE
from laconic.program.sites import Sites
from laconic.testing import zoo

aten = torch.ops.aten


def task_of(batches):
    return Task(
        loss=lambda o, t: o.sum(),
        metric=lambda o, t: o.flatten(1).sum(1),
        calibration=batches,
        split=lambda batch: (batch, None),
    )


def quantize(program, batches, sites="*", **options):
    context = Context(task=task_of(batches), original=program)
    return QuantizeStatic(**options).apply(program, Sites.of(sites), context)


def images(generator, shape=(16, 3, 8, 8), batches=2):
    return [(torch.randn(shape, generator=generator),) for _ in range(batches)]


def quantised_inputs(program):
    """Operator → for each argument: behind a quantisation node or not (views looked through)."""
    found = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target not in (FAKE_QUANTIZE, DEQUANTIZE):
            marks = []
            for source in node.args:
                while isinstance(source, torch.fx.Node) and source.target in (
                    aten.reshape.default, aten.view.default, aten.transpose.int,
                    aten.max_pool2d.default, aten.flatten.using_ints, aten.permute.default,
                ):  # fmt: skip
                    source = source.args[0]
                known = isinstance(source, torch.fx.Node)
                marks.append(known and source.target in (FAKE_QUANTIZE, DEQUANTIZE))
            found[node.name] = tuple(marks)
    return found


class Residual(nn.Module):
    """conv-bn-relu-conv-bn + shortcut, relu, pool, linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.bn2(self.two(torch.relu(self.bn1(self.one(x)))))
        return self.head(torch.relu(x + y).mean((2, 3)))


class Block(nn.Module):
    """A post-norm transformer layer."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(50, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, ids):
        x = self.embed(ids)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.norm1(x + self.out(y.transpose(1, 2).reshape(b, n, c)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


# placement ----------------------------------------------------------------------------------


def test_nodes_stand_where_a_runtime_wants_them_in_a_residual_network(generator):
    data = images(generator)
    outcome = quantize(capture(zoo.shake(Residual()), data[0]), data)
    inputs = quantised_inputs(outcome.program)
    assert inputs["conv2d"][:3] == (True, True, False)
    assert inputs["conv2d_1"][:3] == inputs["conv2d_2"][:3] == (True, True, False)
    assert inputs["linear"] == (True, True, False)
    assert inputs["add"] == (True, True)
    assert inputs["mean"][0]
    assert all(inputs[name] == (False,) for name in inputs if name.startswith("relu"))
    assert not any(n.target is aten.batch_norm.default for n in outcome.program.graph.nodes)
    # the tensor that goes to a convolution and around it has one node, not two
    stem = next(n for n in outcome.program.graph.nodes if n.name == "relu")
    (reader,) = stem.users
    assert reader.target is FAKE_QUANTIZE and len(reader.users) == 2
    assert outcome.figures["activations"] == 6 and outcome.figures["weights"] == 4
    # signed around zero, unsigned behind a relu
    ends = {n.args[0].name: n.args[4:] for n in outcome.program.graph.nodes
            if n.target is FAKE_QUANTIZE and n.args[3] is None}  # fmt: skip
    assert ends["x"] == ends["conv2d_2"] == (-128, 127)
    assert ends["relu"] == ends["relu_1"] == (0, 255)


def test_nodes_stand_where_a_runtime_wants_them_in_a_transformer(generator):
    data = [(torch.randint(0, 50, (8, 6), generator=generator),) for _ in range(3)]
    program = capture(zoo.shake(Block()), data[0])
    outcome = quantize(program, data, smoothing=None)
    inputs = quantised_inputs(outcome.program)
    for name in ("linear", "linear_1", "linear_2", "linear_3"):
        assert inputs[name] == (True, True, False), name
    assert not any(inputs[name][0] for name in inputs if name.startswith(("layer_norm", "gelu")))
    assert not any(any(inputs[name]) for name in inputs if name.startswith("add"))
    attention = next(n for n in outcome.program.graph.nodes if "attention" in n.name)
    assert [source.target is FAKE_QUANTIZE for source in attention.args[:3]] == [True, True, False]
    table = next(n for n in outcome.program.graph.nodes if n.name == "embedding")
    assert table.args[0].target is FAKE_QUANTIZE and table.args[0].args[3] == 0


def test_inputs_of_a_concatenation_share_a_grid(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.last(torch.cat([self.one(x), self.two(x) * 1 + 5], 1))

    data = images(generator)
    outcome = quantize(capture(zoo.shake(Net()), data[0]), data)
    cat = next(n for n in outcome.program.graph.nodes if n.target is aten.cat.default)
    grids = [
        [outcome.program.tensor(side.target) for side in source.args[1:3]] for source in cat.args[0]
    ]
    assert all(source.target is FAKE_QUANTIZE for source in cat.args[0])
    assert torch.equal(grids[0][0], grids[1][0]) and torch.equal(grids[0][1], grids[1][1])
    (reader,) = cat.users
    assert reader.target is aten.conv2d.default


def test_excluded_sites_stay_float(generator):
    data = images(generator)
    program = capture(zoo.shake(Residual()), data[0])
    outcome = quantize(program, data, ["*", "!one", "!*add*"])
    names = set(outcome.program.state_dict())
    assert "two.weight_scale" in names and "one.weight_scale" not in names
    inputs = quantised_inputs(outcome.program)
    assert inputs["add"] == (False, False)
    assert inputs["conv2d_1"][:2] == (False, False) and inputs["conv2d_2"][:2] == (True, True)
    only = quantize(program, data, "head")
    assert only.figures["weights"] == 1
    with pytest.raises(RecipeError, match="head"):
        quantize(program, data, "heda.weight")


def test_weights_only_and_activations_only(generator):
    data = images(generator)
    program = capture(zoo.shake(Residual()), data[0])
    weights = quantize(program, data, activations=False)
    assert weights.figures["activations"] == 0
    assert not any("activations." in name for name in weights.program.state_dict())
    activations = quantize(program, data, weights=False)
    assert activations.figures["weights"] == 0
    assert not any(name.endswith("weight_scale") for name in activations.program.state_dict())


# numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_stand_on_a_symmetric_grid_of_the_asked_bits(bits, per_channel, generator):
    data = images(generator)
    program = capture(zoo.shake(Residual()), data[0])
    options = {"bits": bits, "per_channel": per_channel, "bias_correction": "none"}
    made = quantize(program, data, skip_above=None, weight_range="minmax", **options).program
    form = form_of(made, "two.weight")
    assert isinstance(form, Affine)
    assert form.qmax == 2 ** (bits - 1) - 1 == -form.qmin
    assert form.scale.shape == ((8,) if per_channel else ())
    assert not form.zero_point.any()
    weight = made.tensor("two.weight").detach()
    step = form.scale.reshape(-1, 1, 1, 1)
    assert bool(((form.decode() - weight).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_steps_can_be_powers_of_two(symmetric, generator):
    data = images(generator)
    program = capture(zoo.shake(Residual()), data[0])
    outcome = quantize(program, data, power_of_two=True, symmetric=symmetric)
    steps = [t for n, t in outcome.program.tensors() if n.endswith("_scale")]
    assert len(steps) == 10
    assert all(bool((torch.frexp(step)[0] == 0.5).all()) for step in steps)
    with torch.no_grad():
        wanted, found = program(*data[0]), outcome.program(*data[0])
    assert (found - wanted).square().sum() < 1e-2 * wanted.square().sum()


def test_least_error_ranges_never_lose_to_extremes(generator):
    data = images(generator)
    program = capture(zoo.shake(Residual()), data[0])
    error = {}
    for rule in ("minmax", "mse"):
        made = quantize(program, data, bits=3, weight_range=rule, skip_above=None).program
        off = form_of(made, "one.weight").decode() - made.tensor("one.weight").detach()
        error[rule] = off.square().flatten(1).sum(1)
    assert bool((error["mse"] <= error["minmax"] * (1 + 1e-6)).all())
    assert error["mse"].sum() < 0.95 * error["minmax"].sum()


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse", "entropy"])
def test_every_range_rule_keeps_the_outputs_close(rule, generator):
    data = images(generator, (32, 3, 8, 8))
    program = capture(zoo.shake(Residual()), data[0])
    made = quantize(program, data, range=rule).program
    with torch.no_grad():
        wanted, found = program(*data[0]), made(*data[0])
    assert (found - wanted).square().sum() < 2e-3 * wanted.square().sum()


def test_means_are_corrected(generator):
    model = zoo.shake(Residual())
    data = [(torch.randn(64, 3, 8, 8, generator=generator) + 1,) for _ in range(4)]
    program = capture(model, data[0])
    x = torch.cat([batch[0] for batch in data])
    off = {}
    with torch.no_grad():
        for rule in ("none", "analytic", "empirical"):
            made = quantize(program, data, bits=3, bias_correction=rule, skip_above=None).program
            off[rule] = float((made(x) - program(x)).mean(0).abs().mean())
    assert off["analytic"] < 0.7 * off["none"]
    assert off["empirical"] < 0.05 * off["none"]


@pytest.mark.parametrize("kind", ["empirical", "analytic"])
def test_bias_correction_is_exact_for_one_layer(kind, generator):
    """Without padding the mean output of a quantised layer equals the float one's."""
    layers = [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, padding=2, groups=2),
              nn.Conv2d(4, 6, 1, bias=False)]  # fmt: skip
    for layer in layers:
        model = zoo.shake(nn.Sequential(layer))
        data = [(torch.rand(8, 4, 9, 9, generator=generator),)]
        if isinstance(layer, nn.ConvTranspose2d):
            data = [(torch.rand(8, 4, 1, 1, generator=generator).expand(8, 4, 9, 9) * 1.0,)]
        program = capture(model, data[0])
        options = {"bits": 3, "activations": False, "bias_correction": kind}
        made = quantize(program, data, **options).program
        with torch.no_grad():
            wanted, found = program(*data[0]), made(*data[0])
        if kind == "empirical" or layer.kernel_size == (1, 1) or layer.transposed:
            off = (found - wanted).mean((0, 2, 3)).abs().max()
            assert off < 1e-5 * wanted.abs().max()


def test_smoothing_keeps_the_function_and_moves_outliers_into_weights(generator):
    model = zoo.shake(Block())
    with torch.no_grad():
        model.norm1.weight[3] *= 60
        model.up.weight[:, 3] /= 60
    data = [(torch.randint(0, 50, (8, 6), generator=generator),) for _ in range(4)]
    program = capture(model, data[0])
    error = {}
    with torch.no_grad():
        wanted = program(*data[0])
        for strength in (None, 0.85):
            options = {"weight_range": "minmax", "bias_correction": "none", "skip_above": None}
            outcome = quantize(program, data, "up", smoothing=strength, **options)
            error[strength] = float((outcome.program(*data[0]) - wanted).square().mean())
            assert bool(outcome.figures["smoothed"]) == (strength is not None)
    assert error[0.85] < 0.25 * error[None]
    # the layer norm is read by the residual as well, so the division is a node of its own
    made = outcome.program
    assert any(name.startswith("smoothing.") for name in made.state_dict())
    up = next(n for n in made.graph.nodes if n.name == "linear_2")
    assert up.args[0].args[0].target is aten.mul.Tensor


# training, freezing, replay -------------------------------------------------------------------


def test_the_program_trains_on_and_scales_take_gradients(generator):
    data = images(generator)
    program = capture(zoo.shake(Residual()), data[0])
    made = quantize(program, data).program.train()
    scales = [t for n, t in made.tensors() if n.endswith("_scale")]
    for scale in scales:
        scale.requires_grad_()
    made(*data[0]).square().mean().backward()
    for scale in scales:
        assert scale.grad is not None and bool(scale.grad.isfinite().all())
        assert bool((scale.grad != 0).any())
        scale.requires_grad_(False)
    optimizer = torch.optim.SGD(made.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = made(*data[0]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_frozen_has_integer_weights_and_the_same_outputs(generator):
    data = images(generator)
    program = capture(zoo.shake(Residual()), data[0])
    made, frozen = quantize(program, data).program, quantize(program, data, freeze=True).program
    assert frozen.tensor("one.weight").dtype == torch.int8
    assert torch.equal(made(*data[0]), frozen(*data[0]))
    assert torch.equal(freeze(made)(*data[0]), frozen(*data[0]))


def test_the_resolved_step_replays_bit_for_bit_and_needs_no_ranges(generator):
    data = images(generator)
    program = capture(zoo.shake(Residual()), data[0])
    first = quantize(program, data, range="entropy", skip_above=1e-9)
    assert first.resolved["keep_float"]
    again = QuantizeStatic(**first.resolved).apply(
        program, Sites(), Context(task=task_of(data), original=program)
    )
    assert str(again.program.graph) == str(first.program.graph)
    for name, tensor in first.program.state_dict().items():
        assert torch.equal(tensor, again.program.state_dict()[name]), name
    other = capture(zoo.shake(Block()), (torch.zeros(2, 6, dtype=torch.long),))
    with pytest.raises(RecipeError, match="no range for"):
        QuantizeStatic(**first.resolved).apply(
            other, Sites(), Context(task=task_of([other.example]), original=other)
        )


def test_the_result_exports(generator):
    data = images(generator)
    made = quantize(capture(zoo.shake(Residual()), data[0]), data).program
    for program in (made, freeze(made)):
        exported = torch.export.export(program.as_graph_module(), tuple(program.example))
        assert torch.equal(exported.module()(*program.example)[0], made(*program.example))


def test_tensors_are_named_beside_what_they_quantise(generator):
    data = images(generator)
    made = quantize(capture(zoo.shake(Residual()), data[0]), data).program
    names = set(made.state_dict())
    wanted = {"one.weight", "one.weight_scale", "one.weight_zero_point", "activations.relu_scale",
              "activations.relu_zero_point", "activations.x_scale"}  # fmt: skip
    assert wanted <= names
    assert made.tensor("one.weight_zero_point").dtype == torch.int32


def test_quantising_twice_adds_nothing(generator):
    data = images(generator)
    once = quantize(capture(zoo.shake(Residual()), data[0]), data).program
    twice = quantize(once, data)
    assert torch.equal(once(*data[0]), twice.program(*data[0]))
    assert "nothing to quantise" in twice.notes[-1]


# the real network -----------------------------------------------------------------------------


@functools.cache
def _resnet(folder):
    from benchmarks import data, models

    model = models.cifar_resnet(20, folder / "resnet_cifar10" / "resnet20.safetensors")
    program = capture(model, torch.zeros(2, 3, 32, 32))
    calibration = data.batches(data.cifar10("train", folder)[:128], 64)
    task = classification(calibration=calibration)
    return program, task, data.cifar10("validation", folder)[:400]


@pytest.mark.data
def test_int8_resnet20_agrees_with_float_on_real_images(data_dir):
    program, task, images = _resnet(data_dir)
    outcome = QuantizeStatic(samples=128).apply(
        program, Sites(), Context(task=task, original=program)
    )
    assert outcome.notes == [] and outcome.figures["activations"] == 30
    x = images.tensor()
    with torch.no_grad():
        wanted, found = program(x), outcome.program(x)
    agreement = (wanted.argmax(1) == found.argmax(1)).float().mean()
    assert agreement >= 0.97
    right = [(logits.argmax(1) == images.labels).float().mean() for logits in (wanted, found)]
    assert right[1] >= right[0] - 0.015
    assert (found - wanted).square().sum() < 5e-3 * wanted.square().sum()
