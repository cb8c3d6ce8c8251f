"""Weights whose scales belong to runs of elements, and on levels: frozen, stored, cut."""

import pytest
import torch
from torch import nn

from laconic import storage
from laconic.core.errors import StorageError
from laconic.engine.layers import form
from laconic.engine.writeback import values
from laconic.forms import levels
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.freezing import form_of, freeze, is_frozen, plain, thaw
from laconic.program.groups import groups
from laconic.program.program import FAKES, LEVELS
from laconic.program.surgery import cut
from laconic.solvers.quantization import insertion, ranges
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.testing import zoo


def quantised(captured, kind, runs=2):
    """Every weight on `kind`, "int" or levels, its slices cut into `runs` where that is possible."""
    program = captured.clone()
    program.propagate()
    for site in weight_sites(program)[0]:
        weight, group = program.tensor(site.name).detach(), None
        if site.axis is not None:
            size = weight.numel() // weight.shape[site.axis]
            group = size // runs if size % runs == 0 else None
        if kind == "int":
            grid = ranges.weight_grid(weight, site.axis, "minmax", 4, group=group, symmetric=False)
            insertion.quantize_weight(program, site, site.axis, grid)
        else:
            scale = ranges.level_scale(weight, site.axis, kind, "minmax", group=group)
            insertion.insert_levels(program, site, site.axis, scale, kind)
    program.recompile()
    return program


def same(one, other):
    pairs = zip(one.run_flat(*one.example), other.run_flat(*one.example), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["int", *levels.NAMES])
@pytest.mark.parametrize("name", ["plain_cnn", "tied_autoencoder", "fused_split"])
def test_frozen_stored_and_thawed_they_compute_the_same_bits(name, kind, tmp_path):
    program = quantised(zoo.captured(name), kind)
    frozen = freeze(program)
    assert is_frozen(frozen) and same(program, frozen) and same(program, thaw(frozen))
    path = tmp_path / "model.laconic"
    assert storage.save(frozen, path) == storage.predict(frozen).total
    read = storage.load(path)
    assert is_frozen(read)
    read.example = program.example
    assert same(program, read) and same(program, thaw(read))
    for site in weight_sites(zoo.captured(name))[0]:
        kept, seen = form_of(frozen, site.name), form_of(program, site.name)
        assert kept.kind == seen.kind == ("affine" if kind == "int" else "levels")
        assert torch.equal(kept.decode(), seen.decode())
        for held in (program, frozen):
            assert torch.equal(values(held, site.name), kept.decode())
            assert form(held, site.name) == (
                f"{kind} levels" if kind != "int" else form(held, site.name)
            )
    assert cost(frozen).unknown == {} and cost(frozen).params == cost(program).params
    assert not any(node.target in (*FAKES, LEVELS) for node in plain(frozen).graph.nodes)


class Chain(nn.Module):
    """Layers in a row whose channels can leave."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def chain(kind, runs):
    torch.manual_seed(1)
    return quantised(capture(Chain().eval(), torch.randn(2, 3, 9, 9)), kind, runs)


@pytest.mark.parametrize("kind", ["int", "nf4"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("runs", "block"), [(1, 1), (4, 2), (2, 4), (8, 1)])
def test_channels_leave_with_whole_runs(kind, frozen, runs, block):
    program = chain(kind, runs)
    program = freeze(program) if frozen else program
    program.propagate()
    found = groups(program)
    (group,) = [
        g for g in found if ("layers.0.weight", 0) in {(m.tensor, m.dim) for m in g.members}
    ]
    assert group.frozen is None and group.size * block == 8
    kept = list(range(1, group.size))
    made, _ = cut(program, {group.name: kept})
    channels = torch.arange(block, 8)
    for name, dim in (("layers.0.weight", 0), ("layers.2.weight", 1)):
        assert torch.equal(values(made, name), values(program, name).index_select(dim, channels))


@pytest.mark.parametrize("kind", ["int", "nf4"])
def test_runs_that_cut_a_channel_keep_it(kind):
    program = chain(kind, 3)  # 72 weights in runs of 24: two channels and two thirds of one
    program.propagate()
    reasons = [
        str(group.frozen)
        for group in groups(program).frozen
        if ("layers.0.weight", 0) in {(member.tensor, member.dim) for member in group.members}
    ]
    assert reasons and all("runs of elements" in reason for reason in reasons)


def test_weights_that_are_not_finite_are_refused_by_name():
    program = quantised(zoo.captured("plain_cnn"), "nf4")
    name = weight_sites(zoo.captured("plain_cnn"))[0][0].name
    broken = program.tensor(name).detach().clone()
    broken.view(-1)[0] = float("nan")
    program.set_tensor(name, nn.Parameter(broken))
    with pytest.raises(StorageError, match=name):
        freeze(program)


@pytest.mark.parametrize("kind", ["int", "nf4"])
def test_scales_that_do_not_fit_are_refused_when_read(kind, tmp_path):
    program = freeze(quantised(zoo.captured("plain_cnn"), kind))
    name = next(n for n, t in program.tensors() if n.endswith("_scale") and t.ndim == 2)
    rows, size = len(program.tensor(name)), program.tensor(name.removesuffix("_scale"))[0].numel()
    program.set_tensor(name, torch.ones(rows, size + 1))
    storage.save(program, tmp_path / "m.laconic")
    with pytest.raises(StorageError, match="cut into"):
        storage.load(tmp_path / "m.laconic")


def test_bits_are_told_as_they_are():
    program = quantised(zoo.captured("plain_cnn"), "int")
    for held in (program, freeze(program)):
        name = weight_sites(zoo.captured("plain_cnn"))[0][0].name
        assert form(held, name) == "affine 4 bit"


def test_codes_beyond_the_levels_are_refused(tmp_path):
    program = freeze(quantised(zoo.captured("plain_cnn"), "binary"))
    name = next(n for n, t in program.tensors() if t.dtype == torch.uint8)
    program.set_tensor(name, program.tensor(name) + 1)
    storage.save(program, tmp_path / "m.laconic")
    with pytest.raises(StorageError, match="numbered 0 to 1"):
        storage.load(tmp_path / "m.laconic")
