"""quantize.awq: scaling is exact before rounding, and pays where channels differ."""

import pytest
import torch
from torch import nn

from laconic.methods.base import Context
from laconic.methods.quantize.awq import Awq
from laconic.methods.quantize.hqq import Hqq
from laconic.program.capture import capture
from laconic.program.freezing import form_of
from laconic.program.sites import Sites
from laconic.solvers.quantization.salience import places, protect
from laconic.solvers.quantization.weight_rounding import GridOptions, opened
from laconic.testing import zoo
from laconic.testing.contracts import own_outputs

OPEN = GridOptions(bits=3, first_last=None)


class Uneven(nn.Module):
    """Hidden channels of very different sizes, behind a layer norm and behind a ReLU."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.norm.weight[::4] *= 30
            self.one.weight[::8] *= 30

    def forward(self, x):
        return self.two(torch.relu(self.one(self.norm(x))))


def setting(module, example):
    program = capture(module.eval(), (example,))
    return program, Context(task=own_outputs(program), original=program)


@pytest.fixture(scope="module")
def uneven():
    torch.manual_seed(0)
    return setting(Uneven(), torch.randn(16, 6, 16))


def outputs(program, context):
    with torch.no_grad():
        return torch.cat([program(**x) for x, _ in context.task.train])


def test_both_kinds_of_places_are_found(uneven):
    program, context = uneven
    made = places(opened(program, Sites(), OPEN, context))
    held = {layer.weight: place for place in made for layer, _ in place.readers}
    assert held["two.weight"].region is not None
    assert held["one.weight"].norm is not None


def test_scaling_alone_changes_nothing(uneven):
    program, context = uneven
    work = opened(program, Sites(), OPEN, context)
    before = {name: tensor.clone() for name, tensor in work.program.tensors()}
    chosen = protect(work, context, 64, 8)
    assert len(chosen) == 2
    for name in ("one.weight", "two.weight", "norm.weight"):
        assert not torch.equal(work.program.tensor(name), before[name])
    wanted = outputs(program, context)
    spread = float(wanted.std())
    # a few roundings to float32 in each of three layers, and sums of up to 32 products
    torch.testing.assert_close(
        outputs(work.program, context), wanted, rtol=0, atol=1e-5 * spread + 1e-6
    )


@pytest.mark.parametrize("model", ["resnet", "plain_cnn", "unet", "densenet", "fused_split"])
def test_scaling_changes_no_network_of_the_zoo(model):
    module, inputs = zoo.make(model)
    program = capture(module, inputs)
    context = Context(task=own_outputs(program), original=program)
    work = opened(program, Sites(), OPEN, context)
    protect(work, context, 8, 4)
    with torch.no_grad():
        before, after = program.run_flat(*program.example), work.program.run_flat(*program.example)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_better_than_nearest_where_channels_differ(uneven):
    program, context = uneven
    wanted = outputs(program, context)
    options = {"bits": 3, "first_last": None, "samples": 64, "bias_correction": "none"}
    nearest = Hqq(rounds=0, **options).apply(program, Sites(), context)
    made = Awq(**options).apply(program, Sites(), context)
    errors = [float((outputs(o.program, context) - wanted).square().sum()) for o in (nearest, made)]
    assert errors[1] < 0.7 * errors[0]
    assert all(0 < exponent < 1 for exponent in made.figures["exponents"].values())
    assert form_of(made.program, "two.weight").qmax == 3


def test_one_try_is_rounding_to_nearest(uneven):
    program, context = uneven
    options = {"bits": 4, "bias_correction": "none"}
    plain = Hqq(rounds=0, **options).apply(program, Sites(), context)
    made = Awq(tries=1, **options).apply(program, Sites(), context)
    assert any("no channels were scaled" in note for note in made.notes)
    assert torch.equal(outputs(made.program, context), outputs(plain.program, context))
