"""Groups: what is found in a graph, under which names, and what is frozen and why."""

import pytest
import torch
from torch import nn

from laconic.core.errors import SurgeryError
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.testing import zoo


@pytest.fixture
def zoo_groups(zoo_program):
    return lambda name, **options: groups(zoo_program(name), **options)


def members(group):
    return {(m.tensor, m.dim, m.role) for m in group.members}


def test_a_plain_cnn_prints_three_groups_through_the_flatten(zoo_groups):
    found = zoo_groups("plain_cnn")
    names = [group.name for group in found]
    assert names == ["body.0.0.out", "body.2.0.out", "first.out"]
    second = found[1]
    assert ("body.2.0.weight", 0, "producer") in members(second)
    assert ("body.2.1.running_var", 0, "parameter") in members(second)
    assert ("first.weight", 1, "consumer") in members(second)
    consumer = second.by_role("consumer")[0]
    assert torch.equal(
        second.positions(consumer, [1, 3]), torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    )
    assert torch.equal(second.index(consumer), torch.arange(16).repeat_interleave(4))
    assert all(name in found.describe() for name in names)


def test_frozen_axes_say_why(zoo_groups):
    found = zoo_groups("plain_cnn")
    why = {group.name: group.frozen for group in found.frozen}
    assert "input x" in why["body.0.0.in"]
    assert "output 0" in why["head.out"]
    assert all(group.frozen for group in found.frozen)


def test_heads_and_head_sizes_are_groups_of_their_own(zoo_groups):
    found = zoo_groups("rotary")
    sizes = {group.name: group.size for group in found}
    assert sizes["attention.q.heads"] == 4
    assert sizes["attention.q.heads_per_kv"] == 2
    assert sizes["attention.q.head_dim"] == 4  # rotary couples the two halves of 8
    assert sizes["attention.v.head_dim"] == 8
    rotary = found.find("attention.q.head_dim")
    assert ("attention.frequency", 0, "parameter") in members(rotary)


def test_all_three_parts_of_a_fused_matrix_share_their_heads(zoo_groups):
    for name in ("fused_view", "fused_split", "per_head"):
        found = zoo_groups(name)
        heads = found.find("attention.qkv.heads")
        index = heads.index(heads.by_role("producer")[0])
        assert heads.size == 4 and index.bincount().tolist() == [24] * 4


def test_the_residual_stream_is_one_group(zoo_groups):
    found = zoo_groups("tied_language_model")
    stream = max(found, key=lambda group: len(group.members))
    assert stream.size == 32 and ("head.weight", 1, "producer") in members(stream)
    # rows of a tied embedding are vocabulary, looked up by number
    assert any(g.size == 40 and "looked up" in (g.frozen or "") for g in found.frozen)


def test_keep_takes_globs_over_groups_and_tensors(zoo_groups):
    free = zoo_groups("resnet")
    kept = zoo_groups("resnet", keep=["stem.*"])
    assert len(kept) == len(free) - 1
    assert "by request" in {g.frozen for g in kept.frozen if "stem.0.out" in g.name}.pop()


class Strange(nn.Module):
    """An operator that has no row."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(torch.relu(self.two(torch.erfinv(self.one(x)).renorm(2, 0, 1.0))))


def test_an_operator_without_a_row_freezes_what_it_touches_and_is_named():
    found = groups(capture(Strange(), (torch.randn(2, 6),)))
    assert [group.name for group in found] == ["two.out"]
    assert list(found.unknown) == ["aten.renorm"]
    assert "nobody has described" in found.find("one.out").frozen


def test_names_and_indices_are_checked(zoo_groups):
    found = zoo_groups("no_bias")
    with pytest.raises(SurgeryError, match="layers.0.out"):
        found.find("layers.0.outt")
    for bad, text in (([], "no index"), ([24], "counted from 0"), ([-1], "counted from 0")):
        with pytest.raises(SurgeryError, match=text):
            found.kept({"layers.0.out": bad})
    with pytest.raises(SurgeryError, match="cannot shrink"):
        found.kept({"head.out": [0]})


@pytest.mark.parametrize("name", zoo.names())
def test_the_whole_zoo_is_followed(zoo_groups, name):
    found = zoo_groups(name)
    assert not found.unknown
    assert len(found) >= 1
    assert len({group.name for group in [*found, *found.frozen]}) == len(found) + len(found.frozen)
    for group in found:
        for member in group.members:
            index = group.index(member)
            assert index.max() == group.size - 1
            kept = group.positions(member, [0])
            assert torch.equal(kept, torch.nonzero((index == 0) | (index == -1)).flatten())
