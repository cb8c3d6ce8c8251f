"""Bad input to every quantisation: an error that names the place, or a fallback said in a note.

In every case the Program that was given stays what it was, bit for bit.
"""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.errors import DataError, RecipeError, TrainingError
from laconic.core.recipe import Step
from laconic.core.task import classification
from laconic.methods.base import Context, method_class, method_names, method_of
from laconic.program.capture import capture
from laconic.program.sites import Sites

METHODS = [name for name in method_names() if name.startswith("quantize.")]
TRAINING = {"steps": 2, "precision": "fp32", "evaluations": 1, "teacher": "torch"}
NO_DATA = {"quantize.dynamic", "quantize.equalize"}
MEASURED = {"quantize.where"}  # by the clock, and on what another method has quantised
RUN = [name for name in METHODS if name not in MEASURED]


class Net(nn.Module):
    """[batch, 3, 6, 6] -> [batch, 4]: a residual block, layers on a sequence, two in a row."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d, self.e = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.n(self.a(x)))
        x = (x + F.relu(self.b(x))).flatten(2).transpose(1, 2)
        return self.e(self.d(F.relu(self.c(x)))).mean(1)


@functools.cache
def net(change=lambda model: None):
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        change(model)
    return capture(model, torch.randn(2, 3, 6, 6))


def batches(change=lambda x: None):
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(2)]
    change(made[0])
    return [(x, torch.arange(8) % 4) for x in made]


def apply(method, program, data, **options):
    """The outcome with the method's quick options; the input is looked after."""
    made = method_class(method)
    options = {**made.quick, **(TRAINING if made.trains else {}), **options}
    code, before = str(program.graph), {k: t.clone() for k, t in program.state_dict().items()}
    context = Context(task=classification(train=data, validation=data[1:]),
                      original=program.clone(), seed=1)  # fmt: skip
    try:
        return made(**options).apply(program, Sites(), context)
    finally:
        assert str(program.graph) == code and not program.training
        for name, tensor in program.state_dict().items():
            assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


def distance(program, made):
    """Squared distance of the outputs on ordinary inputs, relative to their energy."""
    with torch.no_grad():
        wanted, found = program.run_flat(*program.example), made.run_flat(*program.example)
    assert bool(found[0].isfinite().all())
    energy = (wanted[0] - wanted[0].mean()).double().square().sum().clamp(min=1e-12)
    return float((wanted[0] - found[0]).double().square().sum() / energy)


def with_value(program, name, value):
    made, weight = program.clone(), program.tensor(name).detach().clone()
    weight.view(-1)[3] = value
    made.set_tensor(name, weight)
    return made


# what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", RUN)
@pytest.mark.parametrize("name", ["b.weight", "c.bias"])
def test_a_network_that_diverged_is_refused_by_the_name_of_the_tensor(method, name):
    for bad in (float("nan"), float("-inf")):
        with pytest.raises(DataError, match="1 of .* values are NaN or infinite") as caught:
            apply(method, with_value(net(), name, bad), batches())
        assert caught.value.where == name


@pytest.mark.parametrize("method", [name for name in RUN if name not in NO_DATA])
def test_nan_in_the_data_is_refused_by_the_name_of_the_input(method):
    data = batches(lambda x: x.view(-1)[7:8].fill_(float("nan")))
    with pytest.raises(DataError, match="batch 0: input x: 1 of 864 values are NaN"):
        apply(method, net(), data)


BITS = [
    *((f"quantize.{name}", "bits") for name in ("static", "dynamic", "weights", "round", "gptq",
                                                "hqq", "awq", "rotate", "train")),
    *((f"quantize.{name}", "first_last") for name in ("weights", "round", "train", "binary")),
    ("quantize.dynamic", "activation_bits"), ("quantize.rotate", "activation_bits"),
    ("quantize.train", "activations"), ("quantize.train", "lowering"), ("quantize.mixed", "widths"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "option"), BITS)
def test_bits_0_and_17_are_refused_by_the_name_of_the_option(method, option):
    for bits in (0, 17):
        value = [bits] if option in ("lowering", "widths") else bits
        with pytest.raises(RecipeError, match=option):
            method_of(Step(method=method, sites="*", options={option: value}), "step 1")


# what is fallen back from -------------------------------------------------------------------

SAYS = {
    "quantize.static": "x: stays float, outliers",
    "quantize.train": "x: stays float, outliers",
    "quantize.binary": "x: stays float, outliers",
    "quantize.weights": "biases stay uncorrected: outliers",
    "quantize.hqq": "biases stay uncorrected: outliers",
    "quantize.awq": "biases stay uncorrected: outliers",
    "quantize.gptq": "b.weight: rounded to nearest",
    "quantize.round": "b.weight: rounded to nearest, learning it diverged",
}  # fmt: skip


@pytest.mark.parametrize("method", RUN)
def test_an_outlier_of_1e30_in_the_data_spoils_nothing(method):
    """What the means and ranges of such data would ruin is left alone, and said."""
    options = {"quantize.train": {"activations": 8}}.get(method, {})
    if method in ("quantize.weights", "quantize.hqq"):
        options = {"bias_correction": "empirical"}
    data = batches(lambda x: x.view(-1)[5:6].fill_(1e30))
    program = net()
    outcome = apply(method, program, data, **options)
    assert distance(program, outcome.program) < (1.0 if method_class(method).trains else 0.3)
    said = SAYS.get(method, "")
    assert not said or any(said in note for note in outcome.notes), outcome.notes


@pytest.mark.parametrize("method", RUN)
def test_an_outlier_of_1e30_among_the_weights_gives_finite_numbers_or_says_that_it_diverged(method):
    program = with_value(net(), "b.weight", 1e30)
    try:
        made = apply(method, program, batches()).program
    except (TrainingError, DataError) as error:
        assert method_class(method).trains and ("the loss became" in str(error) or error.where)
        return
    assert all(bool(t.isfinite().all()) for _, t in made.tensors() if t.is_floating_point())
    distance(program, made)


def odd(model):
    """Constant, all zero, and too small to be told from zero; one activation is always zero."""
    model.a.weight.fill_(0.25)
    model.n.bias.fill_(-9.0)
    model.b.weight.zero_()
    model.d.weight.fill_(1e-42)


NEVER = {
    "quantize.static": "relu: stays float, only zeros",
    "quantize.train": "relu: stays float, only zeros",
    "quantize.binary": "relu: stays float, only zeros",
    "quantize.gptq": "b.weight: rounded to nearest",
}


@pytest.mark.parametrize("method", RUN)
def test_constant_tensors_and_an_activation_never_seen(method):
    program = net(odd)
    options = {"quantize.train": {"activations": 8}}.get(method, {})
    options |= {"prelu": False, "shortcuts": False} if method == "quantize.binary" else {}
    outcome = apply(method, program, batches(), **options)
    assert all(
        bool(t.isfinite().all()) for _, t in outcome.program.tensors() if t.is_floating_point()
    )
    said = NEVER.get(method, "")
    assert not said or any(said in note for note in outcome.notes), outcome.notes
    with torch.no_grad():
        assert bool(outcome.program.run_flat(*program.example)[0].isfinite().all())


@pytest.mark.parametrize("method", RUN)
def test_constant_data(method):
    data = [(torch.full((8, 3, 6, 6), 0.5), torch.zeros(8, dtype=torch.long))] * 2
    outcome = apply(method, net(), data)
    with torch.no_grad():
        assert bool(outcome.program.run_flat(*outcome.program.example)[0].isfinite().all())
    if method in ("quantize.gptq", "quantize.round") or method_class(method).trains:
        assert any("same constant" in note for note in outcome.notes)


@pytest.mark.parametrize("method", ["quantize.awq", "quantize.mixed"])
def test_a_group_that_does_not_divide_is_noted(method):
    outcome = apply(method, net(), batches(), group=5)
    assert any(note.startswith("b.weight: one scale a channel") for note in outcome.notes)
