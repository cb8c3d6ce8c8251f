"""A line in place of an activation, one layer in place of two: the same numbers, fewer operators."""

import pytest
import torch
from torch import nn

from laconic.core.errors import RecipeError
from laconic.methods.base import Context
from laconic.methods.simplify.linearize import Linearize
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.solvers.layers.activations import LinearFit, activations, linearise
from laconic.testing import contracts, zoo
from laconic.testing.contracts import outputs, own_outputs


class Block(nn.Module):
    """A residual block; `bend` is the activation inside."""

    def __init__(self, bend, stride=1, width=4):
        super().__init__()
        self.one = nn.Conv2d(4, width, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(width, 4, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(4)])
        self.bend = bend
        self.stride = stride

    def forward(self, x):
        y = self.norms[1](self.two(self.bend(self.norms[0](self.one(x)))))
        return torch.relu(y + x) if self.stride == 1 else torch.relu(y)


def made(model, *shape, seed=0):
    model = zoo.shake(model, seed)
    return capture(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)))


def applied(program, **options):
    context = Context(task=own_outputs(program), original=program.clone(), seed=1)
    return Linearize(**{"samples": 8, **options}).apply(program, Sites(), context)


def test_the_line_is_the_least_squares_fit(generator):
    """Against the normal equations in float64; a channel that never moves becomes its value."""
    program = made(nn.Sequential(nn.Conv2d(3, 5, 1), nn.GELU(), nn.Conv2d(5, 2, 1)), 3, 6, 6)
    (one,) = activations(program)
    x = torch.randn(64, 5, 6, 6, generator=generator) + torch.arange(5.0)[:, None, None] - 2
    x[:, 4] = 0.7
    whole, left, right = (LinearFit(one.node, one.axis) for _ in range(3))
    whole.update(x)
    left.update(x[:20])
    right.update(x[20:])
    left.merge(right)
    slope, shift = whole.line()
    y = torch.nn.functional.gelu(x).double()
    for channel in range(4):
        flat = x[:, channel].double().flatten()
        design = torch.stack([flat, torch.ones_like(flat)], 1)
        best = torch.linalg.lstsq(design, y[:, channel].flatten()[:, None]).solution[:, 0]
        assert torch.allclose(torch.stack([slope[channel], shift[channel]]), best, atol=1e-9)
    assert slope[4] == 0 and torch.allclose(shift[4], y[0, 4, 0, 0])
    for a, b in zip(whole.line(), left.line(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_relu_that_never_bends_goes_exactly():
    """Inputs all positive: the line is the identity, and the merged network is the same function.

    Without padding nothing changes at the border either; float32 rounding of the merged weights.
    """
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten())
    program = made(model, 3, 8, 8)
    program.set_tensor("0.bias", nn.Parameter(torch.full((4,), 50.0)))
    outcome = applied(program, merge="always", rise=1e-3)
    assert outcome.figures["dropped"] == ["relu"] and outcome.figures["layers"] == [2, 1]
    assert outcome.program.tensor("0.weight").shape == (2, 3, 5, 5)
    for old, new in zip(outputs(program), outputs(outcome.program, like=program), strict=True):
        assert torch.allclose(old, new, rtol=1e-4, atol=1e-4 * float(old.abs().max()))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_residual_block_becomes_one_convolution(stride):
    """Inside, where no border is seen, merged and unmerged agree; identity and norms are in it."""
    program = made(Block(nn.ReLU(), stride), 4, 12, 12)
    straight = made(Block(nn.Identity(), stride), 4, 12, 12)
    outcome = applied(program, merge="always", line="identity", rise=None, count=1)
    small = outcome.program
    assert outcome.figures["layers"] == [2, 1]
    assert sum(n.op == "call_function" for n in small.graph.nodes) == 2, "convolution and relu"
    assert any("border" in note for note in outcome.notes)
    with torch.no_grad():
        (old,), (new,) = straight.run_flat(*program.example), small.run_flat(*program.example)
    inside = (..., slice(2, -2), slice(2, -2))
    assert torch.allclose(old[inside], new[inside], rtol=1e-4, atol=1e-4)
    assert old.shape == new.shape and not torch.allclose(old, new, atol=1e-4)


def test_only_what_is_cheaper_is_merged_and_the_rest_is_told():
    program = made(nn.Sequential(Block(nn.ReLU()), Block(nn.ReLU(), 2, 16)), 4, 12, 12)
    outcome = applied(program, rise=1e9)
    assert outcome.figures["dropped"] == ["relu_2"], "4 to 16 to 4 channels: cheaper as one"
    before, after = outcome.figures["macs"]
    assert after < before
    assert any("relu stays" in note and "39 % more" in note for note in outcome.notes)


def test_a_line_alone_changes_the_activation_only(generator):
    program = made(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), 6)
    (one,) = activations(program)
    slope, shift = torch.rand(5, generator=generator), torch.rand(5, generator=generator)
    made_ = program.clone()
    made_.propagate()
    linearise(made_, activations(made_)[0].node, one.axis, (slope, shift))
    made_.propagate()
    made_.recompile()
    x = program.example[0]
    hidden = x @ program.tensor("0.weight").T + program.tensor("0.bias")
    wanted = (hidden * slope + shift) @ program.tensor("2.weight").T + program.tensor("2.bias")
    assert torch.allclose(made_(x), wanted, atol=1e-5)


def test_the_budget_is_kept_and_a_replay_is_the_same():
    program = made(nn.Sequential(*[Block(nn.ReLU(), seed) for seed in (1, 1, 1)]), 4, 8, 8)
    free = applied(program, merge="never", rise=None, count=4)
    assert len(free.figures["dropped"]) == 4 and not free.figures["merged"]
    losses = free.figures["losses"]
    limit = sorted(losses[name] for name in free.figures["dropped"])[1]
    held = applied(program, merge="never", rise=limit, count=4)
    assert 1 <= len(held.figures["dropped"]) <= 4
    assert all(held.figures["losses"][name] <= limit for name in held.figures["dropped"])
    again = applied(program, merge="never", drop=held.resolved["drop"])
    for one, two in zip(outputs(held.program), outputs(again.program), strict=True):
        assert torch.equal(one, two)


def test_a_line_is_fitted_for_whatever_is_named():
    """Also for an activation that the method would not have chosen itself."""
    program = made(nn.Sequential(*[Block(nn.ReLU(), 1) for _ in range(2)]), 4, 8, 8)
    assert not applied(program, rise=None, count=1).resolved["drop"], "no pair is cheaper as one"
    named = applied(program, drop=["relu"])
    free = applied(program, drop=["relu"], merge="never")
    for one, two in zip(outputs(named.program), outputs(free.program), strict=True):
        assert torch.equal(one, two)


def test_bad_input_is_refused_in_words():
    program = made(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), 6)
    with pytest.raises(RecipeError, match="relu_7"):
        applied(program, drop=["relu_7"])
    with pytest.raises(RecipeError, match="both null"):
        applied(program, rise=None)


@pytest.mark.parametrize("model", ["mobilenet", "convnext", "grouped", "per_head"])
@pytest.mark.parametrize("merge", ["always", "never"])
def test_awkward_models_keep_the_contract(model, merge):
    held = contracts.case("simplify.linearize", model, merge=merge, count=3)
    contracts.output_is_ready(held)
    contracts.survives_storage(held)
    contracts.trains_on(held)
    contracts.input_is_untouched(held)
    contracts.replay_is_exact(held)
