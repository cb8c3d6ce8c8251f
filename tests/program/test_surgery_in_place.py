"""Cutting a Program in place: the same network as a cut copy, in the objects it had."""

import pytest
import torch

from laconic.program.groups import groups
from laconic.program.surgery import cut, cut_, sliced
from laconic.testing import zoo


def halves(found):
    return {group.name: torch.arange(0, group.size, 2) for group in found}


@pytest.mark.parametrize("model", ["resnet", "fused_split", "tied_autoencoder", "per_head"])
def test_in_place_it_is_the_cut_copy_and_training_goes_on_with_the_same_objects(model):
    program = zoo.captured(model)
    wanted, changes = cut(program, halves(groups(program)))
    live = program.clone().train()
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in live.tensors()}
    nodes = list(live.graph.nodes)
    made = cut_(live, halves(groups(live)))
    assert {n: {d: p.tolist() for d, p in dims.items()} for n, dims in made.items()} == {
        n: {d: p.tolist() for d, p in dims.items()} for n, dims in changes.items()
    }
    assert all(tensor is before[name][0] for name, tensor in live.tensors() if name in before)
    assert [node for node in live.graph.nodes if node in set(nodes)] == nodes
    assert live.training
    live.eval()
    for one, two in zip(
        live.run_flat(*live.example), wanted.run_flat(*wanted.example), strict=True
    ):
        assert torch.equal(one, two)
    live.train()
    sum(o.square().mean() for o in live.run_flat(*live.example)).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in live.parameters())


def test_others_that_share_its_memory_keep_theirs():
    program = zoo.captured("plain_cnn")
    other = program.clone()
    before = {name: tensor.clone() for name, tensor in other.tensors()}
    cut_(program, halves(groups(program)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.tensors())


def test_slices_keep_the_layout():
    tensor = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    made = sliced(tensor, {0: torch.tensor([0, 2]), 1: torch.tensor([1, 3])})
    assert torch.equal(made, tensor[[0, 2]][:, [1, 3]])
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert sliced(tensor.contiguous(), {0: torch.tensor([1])}).is_contiguous()
