"""Physically pruned equals masked, over the whole zoo; what surgery must leave alone."""

import pytest
import torch
from torch import nn

from laconic.core.errors import SurgeryError
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.program.surgery import cut, remove_dead, replace_tensor
from laconic.testing import zoo
from laconic.testing.masked import masked


def choose(found, seed=0, share=0.3):
    """Drop `share` of every group, rounded up, at random; at least one index stays."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in found:
        drop = min(int(-(-group.size * share // 1)), group.size - 1)
        order = torch.randperm(group.size, generator=generator)
        keep[group.name] = order[drop:]
    return keep


def same(one, other, tolerance=2e-5):
    """Equal up to float32 rounding: sums of at most a few thousand terms, each within 6e-8."""
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("name", zoo.names())
@torch.no_grad()
def test_pruned_equals_masked(zoo_program, name):
    program = zoo_program(name)
    before = {key: value.clone() for key, value in program.state_dict().items()}
    code = str(program.graph)
    pruned, changes = cut(program, choose(groups(program)))
    expected = masked(program, changes)
    same(pruned.run_flat(*program.example), expected)
    whole = program.run_flat(*program.example)
    assert (
        max(
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(expected, whole, strict=True)
        )
        > 0.01
    )
    assert str(program.graph) == code
    assert all(torch.equal(value, before[key]) for key, value in program.state_dict().items())


@pytest.mark.parametrize("name", ["resnet", "batched_heads", "windows", "learned_queries"])
@torch.no_grad()
def test_other_batch_sizes_and_a_second_cut(name):
    model, inputs = zoo.make(name)
    program = capture(model, inputs)
    pruned, changes = cut(program, choose(groups(program)))
    generator = torch.Generator().manual_seed(3)
    wide = [torch.randn((5, *x.shape[1:]), generator=generator) for x in inputs]
    same(pruned.run_flat(*wide), masked(program, changes, wide))
    again, changes = cut(pruned, choose(groups(pruned), seed=5))
    same(again.run_flat(*wide), masked(pruned, changes, wide))


def test_keeping_everything_changes_nothing(zoo_program):
    program = zoo_program("fused_split")
    found = groups(program)
    result, changes = cut(program, {g.name: range(g.size) for g in found}, found)
    assert changes == {}
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            result.run_flat(*program.example), program.run_flat(*program.example), strict=True
        )
    )


def test_one_index_of_every_group_is_enough(zoo_program):
    for name in ("densenet", "grouped", "rotary"):
        program = zoo_program(name)
        pruned, changes = cut(program, {g.name: [g.size - 1] for g in groups(program)})
        same(pruned.run_flat(*program.example), masked(program, changes), 1e-4)


def test_changes_name_the_kept_positions_of_every_axis(zoo_program):
    program = zoo_program("plain_cnn")
    pruned, changes = cut(program, {"body.2.0.out": [1, 3, 5]})
    assert changes["first.weight"][1].tolist() == [c * 4 + i for c in (1, 3, 5) for i in range(4)]
    assert set(changes) == {"body.2.0.weight", "first.weight"} | {
        f"body.2.1.{part}" for part in ("weight", "bias", "running_mean", "running_var")
    }
    for name, dims in changes.items():
        expected = program.tensor(name)
        for dim, kept in dims.items():
            expected = expected.index_select(dim, kept)
        assert torch.equal(pruned.tensor(name), expected)
        assert isinstance(pruned.tensor(name), nn.Parameter) == isinstance(
            program.tensor(name), nn.Parameter
        )


def test_tied_tensors_stay_tied_and_the_rest_is_shared(zoo_program):
    program = zoo_program("tied_language_model")
    stream = max(groups(program), key=lambda g: len(g.members))
    pruned, _ = cut(program, {stream.name: range(20)})
    assert pruned.tensor("tokens.weight") is pruned.tensor("head.weight")
    assert pruned.tensor("tokens.weight").shape == (40, 20)
    untouched = "layers.0.linear1.bias"
    assert pruned.tensor(untouched).data_ptr() == program.tensor(untouched).data_ptr()


def test_the_scale_of_attention_is_pinned(zoo_program):
    program = zoo_program("fused_view")
    pruned, _ = cut(program, {"attention.qkv.head_dim": range(5)})
    node = next(n for n in pruned.graph.nodes if "dot_product" in str(n.target))
    assert node.kwargs["scale"] == pytest.approx(8**-0.5)


def test_a_pruned_program_trains():
    model, inputs = zoo.make("resnet")
    program = capture(model, inputs)
    pruned, _ = cut(program, choose(groups(program)))
    pruned.train()
    pruned(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())
    assert all(p.grad is None for p in program.parameters())


@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_forms_in_front_of_a_weight_are_cut_with_it(frozen):
    program = zoo.captured("no_bias")
    node = next(
        n for n in program.graph.nodes if n.op == "get_attr" and n.target == "layers.0.weight"
    )
    weight = program.tensor("layers.0.weight").detach()
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    side = [
        program.graph.get_attr(program.add_tensor(name, value))
        for name, value in (
            ("layers.0.weight_scale", scale),
            ("layers.0.weight_zero_point", torch.zeros(24, dtype=torch.int32)),
        )
    ]
    users = list(node.users)
    for helper in side:
        node.append(helper)
    with program.graph.inserting_before(users[0]):
        if frozen:
            program.set_tensor("layers.0.weight", codes)
            made = program.graph.call_function(
                torch.ops.laconic.dequantize.default, (node, *side, 0)
            )
        else:
            made = program.graph.call_function(
                torch.ops.laconic.fake_quantize.default, (node, *side, 0, -127, 127)
            )
    users[0].replace_input_with(node, made)
    program.recompile()
    program.propagate()
    found = groups(program)
    pruned, changes = cut(program, {"layers.0.out": range(0, 24, 2)}, found)
    assert pruned.tensor("layers.0.weight_scale").shape == (12,)
    assert ("layers.0.weight", 0, "producer") in {
        (m.tensor, m.dim, m.role) for m in found.find("layers.0.out").members
    }
    same(pruned.run_flat(*program.example), masked(program, changes))


def test_groups_of_another_program_are_refused():
    model, inputs = zoo.make("no_bias")
    program, other = capture(model, inputs), capture(model, inputs)
    with pytest.raises(SurgeryError, match="another program"):
        cut(program, {}, groups(other))


@torch.no_grad()
def test_replace_and_remove():
    model, inputs = zoo.make("no_bias")
    program = capture(model, inputs).clone()
    before = program.run_flat(*inputs)
    node = next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == "head.weight")
    replace_tensor(program, node, "head.twice", program.tensor("head.weight") * 2)
    assert remove_dead(program) == ["head.weight"]
    same(program.run_flat(*inputs), [2 * before[0]])


def test_the_masked_reference_sees_a_wrong_cut(zoo_program):
    """The oracle can fail: other positions than those that were kept give another result."""
    program = zoo_program("gated")
    pruned, changes = cut(program, choose(groups(program)))
    name = "second.weight"
    wrong = dict(changes) | {name: {**changes[name], 0: (changes[name][0] + 1) % 40}}
    with pytest.raises(AssertionError):
        same(pruned.run_flat(*program.example), masked(program, wrong))


@pytest.mark.parametrize(
    "name", ["no_bias", "plain_cnn", "resnet", "cross_stage", "gated", "fused_split"]
)
@torch.no_grad()
def test_without_statistics_zeroing_the_slices_is_enough(zoo_program, name):
    """No masks at all: the original program with zeros in every dropped slice, run as it is."""
    program = zoo_program(name)
    found = groups(program)
    normed = {m.tensor for g in found for m in g.members if "norm" in m.tensor}
    keep = choose(g for g in found if not any(m.tensor in normed for m in g.members))
    pruned, changes = cut(program, keep, found)
    zeroed = program.clone()
    for tensor, dims in changes.items():
        value = program.tensor(tensor).detach().clone()
        for dim, kept in dims.items():
            dropped = torch.ones(value.shape[dim], dtype=torch.bool)
            dropped[kept] = False
            value.index_fill_(dim, dropped.nonzero().flatten(), 0.0)
        zeroed.set_tensor(tensor, value)
    assert changes
    same(pruned.run_flat(*program.example), zeroed.run_flat(*program.example))
