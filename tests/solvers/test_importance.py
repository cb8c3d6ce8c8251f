"""Scores against their definitions, written out with gates in eager code."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core import registry
from laconic.core.errors import DataError, RecipeError
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.solvers.channels import selection
from laconic.solvers.importance.base import Scene
from laconic.testing import zoo

ALL = ["apoz", "bn_scale", "entropy", "fisher", "geometric_median", "l1", "l2", "obs", "random", "taylor"]  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 3, 3), nn.Conv2d(6, 3, 1)
        self.gate = None

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)))
        if self.gate is not None:
            y = y * self.gate[:, :, None, None]
        return self.left(y).mean((2, 3)) + torch.tanh(self.right(y).mean((2, 3)))


def loss(outputs):
    return outputs.pow(2).sum()


@pytest.fixture
def setting():
    model = zoo.shake(Net())
    program = capture(model, torch.randn(2, 2, 6, 6))
    found = groups(program)
    group = found.find("conv.out")
    batches = [(torch.randn(3, 2, 6, 6),), (torch.randn(2, 2, 6, 6),)]
    return model, Scene(program, [group], batches, loss)


def gate_gradients(model, batches):
    rows = []
    for (x,) in batches:
        model.gate = torch.ones(len(x), 6, requires_grad=True)
        loss(model(x)).backward()
        rows.append(model.gate.grad)
    return torch.cat(rows)


def test_every_file_is_a_score():
    assert registry.names("laconic.solvers.importance") == ALL


@pytest.mark.parametrize(("name", "power", "factor"), [("taylor", 1, 1.0), ("fisher", 2, 0.5)])
def test_gradient_scores_are_those_of_a_gate(setting, name, power, factor):
    model, scene = setting
    expected = factor * gate_gradients(model, scene.batches).abs().pow(power).mean(0)
    removal = selection.load(name).removals(scene)["conv.out"]
    assert removal.order.tolist() == expected.argsort().tolist()
    assert torch.allclose(removal.harm.float(), expected.sort().values, rtol=1e-4)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_obs_counts_a_mean_that_nothing_makes_up_for(bias, norm):
    """A channel that is always 5 is free only where a bias can take its place."""
    torch.manual_seed(0)
    behind = [nn.Linear(6, 4, bias=bias), *([nn.BatchNorm1d(4)] if norm else [])]
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), *behind).eval()
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.fill_(0.5)
        model[0].weight[2], model[0].bias[2] = 0.0, 5.0
    program = capture(model, torch.randn(2, 3))
    scene = Scene(program, [groups(program).find("0.out")], [(torch.randn(64, 3),)], loss)
    removal = selection.load("obs").removals(scene)["0.out"]
    assert (int(removal.order[0]) == 2) == (bias or norm)


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_norms_are_relative_to_the_mean_of_the_group(setting, name, power):
    model, scene = setting
    sums = [
        model.conv.weight.abs().pow(power).sum((1, 2, 3)),
        model.left.weight.abs().pow(power).sum((0, 2, 3)),
        model.right.weight.abs().pow(power).sum((0, 2, 3)),
    ]
    expected = sum(s / s.mean() for s in sums).detach() / 3
    removal = selection.load(name).removals(replace(scene, batches=(), loss=None))["conv.out"]
    assert removal.order.tolist() == expected.argsort().tolist()
    assert torch.allclose(removal.harm.float(), expected.sort().values, rtol=1e-5)


def test_obs_prefers_what_the_others_can_replace(setting):
    model, scene = setting
    with torch.no_grad():  # channel 4 does what channel 1 does, with large weights behind it
        for tensor in (model.conv.weight, model.conv.bias, model.norm.weight, model.norm.bias):
            tensor[4] = tensor[1]
        model.norm.running_mean[4] = model.norm.running_mean[1]
        model.norm.running_var[4] = model.norm.running_var[1]
        model.left.weight[:, 4] *= 5
    program = capture(model, torch.randn(2, 2, 6, 6))
    batches = [(torch.randn(40, 2, 6, 6),)]
    scene = replace(
        scene, program=program, groups=[groups(program).find("conv.out")], batches=batches
    )
    removal = selection.load("obs").removals(scene)["conv.out"]
    assert int(removal.order[0]) in (1, 4)
    assert float(removal.harm[0]) < 0.05 * float(removal.harm[1])
    fisher = selection.load("fisher").removals(scene)["conv.out"]
    assert int(fisher.order[0]) not in (4,)


def test_heads_are_scored_as_blocks_and_shared_axes_by_fisher():
    program = zoo.captured("per_head")
    found = groups(program)
    scene = Scene(program, list(found), [program.example], lambda out: out.pow(2).sum())
    removals = selection.load("obs").removals(scene)
    for group in found:
        assert sorted(removals[group.name].order.tolist()) == list(range(group.size))
        assert bool(torch.isfinite(removals[group.name].harm[:-1]).all())


def test_every_group_of_a_grouped_network_gets_a_score_or_a_note():
    for model in ("grouped", "mobilenet"):
        program = zoo.captured(model)
        found = groups(program)
        scene = Scene(program, list(found), [program.example], lambda out: out.pow(2).sum())
        for name in ALL:
            if name == "bn_scale" and model == "grouped":
                continue  # has group norms only
            removals = selection.load(name).removals(scene)
            for group in found:
                noted = any(note.startswith(group.name) for note in scene.notes)
                assert group.name in removals or noted


@pytest.mark.parametrize("name", ["taylor", "fisher", "obs", "entropy", "apoz"])
def test_scores_by_gradients_or_activations_say_that_they_need_data(setting, name):
    with pytest.raises(DataError, match="calibration data"):
        selection.load(name).removals(replace(setting[1], batches=()))


def hidden(model, batches):
    with torch.no_grad():
        return torch.cat([F.relu(model.norm(model.conv(x))) for (x,) in batches])


def test_apoz_is_the_share_of_values_that_are_not_zero(setting):
    model, scene = setting
    alive = (hidden(model, scene.batches) != 0).double().mean((0, 2, 3))
    removal = selection.load("apoz").removals(scene)["conv.out"]
    assert torch.allclose(removal.harm, (alive / alive.mean()).sort().values, rtol=1e-6)
    assert torch.equal(alive[removal.order], alive.sort().values)


def test_apoz_notes_activations_that_are_never_zero():
    module, inputs = zoo.make("no_bias")  # a tanh stands between the second layer and its reader
    program = capture(module, inputs)
    scene = Scene(program, list(groups(program)), [(torch.randn(64, *inputs[0].shape[1:]),)])
    removals = selection.load("apoz").removals(scene)
    assert len(removals) == 2
    assert [note.split(":")[0] for note in scene.notes] == [scene.groups[1].name]


def test_entropy_is_that_of_the_histogram_of_each_channel(setting):
    model, scene = setting
    values = hidden(model, scene.batches)
    width = 2.0**-20
    while float(values.max()) >= 256 * width:  # the grid has 512 bins around zero
        width *= 2
    expected = []
    for channel in values.transpose(0, 1):
        share = torch.unique((channel / width).floor(), return_counts=True)[1] / channel.numel()
        expected.append(float(-(share * share.log2()).sum()))
    expected = torch.tensor(expected, dtype=torch.float64)
    removal = selection.load("entropy").removals(scene)["conv.out"]
    assert torch.allclose(removal.harm, (expected / expected.mean()).sort().values, rtol=1e-5)


def test_a_channel_that_never_moves_is_first_by_entropy_and_by_apoz(setting):
    model, scene = setting
    with torch.no_grad():
        model.norm.weight[3], model.norm.bias[3] = 0.0, -1.0
    program = capture(model, torch.randn(2, 2, 6, 6))
    scene = replace(scene, program=program, groups=[groups(program).find("conv.out")])
    for name in ("entropy", "apoz", "bn_scale"):
        removal = selection.load(name).removals(scene)["conv.out"]
        assert int(removal.order[0]) == 3
        assert float(removal.harm[0]) == 0.0


def test_geometric_median_is_the_sum_of_distances(setting):
    model, scene = setting
    rows = model.conv.weight.detach().double().flatten(1)
    distances = torch.stack([(rows - row).norm(dim=1).sum() for row in rows])
    removal = selection.load("geometric_median").removals(scene)["conv.out"]
    assert torch.allclose(removal.harm, (distances / distances.mean()).sort().values, rtol=1e-9)
    with torch.no_grad():  # a filter in the middle of all others is the first to go
        model.conv.weight[2] = model.conv.weight[[0, 1, 3, 4, 5]].mean(0)
    program = capture(model, torch.randn(2, 2, 6, 6))
    scene = replace(scene, program=program, groups=[groups(program).find("conv.out")])
    assert int(selection.load("geometric_median").removals(scene)["conv.out"].order[0]) == 2


def test_batch_norm_scales_order_channels_and_their_absence_is_noted(setting):
    model, scene = setting
    expected = model.norm.weight.detach().double().abs()
    removal = selection.load("bn_scale").removals(scene)["conv.out"]
    assert torch.equal(removal.order, expected.argsort())
    module, inputs = zoo.make("no_bias")
    program = capture(module, inputs)
    bare = Scene(program, list(groups(program)))
    with pytest.raises(RecipeError, match="none scales a group"):
        selection.load("bn_scale").removals(bare)
    module, inputs = zoo.make("plain_cnn")  # a linear layer behind two batch norms
    program = capture(module, inputs)
    mixed = Scene(program, list(groups(program)))
    assert set(selection.load("bn_scale").removals(mixed)) == {"body.0.0.out", "body.2.0.out"}
    assert mixed.notes == ["first.out: no batch norm scales it, left whole"]


def test_random_depends_on_the_seed_alone(setting):
    _, scene = setting
    orders = [
        tuple(selection.load("random").removals(replace(scene, seed=s))["conv.out"].order.tolist())
        for s in (0, 0, 1, 2, 3)
    ]
    assert orders[0] == orders[1]
    assert len(set(orders)) > 2


@pytest.mark.parametrize("model", ["per_head", "plain_cnn", "densenet"])
def test_activations_of_heads_flattened_maps_and_concatenations(model):
    program = zoo.captured(model)
    found = groups(program)
    scene = Scene(program, list(found), [program.example])
    for name in ("entropy", "apoz", "geometric_median"):
        removals = selection.load(name).removals(scene)
        for group in found:
            assert sorted(removals[group.name].order.tolist()) == list(range(group.size))
            assert bool(torch.isfinite(removals[group.name].harm).all())
