"""What `share.layers` promises: ties and bases that are exact where layers are, fewer parameters."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from laconic.core.errors import RecipeError
from laconic.engine.writeback import write_back
from laconic.methods.base import Context, method_class
from laconic.methods.share.layers import Layers
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.freezing import form_of
from laconic.program.groups import groups
from laconic.program.program import COMBINE
from laconic.program.sites import Sites
from laconic.program.surgery import cut
from laconic.runtimes._export import lower_weights
from laconic.testing.contracts import own_outputs
from laconic.testing.masked import masked


class Stack(nn.Module):
    """Four residual layers of one shape, and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


NAMES = [f"layers.{i}.weight" for i in range(4)]


def setting(change=None):
    torch.manual_seed(0)
    model = Stack().eval()
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            if change is not None:
                layer.weight.copy_(change(number, [each.weight for each in model.layers]))
    program = capture(model, torch.randn(2, 12))
    return model, program, Context(task=own_outputs(program), original=program, seed=1)


def outputs(program, like=None):
    with torch.no_grad():
        return program.run_flat(*(like or program).example)[0]


def parameters(program):
    return sum(p.numel() for p in program.parameters())


def test_equal_layers_are_tied_without_a_change():
    _, program, context = setting(lambda i, w: w[0] if i != 2 else w[2])
    outcome = Layers(mode="tie", error=0.0).apply(program, Sites(), context)
    made = outcome.program
    assert outcome.resolved["layers"] == [[NAMES[0], NAMES[1], NAMES[3]]]
    assert made.aliases == {NAMES[1]: NAMES[0], NAMES[3]: NAMES[0]}
    assert torch.equal(outputs(made), outputs(program))
    assert parameters(made) == parameters(program) - 2 * 144
    assert made.tensor(NAMES[3]) is made.tensor(NAMES[0])


def test_near_layers_are_tied_to_their_mean_and_others_are_not():
    torch.manual_seed(3)
    noise = 0.01 * torch.randn(4, 12, 12)
    _, program, context = setting(lambda i, w: w[0] + noise[i] if i < 3 else w[3])
    outcome = Layers(mode="tie", error=0.1).apply(program, Sites(), context)
    assert outcome.resolved["layers"] == [NAMES[:3]]
    mean = torch.stack([program.tensor(name).detach() for name in NAMES[:3]]).double().mean(0)
    assert torch.equal(outcome.program.tensor(NAMES[0]), mean.float())
    figures = outcome.figures[NAMES[0]]
    assert figures["parameters"] == [3 * 144, 144] and 0 < figures["error"] < 0.1


def test_layers_in_the_span_of_two_are_written_with_two_exactly():
    """Rounding: sums of two products of float32 numbers, compared after four layers."""
    _, program, context = setting(lambda i, w: w[i] if i < 2 else i * w[0] - 0.5 * w[1])
    outcome = Layers(error=1e-4).apply(program, Sites(), context)
    made = outcome.program
    assert outcome.resolved["ranks"] == [2]
    for name in NAMES:
        decoded, weight = form_of(made, name).decode(), program.tensor(name).detach()
        assert torch.allclose(decoded, weight, atol=1e-5 * float(weight.abs().max()))
    assert torch.allclose(outputs(made), outputs(program), atol=1e-4)
    assert parameters(made) == parameters(program) - 4 * 144 + 2 * (144 + 4)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_basis_is_the_best_of_its_rank(rank):
    """The squared error is the sum of the squared singular values that were dropped."""
    _, program, context = setting()
    outcome = Layers(rank=rank).apply(program, Sites(), context)
    rows = torch.stack([program.tensor(name).detach().double().flatten() for name in NAMES])
    made = torch.stack([form_of(outcome.program, n).decode().double().flatten() for n in NAMES])
    dropped = torch.linalg.svdvals(rows)[rank:].square().sum()
    assert float((rows - made).square().sum()) == pytest.approx(float(dropped), rel=1e-4)
    assert outcome.resolved["ranks"] == [rank]


def test_independent_layers_are_left_alone_with_a_note():
    _, program, context = setting()
    for options in ({}, {"mode": "tie"}, {"rank": 4}):
        outcome = Layers(**options).apply(program, Sites(), context)
        assert outcome.notes and outcome.resolved["layers"] == []
        assert torch.equal(outputs(outcome.program), outputs(program))


def test_given_families_are_shared_whatever_their_distance():
    _, program, context = setting()
    family = [NAMES[1], NAMES[3]]
    outcome = Layers(mode="tie", layers=[family]).apply(program, Sites(), context)
    assert outcome.program.aliases == {NAMES[3]: NAMES[1]}
    assert outcome.figures[NAMES[1]]["error"] > 0.5


def test_basis_and_coefficients_train_end_to_end():
    _, program, context = setting()
    outcome = Layers(rank=2).apply(program, Sites(), context)
    distil = method_class("distill.logits")
    options = {**distil.quick, "teacher": "torch"}
    trained = distil(**options).apply(outcome.program, Sites(), context).program
    assert sum(n.target is COMBINE for n in trained.graph.nodes) == 4
    for name in (f"{NAMES[0]}_basis", *NAMES):
        assert not torch.equal(trained.tensor(name), outcome.program.tensor(name))
    assert parameters(trained) == parameters(outcome.program) == cost(trained).params


@pytest.mark.parametrize("mode", ["tie", "basis"])
def test_width_can_be_cut_afterwards(mode):
    _, program, context = setting()
    made = Layers(mode=mode, rank=2, layers=[NAMES]).apply(program, Sites(), context).program
    found = groups(made)
    keep = {group.name: torch.arange(0, group.size, 2) for group in found}
    if not keep:
        assert all(group.frozen for group in found.frozen)
        return
    small, changes = cut(made, keep, found)
    expected = masked(made, changes, program.example)[0]
    assert torch.allclose(outputs(small, like=made), expected, atol=1e-5)


def test_runtimes_and_the_model_get_the_tensors():
    model, program, context = setting()
    made = Layers(rank=2).apply(program, Sites(), context).program
    lowered = lower_weights(made)
    assert not any("laconic" in str(node.target) for node in lowered.graph.nodes)
    with torch.no_grad():
        assert torch.equal(lowered(*program.example)[0], outputs(made))
    assert write_back(made, model) == []
    for name in NAMES:
        assert torch.equal(model.state_dict()[name], form_of(made, name).decode())


@pytest.mark.parametrize("mode", ["tie", "basis"])
def test_training_the_result_leaves_the_input_alone(mode):
    _, program, context = setting()
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    made = Layers(mode=mode, layers=[NAMES[:2]], rank=1).apply(program, Sites(), context).program
    made.train()
    made(torch.ones(2, 12)).square().sum().backward()
    torch.optim.SGD(made.parameters(), lr=1.0).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())
    assert not torch.equal(made.tensor("head.weight"), before["head.weight"])


def test_bad_input_is_named():
    _, program, context = setting()
    with pytest.raises(RecipeError, match="no weight 'layers.9.weight'"):
        Layers(layers=[["layers.0.weight", "layers.9.weight"]]).apply(program, Sites(), context)
    with pytest.raises(RecipeError, match="all of one shape"):
        Layers(layers=[["layers.0.weight", "head.weight"]]).apply(program, Sites(), context)
    with pytest.raises(RecipeError, match="all of one shape"):
        Layers(layers=[["layers.0.weight"]]).apply(program, Sites(), context)
    for options in ({"layers": [["a", "b"], ["a", "c"]]}, {"ranks": [2]}, {"rank": 0}):
        with pytest.raises(ValidationError):
            Layers(**options)


def test_pruned_weights_keep_their_zeros():
    _, program, context = setting(lambda i, w: w[0])
    program.sparse = frozenset(NAMES[:1])
    outcome = Layers(mode="tie").apply(program, Sites(), context)
    assert outcome.resolved["layers"] == [NAMES[1:]]
    assert any(NAMES[0] in note for note in outcome.notes)
