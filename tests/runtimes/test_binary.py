"""Layers of signs: the kernel equals float convolution exactly, and Inductor uses it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.core.errors import ExportError, MissingExtra
from laconic.core.task import classification
from laconic.methods.base import Context
from laconic.methods.quantize.binary import QuantizeBinary
from laconic.program.capture import capture
from laconic.program.freezing import freeze
from laconic.program.sites import Sites
from laconic.runtimes import _binary
from laconic.runtimes._binary import BinaryLayer
from laconic.runtimes._binary_graph import replace_binary
from laconic.runtimes._export import lower_weights
from laconic.runtimes.inductor import Inductor
from laconic.solvers.quantization import insertion, placement
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.testing import zoo

# batch, channels, height, width, outputs, kernel, stride, padding
SHAPES = [
    (2, 64, 9, 7, 32, 3, 1, 1), (1, 70, 5, 5, 13, 3, 2, 1), (3, 3, 8, 8, 40, 1, 1, 0),
    (2, 130, 6, 4, 8, 5, 2, 2), (1, 1, 3, 3, 1, 3, 1, 2), (2, 64, 2, 2, 16, 3, 1, 1),
    (1, 32, 1, 1, 9, 3, 1, 1), (1, 128, 12, 12, 33, 2, 3, 0),
]  # fmt: skip


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_convolution_of_signs(shape, vectors):
    if vectors and not _binary.has_vectors():
        pytest.skip("this processor has no VPOPCNTDQ")
    batch, channels, height, width, outputs, kernel, stride, padding = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=generator)
    x[0, 0] = 0.0  # counts as +1
    codes = torch.randint(0, 2, (outputs, channels, kernel, kernel), generator=generator)
    scale, bias = torch.rand(outputs, generator=generator), torch.randn(outputs)
    threshold = torch.randn(channels, generator=generator) / 4
    signs = torch.where(x >= threshold[:, None, None], 1.0, -1.0)
    sums = F.conv2d(signs, codes * 2.0 - 1, stride=stride, padding=padding)
    layer = BinaryLayer.of(codes, scale, bias, threshold, stride, padding)
    for threads in (1, 2):
        found = layer(x, threads, vectors=vectors)
        wanted = sums * scale[:, None, None] + bias[:, None, None]
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("vectors", [False, True])
def test_equals_the_product_of_signs(vectors):
    if vectors and not _binary.has_vectors():
        pytest.skip("this processor has no VPOPCNTDQ")
    x = torch.randn(5, 100)
    codes = torch.randint(0, 2, (21, 100))
    found = BinaryLayer.of(codes, torch.tensor(0.5))(x, vectors=vectors)
    assert torch.equal(found, 0.5 * F.linear(torch.where(x >= 0, 1.0, -1.0), codes * 2.0 - 1))


def test_inputs_that_do_not_fit_are_refused():
    layer = BinaryLayer.of(torch.ones(4, 8, 3, 3), torch.tensor(1.0))
    with pytest.raises(ExportError, match="expected float32"):
        layer(torch.zeros(1, 9, 5, 5))
    with pytest.raises(ExportError, match="smaller than the kernel"):
        layer(torch.zeros(1, 8, 2, 5))


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_binary.shutil, "which", lambda name: None)
    with pytest.raises(MissingExtra, match="C compiler"):
        _binary.library.__wrapped__()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingExtra, match="no such luck"):
        _binary.library.__wrapped__()


def binary_net():
    """Two convolutions of signs between float ones; batch norm keeps sums away from zero."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64),
        nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(96, 10),
    )  # fmt: skip
    torch.manual_seed(0)
    program = capture(zoo.shake(model, 1).eval(), torch.randn(2, 3, 12, 12))
    program.propagate()
    sites = [s for s in weight_sites(program)[0] if s.name in ("2.weight", "4.weight")]
    for place in placement.places(program, sites, []):
        insertion.insert_activation_levels(program, place, torch.tensor(0.5), "binary")
    for site in sites:
        scale = program.tensor(site.name).detach().abs().flatten(1).mean(1)
        insertion.insert_levels(program, site, 0, scale, "binary")
    program.recompile()
    return program


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_of_signs_are_found(frozen):
    program = binary_net()
    x = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        wanted = program(x)
        found: list[int] = []
        held = freeze(program) if frozen else program
        module = lower_weights(held, lambda graph: found.append(replace_binary(graph, 1)))
        torch.testing.assert_close(module(x)[0], wanted, rtol=1e-5, atol=1e-5)
    assert found == [2]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(inner)))


def test_what_quantize_binary_trains_runs_on_the_kernel():
    torch.manual_seed(0)
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                          Block(32), *ends)  # fmt: skip
    x, labels = torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,))
    program = capture(model.eval(), x[:2])
    task = classification(train=[(x, labels)], calibration=[(x, labels)])
    context = Context(task=task, original=program)
    made = QuantizeBinary(steps=2, samples=32).apply(program, Sites(), context).program.eval()
    found: list[int] = []
    module = lower_weights(made, lambda graph: found.append(replace_binary(graph, 1)))
    assert found == [2]
    with torch.no_grad():
        torch.testing.assert_close(module(x)[0], made(x), rtol=1e-4, atol=1e-5)


def test_narrow_layers_stay_floats():
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).eval()
    program = capture(model, torch.randn(2, 8, 5, 5))
    program.propagate()
    (site,) = weight_sites(program)[0]
    (place,) = placement.places(program, [site], [])
    insertion.insert_activation_levels(program, place, torch.tensor(1.0), "binary")
    insertion.insert_levels(program, site, None, torch.tensor(1.0), "binary")
    assert replace_binary(program.clone().as_graph_module(), 1) == 0


@pytest.mark.slow
def test_inductor_runs_them(tmp_path):
    program = binary_net()
    path = Inductor().write(program, tmp_path / "net.pt2", threads=1)
    x = np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype(np.float32)
    (found,) = Inductor().load(path, threads=1).run([x])
    with torch.no_grad():
        wanted = program(torch.from_numpy(x)).numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
