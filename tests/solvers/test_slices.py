"""Sizes of groups from shapes of tensors, and slices that fit."""

import pytest
import torch

from laconic.core.errors import RecipeError
from laconic.program.groups import groups
from laconic.program.sites import Sites
from laconic.program.surgery import cut
from laconic.solvers.channels import slices
from laconic.solvers.weights.elimination import by_score
from laconic.testing import zoo

MODELS = ["plain_cnn", "padded_shortcut", "densenet", "fused_split", "per_head", "tied_autoencoder"]


@pytest.mark.parametrize("model", MODELS)
def test_shapes_of_a_cut_network_give_its_sizes_back(model):
    program = zoo.captured(model)
    found = groups(program)
    sizes = slices.counts(found, 0.6, Sites())
    assert sizes
    small = cut(program, slices.leading(sizes), found)[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in small.tensors()}
    again = cut(program, slices.leading(slices.fitting(found, shapes)), found)[0]
    assert {name: tuple(tensor.shape) for name, tensor in again.tensors()} == shapes


def test_shares_round_and_nothing_becomes_empty():
    found = groups(zoo.captured("no_bias"))  # groups of 24 and 16
    assert slices.counts(found, 0.5, Sites()) == {"layers.0.out": 12, "layers.2.out": 8}
    assert set(slices.counts(found, 0.001, Sites()).values()) == {1}
    assert slices.counts(found, 1.0, Sites()) == {}
    by_glob = slices.counts(found, {"layers.0*": 0.25, "*": 1.0}, Sites())
    assert by_glob == {"layers.0.out": 6}
    with pytest.raises(RecipeError, match=r"layers\.0\.out"):
        slices.counts(found, {"layer.0.out": 0.5}, Sites())


def test_a_share_takes_heads_and_not_what_is_inside_them():
    found = groups(zoo.captured("fused_split"))
    names = slices.counts(found, 0.5, Sites())
    assert any(found.find(name).atom.hint == "heads" for name in names)
    assert not any(found.find(name).atom.hint == "head_dim" for name in names)


def test_ranks_fall_back_to_the_first_where_nothing_scores():
    score = torch.tensor([3.0, 1.0, 2.0])
    kept = slices.ranked({"a": 2, "b": 2}, {"a": by_score(score)})
    assert kept["a"].tolist() == [0, 2]
    assert kept["b"].tolist() == [0, 1]
