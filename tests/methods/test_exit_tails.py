"""Heads of exits that are the rest of the network with fewer of its layers."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from laconic.core.errors import RecipeError
from laconic.core.task import classification
from laconic.methods.base import Context
from laconic.methods.dynamic.early_exit import EarlyExit
from laconic.program import chain
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.sites import Sites
from laconic.solvers.dynamic import exits
from laconic.solvers.dynamic.tails import shortened, tails
from laconic.solvers.layers import depth


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


class Net(nn.Module):
    """Two stages of three residual blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(*(Block(8) for _ in range(3)))
        self.down = nn.Conv2d(8, 8, 3, 2, 1)
        self.stage2 = nn.Sequential(*(Block(8) for _ in range(3)))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stage1(self.stem(x).relu())
        return self.head(self.stage2(self.down(x).relu()).mean((2, 3)))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.head.weight.mul_(20)  # sure of some answers
    made = capture(net, (torch.randn(2, 3, 8, 8),))
    made.propagate()
    return made


def at(program, *names):
    return exits.named(program, names)


def answers(program, heads, *inputs):
    """What every exit says when the heads are put into a copy of the program."""
    made = program.clone()
    nodes = exits.attach(made, heads)
    by_name = {node.name: node for node in made.graph.nodes}
    made.output_node.args = (tuple(by_name[name] for name in nodes),)
    made.recompile()
    with torch.no_grad():
        return made.run_flat(*inputs)


def test_a_rest_that_fits_is_the_network_itself(program):
    places = at(program, "stage1.1", "stage2.1")
    total = cost(program).macs
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        wanted = program(x)
    for answer in answers(program, tails(program, places, total), x):
        assert torch.equal(answer, wanted)


def test_layers_are_left_out_until_it_fits_evenly_over_the_stages(program):
    (place,) = at(program, "stage1.0")
    work = exits.Work(program)
    block = 2 * 9 * 8 * 8 * 64  # multiply-adds of a block of the first stage
    must = work.total * (1 - place.share) - 2 * block - 3 * block / 4
    x = torch.randn(5, 3, 8, 8)
    for extra, kept in (
        (0, []),
        (block / 4, ["stage2.0"]),
        (2 * block / 4, ["stage2.0", "stage2.2"]),  # of the first stage one is in front already
        (6 * block / 4, ["stage1.1", "stage2.0", "stage2.2"]),
    ):
        rest = shortened(program, place, must + extra)
        names = {layer.name for chain in depth.chains(rest) for layer in chain}
        assert names == {"stage1.0", *kept}, extra
        spent = exits.Work(rest).total - place.share * work.total
        assert spent <= must + extra + 1
        (answer,) = answers(program, tails(program, [place], must + extra), x)
        with torch.no_grad():
            assert torch.equal(answer, rest(x))


def test_what_cannot_be_left_out_is_said(program):
    (place,) = at(program, "stage1.0")
    with pytest.raises(RecipeError, match=r"behind stage1.0 0\.\d+ .* cannot be left out"):
        tails(program, [place], 10)


@pytest.mark.parametrize("backbone", ["frozen", "trained"])
def test_exits_with_tails_train_and_run_in_pieces(program, backbone):
    torch.manual_seed(1)
    x, y = torch.randn(64, 3, 8, 8), torch.randint(4, (64,))
    task = classification(train=[(x, y)])
    context = Context(task=task, original=program)
    method = EarlyExit(at=["stage1.1"], head="tail", size=0.4, backbone=backbone, steps=3, lr=0.01,
                       limits=0.5, measure="max", precision="fp32")  # fmt: skip
    outcome = method.apply(program, Sites(), context)
    made = outcome.program
    again = EarlyExit(**outcome.resolved).apply(program, Sites(), context).program
    with torch.no_grad():
        wanted = made(x)
        assert torch.equal(again(x), wanted)
        assert not torch.equal(program(x), wanted)
    held = chain.split(made)
    assert held.decides
    torch.testing.assert_close(torch.from_numpy(held.run([x.numpy()])[0]), wanted)


def test_a_tail_of_a_transformer_reads_the_padding_mask():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                        intermediate_size=32, vocab_size=50, num_labels=3)  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    ids, mask = torch.randint(50, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    program = capture(model, {"input_ids": ids, "attention_mask": mask})
    program.propagate()
    places = at(program, "bert.encoder.layer.1")
    mask[1, 4:] = 0
    flat = [ids, mask]
    with torch.no_grad():
        (wanted, *_) = program.run_flat(*flat)
    heads = tails(program, places, cost(program).macs)
    assert "attention_mask" in heads.sources
    (answer,) = answers(program, heads, *flat)
    assert torch.equal(answer, wanted)
    few = tails(program, places, 0.1 * cost(program).macs)
    (answer,) = answers(program, few, *flat)
    assert answer.shape == wanted.shape
    assert not torch.equal(answer, wanted)
