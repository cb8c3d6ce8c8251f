"""Gates: open they change nothing, closed they drop the unit, between they follow the sample."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.core.errors import RecipeError
from laconic.methods.base import Context
from laconic.methods.dynamic.skip_layers import SkipLayers
from laconic.program.capture import capture
from laconic.program.chain import split
from laconic.program.sites import Sites
from laconic.solvers.dynamic import gates
from laconic.solvers.layers import branch_removal
from laconic.solvers.layers.residual import branches
from laconic.testing import contracts, zoo

TOKENS = 6
MASK = (torch.arange(TOKENS) < torch.tensor([[5], [2], [6], [3]])).long()


class Masked(nn.Module):
    """Two units of tokens that see each other where they are real, and the mean of those."""

    def __init__(self, written_out):
        super().__init__()
        self.written_out = written_out
        self.units = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x, mask):
        hidden = mask.bool()[:, None, None, :].expand(-1, 1, TOKENS, TOKENS)
        added = torch.where(hidden, 0.0, -1e9)
        for unit in self.units:
            y = unit(x).unsqueeze(1)
            if self.written_out:
                x = x + ((y @ y.transpose(2, 3) * 8**-0.5 + added).softmax(-1) @ y).squeeze(1)
            else:
                x = x + F.scaled_dot_product_attention(y, y, y, attn_mask=hidden).squeeze(1)
        held = mask.unsqueeze(-1).float()
        return (x * held).sum(1) / held.sum(1)


@functools.cache
def program(model):
    return zoo.captured(model)


def gated(held, size=1, noise=0.0):
    """A copy with gates whose weights are random where `noise` is."""
    made = held.clone()
    made.propagate()
    found, notes = gates.units(made, [branch.name for branch in branches(made)], size)
    assert found and not notes
    placed = gates.insert(made, found)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in list(made.tensors()):
        if name.startswith("gates.") and name.endswith("weight"):
            made.set_tensor(name, noise * torch.randn(tensor.shape, generator=generator))
        if noise and name.startswith("gates.") and name.endswith("bias"):
            made.set_tensor(name, torch.zeros_like(tensor))
    return made, placed


def without(held):
    """All branches taken out."""
    made = held.clone()
    made.propagate()
    branch_removal.remove(made, branches(made))
    return made


@pytest.mark.parametrize("model", ["resnet", "fused_split"])
def test_open_gates_change_nothing_and_closed_ones_drop(model):
    held = program(model)
    made, placed = gated(held)
    training = contracts.outputs(made)
    gates.decide(made, placed)
    gates.set_thresholds(made, placed, -100.0)
    for now, before, mixed in zip(
        contracts.outputs(made), contracts.outputs(held), training, strict=True
    ):
        assert torch.equal(now, before)
        torch.testing.assert_close(mixed, before, rtol=1e-4, atol=1e-5)  # start + (end - start)
    gates.set_thresholds(made, placed, 100.0)
    for now, gone in zip(contracts.outputs(made), contracts.outputs(without(held)), strict=True):
        torch.testing.assert_close(now, gone)


def test_a_unit_ends_behind_its_norm():
    """Layers with the norm behind the sum: skipped, the next one sees what came before."""
    held = program("tied_language_model")
    made, placed = gated(held, size=2)
    assert len(placed) == 2 and sum(gate.unit.share for gate in placed) == pytest.approx(1)
    gates.decide(made, placed)
    gates.set_thresholds(made, placed, 100.0)
    model, (ids,) = zoo.make("tied_language_model")
    with torch.no_grad():
        plain = model.head(model.tokens(ids) + model.positions(torch.arange(ids.shape[1])))
    torch.testing.assert_close(made(ids), plain)


@pytest.mark.parametrize("model", ["resnet", "fused_split"])
def test_each_sample_goes_its_own_way_and_the_chain_agrees(model):
    held = program(model)
    made, placed = gated(held, noise=1.0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, *held.example[0].shape[1:], generator=generator)
    training = made(x)
    gates.decide(made, placed)
    static = made(x)
    torch.testing.assert_close(training, static, rtol=1e-4, atol=1e-4)
    alone = torch.cat([made(row) for row in x.split(1)])
    torch.testing.assert_close(alone, static, rtol=1e-4, atol=1e-5)
    chain = split(made)
    assert chain.decides
    (found,) = chain.run([x.numpy()])
    torch.testing.assert_close(torch.from_numpy(found), static, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(static, held(x), atol=1e-3)


def test_the_penalty_closes_gates_and_the_threshold_keeps_the_share():
    held = program("resnet")
    task = contracts.own_outputs(held)
    method = SkipLayers(
        share=0.6, penalty=20.0, steps=12, lr=0.3, optimizer="adamw", evaluations=1,
        teacher="torch", precision="fp32", samples=8,
    )  # fmt: skip
    outcome = method.apply(held, Sites(), Context(task=task, original=held))
    shares, executed = outcome.figures["unit_share"], outcome.figures["executed"]
    assert outcome.figures["spent"] == pytest.approx(sum(shares[n] * executed[n] for n in shares))
    assert outcome.figures["spent"] <= 0.6 and outcome.figures["best_step"] == 12
    moved = [n for n, _ in outcome.program.tensors() if n.startswith("gates.") and "bias" in n]
    assert all(
        outcome.program.tensor(name).detach().item() < 1.0 for name in moved
    )  # they began at 1


def test_what_is_no_unit_is_said():
    held = program("resnet")
    with pytest.raises(RecipeError, match="no unit 'nowhere'"):
        contracts.case("dynamic.skip_layers", "resnet", units=["nowhere"])
    outcome = contracts.case("dynamic.skip_layers", "plain_cnn").outcome
    assert any("no residual unit" in note for note in outcome.notes)
    assert outcome.program is not held


@pytest.mark.parametrize("written_out", [False, True])
def test_padding_opens_no_gate(written_out):
    example = {"x": torch.randn(2, TOKENS, 8), "mask": MASK[:2]}
    held = capture(zoo.shake(Masked(written_out), seed=2), example)
    made, placed = gated(held, noise=1.0)
    gates.decide(made, placed)
    for body in split(made).pieces:  # none is handed a mask of all tokens to all tokens
        assert all(held.ndim < 4 for held in body.example)
    x = torch.randn(4, TOKENS, 8, generator=torch.Generator().manual_seed(3))
    other = torch.where(MASK[..., None] == 1, x, 9.0)
    torch.testing.assert_close(made(x, MASK), made(other, MASK))
    assert not torch.allclose(made(x, MASK), held(x, MASK), atol=1e-3)
