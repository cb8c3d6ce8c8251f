"""Rounding after training: quantize.gptq, quantize.hqq and quantize.round on networks.

What they share: grids, bits at either end, what happens to odd layers and odd data.
"""

import pytest
import torch
from torch import nn

from laconic.core.errors import DataError, RecipeError
from laconic.methods.base import Context, method_class
from laconic.program.capture import capture
from laconic.program.freezing import form_of, freeze
from laconic.program.sites import Sites
from laconic.testing import zoo
from laconic.testing.contracts import own_outputs

METHODS = ["quantize.gptq", "quantize.hqq", "quantize.round"]


class Net(nn.Module):
    """A residual block with batch norm between two other layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.one, self.two = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.two(torch.relu(self.norm(self.one(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    module = Net().eval()
    program = capture(module, (torch.randn(16, 3, 8, 8),))
    return program, Context(task=own_outputs(program), original=program)


def apply(method, setting, sites=(), **options):
    program, context = setting
    made = method_class(method)
    return made(**{**made.quick, **options}).apply(
        program, Sites(sites) if sites else Sites(), context
    )


def codes(program, name):
    return form_of(program, name).codes


def drift(setting, program):
    original, context = setting
    with torch.no_grad():
        pairs = [(program(**x), original(**x)) for x, _ in context.task.train]
    return sum(float((a - b).square().sum()) for a, b in pairs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", [None, 9])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_lie_on_grids_of_the_bits_asked_for(method, setting, group, symmetric):
    made = apply(method, setting, bits=3, group=group, symmetric=symmetric).program
    for name in ("stem", "one", "two", "head"):
        form = form_of(made, f"{name}.weight")
        bits = 8 if name in ("stem", "head") else 3
        assert form.qmax - form.qmin == 2**bits - 1 - symmetric
        assert torch.equal(form.decode(), made.tensor(f"{name}.weight"))
        grouped = group is not None and name != "head"
        assert form.scale.ndim == (2 if grouped else 1)
    frozen = freeze(made)
    with torch.no_grad():
        x = frozen.example
        assert torch.equal(frozen.run_flat(*x)[0], made.run_flat(*x)[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_ends_can_have_the_bits_of_all(method, setting):
    outcome = apply(method, setting, bits=2, first_last=None)
    for name in ("stem", "one", "two", "head"):
        assert form_of(outcome.program, f"{name}.weight").qmax == 1
    assert 2 < outcome.figures["effective_bits"] < 5  # a scale for 8 to 72 weights


@pytest.mark.parametrize("method", METHODS)
def test_a_group_that_does_not_divide_is_noted(method, setting):
    outcome = apply(method, setting, group=36)
    assert form_of(outcome.program, "one.weight").scale.shape == (8, 2)
    assert form_of(outcome.program, "stem.weight").scale.shape == (8,)
    assert any(note.startswith("stem.weight: one scale a channel") for note in outcome.notes)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_chosen_weights_move(method, setting):
    made = apply(method, setting, sites=("one.weight",), bits=2).program
    assert form_of(made, "one.weight").qmax == 1
    for name in ("stem.weight", "two.weight", "head.weight"):
        assert torch.equal(made.tensor(name), setting[0].tensor(name))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_are_codes(method, setting):
    loose, fixed = (apply(method, setting, bits=4, freeze=f) for f in (False, True))
    assert fixed.program.tensor("one.weight").dtype == torch.int8
    assert torch.equal(codes(loose.program, "one.weight"), codes(fixed.program, "one.weight"))
    assert loose.figures["effective_bits"] == fixed.figures["effective_bits"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [0, 1, 17])
def test_bits_out_of_range_are_refused(method, bits):
    with pytest.raises(ValueError, match="bits"):
        method_class(method)(bits=bits)


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite_are_refused(method, setting):
    program, context = setting
    broken = program.clone()
    weight = broken.tensor("two.weight").detach().clone()
    weight[0, 0, 0, 0] = float("nan")
    broken.set_tensor("two.weight", weight)
    with pytest.raises(DataError, match=r"two\.weight: 1 of 288 values are NaN"):
        apply(method, (broken, context))


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_whose_outliers_leave_no_other_code_stays_float(method):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1200, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        module[0].weight[:, 7] = 1e30
    program = capture(module, (torch.zeros(4, 1200),))
    held = (program, Context(task=own_outputs(program), original=program))
    outcome = apply(method, held, weight_range="minmax", first_last=None)
    assert "0.weight: stays float, outliers of 1e+30 stretch its grid until 2 of 2400" in " ".join(
        outcome.notes
    )
    assert torch.equal(outcome.program.tensor("0.weight"), program.tensor("0.weight"))
    assert form_of(outcome.program, "2.weight").qmax == 7
    if method == "quantize.gptq":  # the square of 1e30 is no float32
        assert any(note.startswith("2.weight: rounded to nearest") for note in outcome.notes)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_of_a_pruned_network_stay(method, setting):
    program, context = setting
    sparse = method_class("prune.magnitude")(ratio=0.6).apply(program, Sites(), context).program
    zeros = {n: sparse.tensor(n) == 0 for n in ("one.weight", "two.weight")}
    made = apply(method, (sparse, context), bits=3).program
    for name, gone in zeros.items():
        assert bool(gone.any())
        assert not bool(made.tensor(name)[gone].any())


@pytest.mark.parametrize("method", ["quantize.gptq", "quantize.round"])
def test_better_than_nearest(method, setting):
    options = {"steps": 60, "batch": 16} if method == "quantize.round" else {}
    nearest = apply("quantize.hqq", setting, bits=3, rounds=0, bias_correction="none")
    made = apply(method, setting, bits=3, samples=64, **options)
    assert drift(setting, made.program) < 0.5 * drift(setting, nearest.program)


@pytest.mark.parametrize("method", ["quantize.gptq", "quantize.round"])
def test_constant_data_are_noted(method, setting):
    program, context = setting
    batch = {next(iter(program.signature.arguments)): torch.zeros(16, 3, 8, 8)}
    task = context.task.__class__(
        loss=context.task.loss, metric=context.task.metric, train=[(batch, torch.zeros(16, 4))]
    )
    outcome = apply(method, (program, Context(task=task, original=program)), bits=3)
    assert any("constant" in note for note in outcome.notes)
    assert form_of(outcome.program, "one.weight").qmax == 3


@pytest.mark.parametrize("method", ["quantize.gptq", "quantize.round"])
def test_data_that_are_not_finite_are_refused(method, setting):
    program, context = setting
    batch = {next(iter(program.signature.arguments)): torch.full((4, 3, 8, 8), float("nan"))}
    task = context.task.__class__(
        loss=context.task.loss, metric=context.task.metric, train=[(batch, torch.zeros(4, 4))]
    )
    with pytest.raises(DataError, match="NaN or infinite"):
        apply(method, (program, Context(task=task, original=program)))


@pytest.mark.parametrize("method", METHODS)
def test_sites_that_match_nothing_name_the_nearest(method, setting):
    with pytest.raises(RecipeError, match=r"one\.weight"):
        apply(method, setting, sites=("one.weigth",))


def test_gptq_as_published_leaves_biases_alone(setting):
    made = apply("quantize.gptq", setting, bits=3, refit=False, passes=0).program
    folded = apply("quantize.hqq", setting, bits=3, bias_correction="none").program
    for name in ("stem.bias", "one.bias", "head.bias"):
        assert torch.equal(made.tensor(name), folded.tensor(name))


def test_gptq_with_fewer_samples_than_columns_says_so():
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 3)).eval(),
                      (torch.randn(4, 40),))  # fmt: skip
    held = (program, Context(task=own_outputs(program), original=program))
    outcome = apply("quantize.gptq", held, samples=8, first_last=None)
    assert any("8 calibration rows for 40 columns" in note for note in outcome.notes)


@pytest.mark.parametrize("kind", ["analytic", "empirical", "batch_norm"])
def test_corrected_biases_bring_the_mean_outputs_back(setting, kind):
    def shift(program):
        original, context = setting
        with torch.no_grad():
            means = [(program(**x) - original(**x)).mean(0) for x, _ in context.task.train]
        return float(torch.stack(means).mean(0).abs().sum())

    plain, corrected = (
        apply("quantize.hqq", setting, bits=2, samples=64, bias_correction=way).program
        for way in ("none", kind)
    )
    assert shift(corrected) < (1 if kind == "analytic" else 0.5) * shift(plain)


def test_round_without_steps_of_scales_keeps_them(setting):
    nearest = apply("quantize.hqq", setting, bits=3, rounds=0, bias_correction="none").program
    made = apply("quantize.round", setting, bits=3, reach=0.5, scales=False, biases=False,
                 steps=20).program  # fmt: skip
    for name in ("one.weight", "two.weight"):
        one, other = form_of(made, name), form_of(nearest, name)
        assert torch.equal(one.scale, other.scale)
        assert int((one.codes.int() - other.codes.int()).abs().max()) == 1
    assert torch.equal(made.tensor("one.bias"), nearest.tensor("one.bias"))


def test_round_leaves_weights_that_several_layers_read_to_nearest():
    module, inputs = zoo.make("tied_autoencoder")
    program = capture(module, inputs)
    held = (program, Context(task=own_outputs(program), original=program))
    outcome = apply("quantize.round", held, first_last=None)
    assert any("rounded to nearest" in note for note in outcome.notes)


def test_round_comes_closer_to_the_float_block(setting):
    made = apply("quantize.round", setting, bits=2, samples=64, steps=60, batch=16)
    (before, after), *_ = made.figures["errors"].values()
    assert list(made.figures["errors"]) == ["one.weight, two.weight"]  # the ends have 8 bits
    assert after < 0.7 * before


def test_round_learns_the_grids_of_activations_towards_the_float_network(setting):
    """BRECQ: weights and activations together; what is followed is the network without grids."""
    program, context = setting
    on_grids = method_class("quantize.static")(weights=False, samples=64, skip_above=None)
    start = on_grids.apply(program, Sites(), context).program
    for name in ("activations.relu_scale", "activations.relu_1_scale", "activations.relu_2_scale"):
        start.set_tensor(name, start.tensor(name) * 12)  # far too coarse: four bits of range lost
    held = (start, context)
    options = {"bits": 3, "samples": 64, "steps": 60, "batch": 16}
    fixed = apply("quantize.round", held, **options, scales=False)
    made = apply("quantize.round", held, **options)
    names = [n for n, _ in start.tensors() if n.startswith("activations.") and n.endswith("scale")]
    moved = [n for n in names if not torch.equal(made.program.tensor(n), start.tensor(n))]
    assert len(moved) >= 2 and all(bool(made.program.tensor(n) > 0) for n in names)
    assert all(torch.equal(fixed.program.tensor(n), start.tensor(n)) for n in names)
    assert drift(setting, made.program) < 0.7 * drift(setting, fixed.program)
    nearest = apply("quantize.hqq", held, bits=3, rounds=0, bias_correction="none")
    assert drift(setting, fixed.program) < 0.8 * drift(setting, nearest.program)
    form = form_of(made.program, "one.weight")
    assert form.qmax == 3 and torch.equal(form.decode(), made.program.tensor("one.weight"))


def test_round_takes_masks_that_are_made_behind_the_first_layer():
    class Masked(nn.Module):
        def __init__(self, late):
            super().__init__()
            self.one, self.two, self.late = nn.Linear(6, 8), nn.Linear(8, 3), late

        def forward(self, x, mask):
            wide = None if self.late else (1 - mask)[:, None]
            hidden = self.one(x)
            wide = (1 - mask)[:, None] if wide is None else wide
            return self.two(torch.relu(hidden * wide))

    inputs, made = (torch.randn(16, 6), torch.zeros(16).bernoulli(0.5)), []
    for late in (False, True):
        torch.manual_seed(0)
        program = capture(Masked(late).eval(), inputs)
        held = (program, Context(task=own_outputs(program), original=program))
        made.append(apply("quantize.round", held, bits=3, first_last=None, steps=20).program)
    with torch.no_grad():
        assert torch.equal(made[0](*inputs), made[1](*inputs))
