"""Sub-networks: they compute what their parts say, cost what was foretold, and share their weights."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from laconic.core.errors import RecipeError
from laconic.methods.nas.supernet import Supernet
from laconic.program.cost import cost
from laconic.program.sites import Sites
from laconic.program.surgery import cut
from laconic.solvers.channels import ranking
from laconic.solvers.layers import branch_removal
from laconic.solvers.layers.residual import branches
from laconic.solvers.search.elastic import Elastic, declare
from laconic.solvers.search.member_costs import Prices
from laconic.solvers.search.sandwich import Slice, opened
from laconic.solvers.search.search_space import Knob, Space
from laconic.testing import zoo

WISHES = {"width:*": [1.0, 0.75, 0.5], "depth:*": [1.0, 0.5, 0], "kernel:*": [5, 3, 1]}


def program_of(name):
    return zoo.captured(name)


def some(space, count=2):
    generator = torch.Generator().manual_seed(0)
    return [space.random(generator) for _ in range(count)]


@pytest.mark.parametrize("name", ["resnet", "padded_shortcut", "mobilenet", "fused_split"])
def test_costs_are_those_of_the_cut_program(name):
    elastic = Elastic(program_of(name))
    space, _ = declare(elastic, WISHES, Sites())
    prices = Prices(elastic)
    for member in [space.full(), space.least(), *some(space, 1)]:
        found = cost(elastic.cut(member).program)
        price = prices(member)
        assert (price.macs, price.parameters, price.bytes) == (
            found.macs,
            found.params,
            found.bytes,
        )
        assert prices.macs(member) == found.macs


def test_bits_count_their_codes_and_scales():
    elastic = Elastic(program_of("no_bias"))
    space, _ = declare(elastic, {"bits:*": [8]}, Sites())
    weights = [elastic.program.tensor(knob.site) for knob in space.knobs]
    saved = sum(3 * w.numel() - 4 * w.shape[0] for w in weights)
    prices = Prices(elastic)
    assert prices(space.full()).bytes - prices(space.least()).bytes == saved


def test_a_cut_is_surgery_and_a_dropped_branch():
    program = program_of("resnet")
    program.propagate()
    elastic = Elastic(program)
    group, stage = elastic.groups[0], elastic.stages[-1]
    member = {f"width:{group.name}": group.size // 2, f"depth:{stage.name}": 0}
    order = {f"width:{group.name}": list(range(group.size))[::-1]}
    wanted, _ = cut(program, {group.name: range(group.size - group.size // 2, group.size)})
    gone = [b for b in branches(wanted) if b.name in {b.name for b in stage.branches}]
    branch_removal.remove(wanted, gone)
    for checked in (True, False):
        got = elastic.cut(member, order, checked=checked).program
        assert torch.equal(got(*program.example), wanted(*program.example))


def test_a_cropped_kernel_is_one_with_zeros_around_it():
    program = program_of("plain_cnn")
    elastic = Elastic(program)
    name, layer = next(iter(elastic.kernels.items()))
    ringed, lost = program.tensor(name).detach().clone(), layer.kernel[0] // 2
    ringed[..., :lost, :], ringed[..., -lost:, :] = 0, 0
    ringed[..., :, :lost], ringed[..., :, -lost:] = 0, 0
    other = program.clone()
    other.set_tensor(name, ringed)
    got = elastic.cut({f"kernel:{name}": 1}).program
    assert got.tensor(name).shape[-1] == 1
    torch.testing.assert_close(got(*program.example), other(*program.example))


def test_a_smaller_resolution_is_a_resized_input():
    program = program_of("resnet")  # pools over all of the image
    elastic = Elastic(program)
    ((site, side),) = elastic.inputs.items()
    space, _ = declare(elastic, {"resolution:*": [side // 2]}, Sites())
    got = elastic.cut(space.least()).program
    resized = F.interpolate(program.example[0], size=side // 2, mode="bilinear")
    torch.testing.assert_close(got(*program.example), program(resized))
    assert Prices(elastic).macs(space.least()) == cost(got).macs < cost(program).macs
    assert site == space.knobs[0].site


def test_a_resolution_that_the_graph_does_not_take_is_refused():
    elastic = Elastic(program_of("plain_cnn"))  # flattens the image
    with pytest.raises(RecipeError, match="does not take an input of"):
        declare(elastic, {"resolution:*": [0.5]}, Sites())


def test_patterns_and_sites_that_match_nothing_are_refused():
    elastic = Elastic(program_of("resnet"))
    name = elastic.groups[0].name
    with pytest.raises(RecipeError, match=name):
        declare(elastic, {f"width:{name}s": [0.5]}, Sites())
    with pytest.raises(RecipeError, match="match nothing"):
        declare(elastic, {"width:*": [0.5]}, Sites(("nowhere",)))
    assert declare(elastic, {"width:*": [1.0]}, Sites())[0] == Space(())


def test_of_several_patterns_the_last_counts_and_a_space_declares_itself():
    elastic = Elastic(program_of("resnet"))
    first, second = elastic.groups[0], elastic.groups[1]
    space, _ = declare(
        elastic, {"width:*": [0.5], f"width:{first.name}": [first.size - 1]}, Sites()
    )
    chosen = space.plain()
    assert chosen[f"width:{first.name}"] == [first.size, first.size - 1]
    assert chosen[f"width:{second.name}"] == [second.size, second.size // 2]
    assert declare(elastic, chosen, Sites())[0] == space


@pytest.mark.parametrize(
    "wish", [{"widths:*": [0.5]}, {"width:*": []}, {"width:*": [1.5]}, {"kernel:*": [2]},
             {"bits:*": [0.5]}, {"depth:*": [-1]}]
)  # fmt: skip
def test_choices_that_mean_nothing_are_refused(wish):
    with pytest.raises(ValidationError):
        Supernet(space=wish)


def test_members_that_are_none_are_refused():
    space = Space((Knob("width", "a", (8, 4)),))
    with pytest.raises(RecipeError, match="did you mean 'width:a'"):
        space.checked({"width:b": 4})
    with pytest.raises(RecipeError, match=r"8, 4"):
        space.checked({"width:a": 5})
    assert space.checked({}) == space.full() == {"width:a": 8}
    assert space.member(space.genes(space.least())) == space.least() == {"width:a": 4}


def test_spaces_open_kernel_depth_width():
    knobs = [Knob(kind, "a", (4, 3, 2)) for kind in ("kernel", "depth", "width", "resolution")]
    space = Space(tuple(knobs))
    lengths = [
        [len(k.choices) for k in space.opened(opened(space, part)).knobs]
        for part in (0.0, 1 / 6, 1 / 3, 2 / 3, 1.0)
    ]
    assert lengths == [[1, 1, 1, 3], [2, 1, 1, 3], [3, 1, 1, 3], [3, 3, 1, 3], [3, 3, 3, 3]]


@pytest.mark.parametrize("name", ["resnet", "fused_split"])
def test_slices_run_and_learn_as_the_cut_program_does(name):
    shared = program_of(name)
    elastic = Elastic(shared)
    space, _ = declare(elastic, WISHES, Sites())
    (member,) = some(space, 1)
    alone = elastic.cut(member)
    shared.train()
    before = {n: t.clone() for n, t in shared.named_buffers()}
    small = Slice(elastic.cut(member, checked=False), shared)
    inputs = shared.example
    got, wanted = small(*inputs), alone.program.train().run_flat(*inputs)
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two)
    sum(o.square().sum() for o in got).backward()
    sum(o.square().sum() for o in wanted).backward()
    for own, tensor in alone.program.named_parameters():
        grad, place = shared.tensor(own).grad, shared.tensor(own)
        kept = torch.zeros_like(place)
        region = grad
        for dim, positions in alone.changes.get(own, {}).items():
            region = region.index_select(dim, positions)
        side = alone.crops.get(own)
        if side is not None:
            lost = (place.shape[-1] - side) // 2
            region = region[..., lost : lost + side, lost : lost + side]
        torch.testing.assert_close(region, tensor.grad, rtol=1e-4, atol=1e-4)
        assert float(grad.abs().sum() - region.abs().sum()) <= 1e-3 * float(region.abs().sum())
        assert kept.shape == grad.shape
    assert all(torch.equal(t, before[n]) for n, t in shared.named_buffers())


@pytest.mark.parametrize("name", ["resnet", "fused_split", "rotary", "channel_shuffle"])
def test_sorting_computes_the_same_network(name):
    program = program_of(name)
    elastic = Elastic(program)
    generator = torch.Generator().manual_seed(0)
    order = {g.name: torch.randperm(g.size, generator=generator).tolist() for g in elastic.groups}
    made, notes = program.clone(), []
    done = ranking.sort(made, elastic, order, notes)
    assert len(done) + len(notes) == len(order)
    assert name not in ("resnet", "fused_split") or not notes
    torch.testing.assert_close(
        made.run_flat(*program.example), program.run_flat(*program.example), rtol=2e-3, atol=2e-3
    )
    group = elastic.groups.find(next(iter(done)))
    keep = order[group.name][: group.size // 2]
    wanted, _ = cut(program, {group.name: keep}, None)
    got = elastic.cut({f"width:{group.name}": len(keep)}, {f"width:{group.name}": keep})
    assert torch.equal(got.program.run_flat(*program.example)[0], wanted(*program.example))


def test_orders_that_are_none_are_refused():
    elastic = Elastic(program_of("no_bias"))
    name = elastic.groups[0].name
    with pytest.raises(RecipeError, match="not all of 0 to"):
        ranking.sort(elastic.program.clone(), elastic, {name: [0, 0]}, [])
    with pytest.raises(RecipeError, match=name):
        ranking.sort(elastic.program.clone(), elastic, {name + "s": [0]}, [])
