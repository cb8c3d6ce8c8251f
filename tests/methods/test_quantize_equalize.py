"""quantize.equalize: the function stays, the ranges of channels come together."""

import pytest
import torch
from torch import nn

from laconic.core.errors import RecipeError
from laconic.core.task import Task
from laconic.methods.base import Context
from laconic.methods.quantize.equalize import QuantizeEqualize
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.solvers.quantization.ranges import on_grid, weight_grid
from laconic.testing import zoo

EPS = torch.finfo(torch.float32).eps


def equalized(program, sites="*", **options):
    task = Task(loss=lambda o, t: o.sum(), metric=lambda o, t: o.flatten(1).sum(1))
    return QuantizeEqualize(**options).apply(
        program, Sites.of(sites), Context(task=task, original=program)
    )


def uneven(model, seed=0):
    """Rows of every layer but the last one apart by factors of up to a hundred."""
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for layer in layers[:-1]:
            factors = 100 ** torch.rand(len(layer.weight), generator=generator)
            layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.ndim - 1)))
            if layer.bias is not None:
                layer.bias.mul_(factors)
    return model.eval()


def same(program, made, x):
    with torch.no_grad():
        wanted, found = program(x), made(x)
    assert (wanted - found).abs().max() <= 256 * EPS * wanted.abs().max()


def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 6, 3), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(6, 4))  # fmt: skip


class Separable(nn.Module):
    """Expand, depthwise, project: all three share the channels between them."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.project(torch.relu(self.depthwise(torch.relu(self.expand(x)))))


def shares(weight, dim):
    """Range of every slice as a share of the largest one."""
    along = weight.detach().abs().movedim(dim, 0).flatten(1).amax(1)
    return along / along.max()


def test_rows_and_columns_get_equal_shares():
    torch.manual_seed(0)
    program = capture(uneven(plain()), torch.randn(2, 3, 8, 8))
    outcome = equalized(program)
    same(program, outcome.program, torch.randn(4, 3, 8, 8))
    for first, second in (("0", "3"), ("3", "7")):
        rows = shares(outcome.program.tensor(f"{first}.weight"), 0)
        columns = shares(outcome.program.tensor(f"{second}.weight"), 1)
        assert torch.allclose(rows, columns, rtol=0.05)
    for before, after in outcome.figures["spread"].values():
        assert after < before


def test_one_scale_a_tensor_suits_all_channels_afterwards():
    torch.manual_seed(0)
    model = uneven(plain())
    with torch.no_grad():  # every channel counts: what is large is read by small weights
        for first, second in ((model[0], model[3]), (model[3], model[7])):
            rows = first.weight.flatten(1).abs().amax(1)
            second.weight.div_(rows.reshape(1, -1, *[1] * (second.weight.ndim - 2)))
    program = capture(model, torch.randn(2, 3, 8, 8))
    outcome = equalized(program)
    x = torch.randn(16, 3, 8, 8)

    def loss(whole):
        rounded = whole.clone()
        for name in ("0.weight", "3.weight", "7.weight"):
            weight = rounded.tensor(name).detach()
            grid = weight_grid(weight, None, "minmax", 8)
            rounded.set_tensor(name, on_grid(weight, None, grid))
        with torch.no_grad():
            return float((rounded(x) - program(x)).square().mean())

    assert loss(outcome.program) < 0.1 * loss(program)


def test_a_depthwise_filter_has_two_scales():
    torch.manual_seed(0)
    program = capture(uneven(Separable()), torch.randn(2, 3, 8, 8))
    outcome = equalized(program)
    made = outcome.program
    same(program, made, torch.randn(4, 3, 8, 8))
    rows = shares(made.tensor("expand.weight"), 0)
    own = shares(made.tensor("depthwise.weight"), 0)
    columns = shares(made.tensor("project.weight"), 1)
    assert torch.allclose(rows, own, rtol=0.05)
    assert torch.allclose(own, columns, rtol=0.05)
    assert shares(program.tensor("expand.weight"), 0).min() < rows.min()


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "padded_shortcut", "unet"])
def test_models_with_streams_compute_the_same(name):
    model, example = zoo.make(name)
    program = capture(model, example)
    outcome = equalized(program)
    with torch.no_grad():
        wanted, found = program(*program.example), outcome.program(*program.example)
    assert (wanted - found).abs().max() <= 512 * EPS * max(1.0, float(wanted.abs().max()))


def test_what_is_not_homogeneous_keeps_its_scales():
    model = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3)).eval()
    program = capture(model, torch.randn(2, 4))
    outcome = equalized(program)
    assert torch.equal(outcome.program.tensor("0.weight"), program.tensor("0.weight"))
    assert any("multiple" in note for note in outcome.notes)


def test_a_dead_channel_keeps_its_scale():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[0].weight[2] = 0
    program = capture(model, torch.randn(2, 4))
    made = equalized(program).program
    assert torch.isfinite(made.tensor("2.weight")).all()
    same(program, made, torch.randn(5, 4))


def test_sites_that_match_nothing_are_refused():
    program = capture(plain().eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(RecipeError, match="nowhere"):
        equalized(program, "nowhere")
