"""Regions: where a graph can be cut, and that running them gives what the graph gives."""

import pytest
import torch
from torch import nn

from laconic.program.capture import capture
from laconic.solvers.quantization.regions import MOST, regions, run
from laconic.statistics.layers import layers
from laconic.statistics.walk import Order, Walk
from laconic.testing import zoo


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        return torch.relu(x + self.two(torch.relu(self.one(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.blocks(torch.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all those before it, so nothing can be cut."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 + i, 1) for i in range(MOST + 2))
        self.head = nn.Linear(4 + MOST + 2, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.head(x)


def found(module, example):
    program = capture(module.eval(), (example,))
    return program, regions(program, layers(program))


def names(region):
    return [layer.weight for layer in region.layers]


def test_residual_blocks_and_what_stands_alone():
    _, made = found(Net(), torch.randn(2, 3, 8, 8))
    assert [names(region) for region in made] == [
        ["stem.weight"],
        ["blocks.0.one.weight", "blocks.0.two.weight"],
        ["blocks.1.one.weight", "blocks.1.two.weight"],
        ["head.weight"],
    ]
    assert "relu" in made[0].target.name  # the activation function belongs to its layer
    assert made[1].source is made[0].target


def test_without_cuts_layer_by_layer():
    _, made = found(Dense(), torch.randn(2, 4))
    assert [len(region.layers) for region in made] == [1] * (MOST + 3)


@pytest.mark.parametrize(
    "model",
    ["plain_cnn", "resnet", "padded_shortcut", "densenet", "unet", "two_outputs", "shared_module",
     "fused_split", "rotary", "windows", "tied_language_model"],
)  # fmt: skip
def test_each_region_gives_what_the_graph_gives(model):
    module, inputs = zoo.make(model)
    program = capture(module, inputs)
    held = layers(program)
    made = regions(program, held)
    assert sorted(n for r in made for n in names(r)) == sorted(x.weight for x in held)
    order, whole = Order(program), Walk(program, program.example)
    with torch.no_grad():
        whole.run(len(order.nodes), hold=order.nodes)
        for region in made:
            inputs = {node: whole.values[node] for node in (region.source, *region.sides)}
            assert torch.equal(run(program, order, region, inputs, {}), whole.values[region.target])


def test_replaced_tensors_get_gradients_and_the_program_stays():
    program, made = found(Net(), torch.randn(2, 3, 8, 8))
    region = made[1]
    x = torch.randn(2, 4, 8, 8)
    weight = program.tensor("blocks.0.one.weight")
    before = weight.detach().clone()
    moved = (before + 0.1).requires_grad_()
    out = run(program, Order(program), region, {region.source: x}, {"blocks.0.one.weight": moved})
    out.square().mean().backward()
    assert moved.grad is not None
    assert bool(moved.grad.any())
    assert torch.equal(program.tensor("blocks.0.one.weight"), before)
    program.set_tensor("blocks.0.one.weight", moved.detach())
    with torch.no_grad():
        torch.testing.assert_close(
            run(program, Order(program), region, {region.source: x}, {}), out.detach()
        )
