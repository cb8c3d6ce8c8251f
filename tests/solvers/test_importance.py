"""Scores against their definitions, written out with gates in eager code."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core import registry
from laconic.core.errors import DataError
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.solvers import selection
from laconic.solvers.importance.base import Scene
from laconic.testing import zoo


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
    assert registry.names("laconic.solvers.importance") == ["fisher", "l1", "l2", "obs", "taylor"]


@pytest.mark.parametrize(("name", "power", "factor"), [("taylor", 1, 1.0), ("fisher", 2, 0.5)])
def test_gradient_scores_are_those_of_a_gate(setting, name, power, factor):
    model, scene = setting
    expected = factor * gate_gradients(model, scene.batches).abs().pow(power).mean(0)
    removal = selection.load(name).removals(scene)["conv.out"]
    assert removal.order.tolist() == expected.argsort().tolist()
    assert torch.allclose(removal.harm.float(), expected.sort().values, rtol=1e-4)


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
    module, inputs = zoo.make("per_head")
    program = capture(module, inputs)
    found = groups(program)
    scene = Scene(program, list(found), [program.example], lambda out: out.pow(2).sum())
    removals = selection.load("obs").removals(scene)
    for group in found:
        assert sorted(removals[group.name].order.tolist()) == list(range(group.size))
        assert bool(torch.isfinite(removals[group.name].harm[:-1]).all())


def test_every_group_of_a_grouped_network_gets_a_score_or_a_note():
    for model in ("grouped", "mobilenet"):
        module, inputs = zoo.make(model)
        program = capture(module, inputs)
        found = groups(program)
        scene = Scene(program, list(found), [program.example], lambda out: out.pow(2).sum())
        for name in ("fisher", "obs", "l1"):
            removals = selection.load(name).removals(scene)
            for group in found:
                noted = any(note.startswith(group.name) for note in scene.notes)
                assert group.name in removals or noted


@pytest.mark.parametrize("name", ["taylor", "fisher", "obs"])
def test_scores_by_gradients_say_that_they_need_data(setting, name):
    with pytest.raises(DataError, match="calibration data"):
        selection.load(name).removals(replace(setting[1], batches=()))
