"""Weights on grids, rounded to nearest: what each grid promises, odd weights, contradictions."""

import itertools
from typing import get_args

import pytest
import torch
from torch import nn

from laconic.core.errors import DataError, RecipeError
from laconic.core.recipe import Step
from laconic.forms import levels
from laconic.methods.base import Context, method_class, method_of
from laconic.methods.quantize.weights import GridName
from laconic.program.capture import capture
from laconic.program.freezing import form_of, freeze
from laconic.program.program import FAKES
from laconic.program.sites import Sites
from laconic.testing.contracts import own_outputs

GRIDS = get_args(GridName)


class Net(nn.Module):
    """Three layers, the middle one with blocks of 32 weights."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 2, groups=1)
        self.three = nn.Linear(8, 4)

    def forward(self, x):
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    program = capture(Net().eval(), torch.randn(8, 3, 8, 8))
    return program, Context(task=own_outputs(program), original=program)


def apply(setting, sites=(), program=None, **options):
    made = method_class("quantize.weights")(**options)
    return made.apply(program or setting[0], Sites(sites) if sites else Sites(), setting[1])


def with_weight(program, name, value):
    made = program.clone()
    made.set_tensor(name, value)
    return made


@pytest.mark.parametrize("grid", GRIDS)
def test_every_weight_is_the_nearest_point_and_the_master_stays(setting, grid):
    program = setting[0]
    made = apply(setting, grid=grid, first_last=None).program
    for name in ("one.weight", "two.weight", "three.weight"):
        assert torch.equal(made.tensor(name), program.tensor(name))  # trains on from the floats
        held, weight = form_of(made, name), program.tensor(name).detach()
        points = held.decode()
        assert held.tensors()["scale"].shape[0] == weight.shape[0]
        other = points.flatten(1).sort(1).values
        if other.shape[1]:  # no point that the channel uses is nearer, up to rounding
            near = (weight.flatten(1)[..., None] - other[:, None, :]).abs().amin(-1)
            off = (weight - points).flatten(1).abs()
            if held.tensors()["scale"].ndim == 1:
                assert bool((off <= near + 1e-6).all())
    wanted = made.run_flat(*made.example)
    for a, b in zip(wanted, freeze(made).run_flat(*made.example), strict=True):
        assert torch.equal(a, b)


def test_grids_are_what_their_names_say(setting):
    def held(**options):
        return form_of(apply(setting, first_last=None, **options).program, "two.weight")

    assert sorted(set(held(grid="ternary").codes.unique().tolist())) == [-1, 0, 1]
    assert held(grid="binary").meta()["name"] == "binary"
    assert held(bits=1).meta() == held(grid="binary").meta()
    assert held(grid="mxfp8").meta()["name"] == "fp8_e4m3"
    small = held(grid="mxfp4")
    assert small.meta()["name"] == "fp4_e2m1"
    assert bool((torch.frexp(small.tensors()["scale"])[0] == 0.5).all())
    assert held(bits=3, symmetric=True).meta() == {"axis": 0, "qmin": -3, "qmax": 3}
    assert held(bits=3).meta() == {"axis": 0, "qmin": -4, "qmax": 3}
    assert held(bits=16).codes.dtype == torch.int16
    assert held(sites=["two.*"], bits=4, group=16).tensors()["scale"].shape == (8, 2)
    assert held(bits=4, per_channel=False).tensors()["scale"].shape == ()
    assert bool((torch.frexp(held(power_of_two=True).tensors()["scale"])[0] == 0.5).all())


def test_blocks_of_32_are_cut_where_they_fit(setting):
    program = capture(nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 40), nn.Linear(40, 3)).eval(),
                      torch.randn(2, 64))  # fmt: skip
    outcome = apply(setting, program=program, grid="mxfp4", first_last=None)
    shapes = [form_of(outcome.program, f"{i}.weight").tensors()["scale"].shape for i in range(3)]
    assert shapes == [(4, 2), (40,), (3,)]
    assert [note for note in outcome.notes if "2.weight" in note and "40 weights" in note]


def test_both_ends_have_more_bits_where_that_is_more(setting):
    low = apply(setting, grid="binary").program
    assert form_of(low, "one.weight").meta() == {"axis": 0, "qmin": -128, "qmax": 127}
    assert form_of(low, "three.weight").kind == "affine"
    assert form_of(low, "two.weight").kind == "levels"
    high = apply(setting, bits=12).program
    assert form_of(high, "one.weight").meta()["qmax"] == 2**11 - 1


def test_effective_bits_are_counted(setting):
    figures = apply(setting, bits=4, symmetric=True, first_last=None).figures
    sizes = [8 * 27, 8 * 32, 4 * 8]
    stored = [size * 4 + 32 * rows for size, rows in zip(sizes, (8, 8, 4), strict=True)]
    assert figures["effective_bits"] == pytest.approx(sum(stored) / sum(sizes))


@pytest.mark.parametrize("correction", ["analytic", "empirical", "batch_norm"])
def test_a_correction_brings_the_mean_output_back(setting, correction):
    program, context = setting

    def off(made):
        inputs = [x for x, _ in context.task.train]
        with torch.no_grad():
            shifts = [made(**x).mean(0) - program(**x).mean(0) for x in inputs]
        return float(torch.stack(shifts).mean(0).abs().sum())

    plain = apply(setting, grid="ternary", first_last=None).program
    corrected = apply(setting, grid="ternary", first_last=None, bias_correction=correction).program
    assert off(corrected) < 0.6 * off(plain)


@pytest.mark.parametrize("grid", ["int", "nf4", "binary", "mxfp4"])
def test_batch_norm_correction_brings_the_spread_of_each_channel_back(setting, grid):
    program, context = setting
    options = {"grid": grid, "first_last": None} | ({"bits": 2} if grid == "int" else {})
    plain, made = (
        apply(setting, **options, bias_correction=way).program for way in ("none", "batch_norm")
    )
    for name in ("one.weight", "two.weight"):  # the codes stay, and so do powers of two
        first, second = form_of(plain, name), form_of(made, name)
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.scale, second.scale) == (grid == "mxfp4")
    if grid == "mxfp4":
        return

    def spread(held):
        inputs = [x for x, _ in context.task.train]
        with torch.no_grad():
            return torch.cat([held(**x) for x in inputs]).std(0)

    wanted = spread(program)
    assert float((spread(made) / wanted - 1).abs().max()) < 0.02
    assert float((spread(plain) / wanted - 1).abs().max()) > 0.03


@pytest.mark.parametrize("grid", GRIDS)
def test_odd_weights_give_finite_numbers(setting, grid):
    program = setting[0]
    weight = program.tensor("two.weight").detach()
    for odd in (torch.zeros_like(weight), torch.full_like(weight, -3.5), weight * 1e-42):
        made = apply(setting, program=with_weight(program, "two.weight", odd), grid=grid).program
        values = form_of(made, "two.weight").decode()
        assert bool(torch.isfinite(values).all())
        if grid not in ("binary",):
            assert bool((values[odd == 0] == 0).all())
    # one channel of zeros stays (nearly, of two levels) zero and leaves the others alone
    half = weight.clone()
    half[1] = 0
    made = apply(setting, program=with_weight(program, "two.weight", half), grid=grid).program
    assert float(form_of(made, "two.weight").decode()[1].abs().max()) < 1e-30


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ("int", {"bits": 16}),
        *itertools.product(
            ["int", "ternary", "binary", "nf4", "fp8_e5m2"],
            [{}, {"per_channel": False}, {"group": 8}],
        ),
    ],
)
def test_an_outlier_is_noted_and_the_weight_stays_float(setting, grid, options):
    wild = setting[0].tensor("two.weight").detach().clone()
    wild.view(-1)[3] = 1e30
    broken = with_weight(setting[0], "two.weight", wild)
    outcome = apply(setting, program=broken, sites=["two.*"], grid=grid, **options)
    assert any("two.weight" in note and "1e+30" in note for note in outcome.notes)
    assert torch.equal(outcome.program.tensor("two.weight"), wild)
    assert not any(node.target in FAKES for node in outcome.program.graph.nodes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(setting, bad):
    broken = setting[0].tensor("two.weight").detach().clone()
    broken.view(-1)[0] = bad
    with pytest.raises(DataError, match="two.weight"):
        apply(setting, program=with_weight(setting[0], "two.weight", broken))


@pytest.mark.parametrize("bits", [0, 17])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(RecipeError, match="bits"):
        method_of(Step(method="quantize.weights", sites="*", options={"bits": bits}), "step 1")


def test_a_group_that_does_not_divide_is_refused_with_those_that_do(setting):
    with pytest.raises(RecipeError, match=r"two\.weight.*5.*32.*1, 2, 4, 8, 16, 32"):
        apply(setting, sites=["two.*"], bits=4, group=5)


def test_contradictions_are_refused(setting):
    for options in (
        {"grid": "nf4", "bits": 4},
        {"grid": "nf4", "weight_range": "entropy"},
        {"group": 4, "per_channel": False},
    ):
        with pytest.raises(RecipeError, match="quantize.weights"):
            apply(setting, **options)


def test_names_of_levels_are_those_of_the_form():
    assert set(levels.NAMES) < set(GRIDS)


def test_what_no_kernel_takes_is_said(setting):
    """Small in the file only; linear layers in groups, and weights behind activations, are not."""
    program, context = setting
    alone = apply(setting, bits=4, first_last=None)
    assert "openvino has no kernel for 3 of the weights" in alone.notes[-1]
    assert "one.weight, two.weight, three.weight" in alone.notes[-1]
    wide = capture(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)).eval(), torch.randn(2, 64))
    groups = {"bits": 4, "group": 16, "first_last": None}
    assert not apply(setting, program=wide, **groups).notes
    other = Context(task=context.task, original=program, runtime="inductor")
    assert "inductor has no kernel for 2 of" in apply((wide, other), **groups).notes[-1]
    static = method_class("quantize.static")(weights=False, samples=8, skip_above=None)
    held = static.apply(program, Sites(), context).program
    assert not apply(setting, program=held, bits=4, first_last=None).notes
    signs = apply(setting, program=held, grid="binary", first_last=None).notes[-1]
    assert "no kernel for 3 of the weights" in signs
