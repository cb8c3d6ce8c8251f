"""Weights on grids of runs and on fixed levels, exported: every runtime computes what the Program does."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from laconic.core.registry import load
from laconic.forms import levels
from laconic.program.capture import capture
from laconic.program.freezing import freeze, thaw
from laconic.program.program import Program
from laconic.runtimes.base import Runtime
from laconic.runtimes.inductor import _exported
from laconic.solvers.quantization import insertion, placement, ranges
from laconic.solvers.quantization.weight_sites import weight_sites

RUNTIMES = ["onnxruntime", "openvino"]


class Net(nn.Module):
    """Convolutions (one transposed, one grouped), a matrix used turned, a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 12)
        self.last = nn.Parameter(torch.randn(12, 6))

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.first(x))))
        x = self.up(x).mean((2, 3))
        return torch.relu(self.head(x)) @ self.last


def network() -> Program:
    torch.manual_seed(0)
    program = capture(Net().eval(), torch.randn(2, 3, 8, 8)).clone()
    program.propagate()
    return program


def run_of(weight, axis) -> int:
    size = weight.numel() // weight.shape[axis]
    return size // 3 if size % 3 == 0 else size // 4


def grouped(symmetric: bool, bits: int = 4) -> Program:
    """Every weight on grids of runs of a third or a quarter of its slices."""
    program = network()
    for site in weight_sites(program)[0]:
        weight = program.tensor(site.name).detach()
        group = run_of(weight, site.axis)
        grid = ranges.weight_grid(
            weight, site.axis, "minmax", bits, group=group, symmetric=symmetric
        )
        assert grid.scale.ndim == 2 and grid.scale.shape[1] > 1
        insertion.quantize_weight(program, site, site.axis, grid)
    program.recompile()
    return program


def runs(runtime: str, program: Program, folder) -> list[np.ndarray]:
    backend = load("laconic.runtimes", runtime, Runtime)()
    assert backend.check(program) == []
    path = backend.write(program, folder / f"model{backend.suffix}")
    return backend.load(path).run([value.numpy() for value in program.example])


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("state", "symmetric"), [("training", True), ("frozen", False)])
def test_grids_of_runs_are_exact_in_a_runtime(runtime, symmetric, state, tmp_path):
    program = grouped(symmetric)
    wanted = program.run_flat(*program.example)
    program = freeze(program) if state == "frozen" else program
    for one, other in zip(wanted, program.run_flat(*program.example), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(wanted, runs(runtime, program, tmp_path), strict=True):
        # the same weights: what differs is the order of float32 sums
        assert np.allclose(one.detach().numpy(), other, rtol=1e-4, atol=1e-5)


def test_codes_of_runs_are_integers_in_the_file(tmp_path):
    backend = load("laconic.runtimes", "onnxruntime", Runtime)()
    path = backend.write(freeze(grouped(True)), tmp_path / "m.onnx")
    held = {t.name: t for t in onnx.load(str(path)).graph.initializer}
    codes = [t for t in held.values() if t.data_type == onnx.TensorProto.INT8]
    elements = sum(int(np.prod(t.dims)) for t in codes if len(t.dims) == 2)
    program = network()
    sites = weight_sites(program)[0]
    assert elements == sum(program.tensor(site.name).numel() for site in sites)


def on_levels(name: str) -> Program:
    """Every weight, and the input, on fixed levels, frozen."""
    program = network()
    sites = weight_sites(program)[0]
    # of the activations only the input: elsewhere sums of another order could cross a border
    place = next(p for p in placement.places(program, sites, []) if p.source.op == "placeholder")
    scale = torch.tensor(0.003 if name == "fp8_e4m3" else 0.4)
    insertion.insert_activation_levels(program, place, scale, name)
    for site in weight_sites(program)[0]:
        weight = program.tensor(site.name).detach()
        group = run_of(weight, site.axis)
        scale = ranges.level_scale(weight, site.axis, name, "minmax", group=group)
        insertion.insert_levels(program, site, site.axis, scale, name)
    program.recompile()
    return freeze(program)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", levels.NAMES)
def test_levels_of_weights_and_activations_are_those_of_the_program(runtime, name, tmp_path):
    program = on_levels(name)
    for one, other in zip(
        program.run_flat(*program.example), runs(runtime, program, tmp_path), strict=True
    ):
        assert np.allclose(one.detach().numpy(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_weights_are_fp8_bytes_in_the_file(name, tmp_path):
    backend = load("laconic.runtimes", "onnxruntime", Runtime)()
    program = on_levels(name)
    kind = {"fp8_e4m3": "FLOAT8E4M3FN", "fp8_e5m2": "FLOAT8E5M2"}[name]
    for number, each in enumerate((program, thaw(program))):
        path = backend.write(each, tmp_path / f"{number}.onnx")
        stored = onnx.load(str(path)).graph.initializer
        bytes_ = [t for t in stored if t.data_type == getattr(onnx.TensorProto, kind)]
        sites = weight_sites(network())[0]
        elements = sum(program.tensor(site.name).numel() for site in sites)
        assert sum(int(np.prod(t.dims)) for t in bytes_) == elements
        assert sum(len(t.raw_data) for t in bytes_) == elements


class Products(nn.Module):
    """Linear layers on sequences and on rows, with and without bias, and a stored right factor."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 48), nn.Linear(48, 32, bias=False)
        self.right = nn.Parameter(torch.randn(32, 32))
        self.rows = nn.Linear(32, 16)

    def forward(self, x):
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.rows((x @ self.right).mean(1))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (4, False)])
def test_products_with_groups_are_blocks_of_integers(runtime, bits, symmetric, tmp_path):
    torch.manual_seed(0)
    program = capture(Products().eval(), torch.randn(2, 5, 64)).clone()
    program.propagate()
    for site in weight_sites(program)[0]:
        weight = program.tensor(site.name)
        grid = ranges.weight_grid(weight, site.axis, "minmax", bits, group=16, symmetric=symmetric)
        insertion.quantize_weight(program, site, site.axis, grid)
    program.recompile()
    (wanted,), (found,) = program.run_flat(*program.example), runs(runtime, program, tmp_path)
    assert np.allclose(wanted.detach().numpy(), found, rtol=1e-4, atol=1e-4)
    if runtime == "openvino":
        return
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert not {"Reshape", "Gemm"} & {node.op_type for node in graph.node}
    kind = onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8
    held = {t.name: t for t in graph.initializer if t.data_type == kind and len(t.dims) == 2}
    codes = sum(int(np.prod(t.dims)) for t in held.values())
    weights = 64 * 48 + 48 * 32 + 32 * 32 + 32 * 16
    assert codes == weights + (0 if symmetric else weights // 16)  # nothing is stored twice


def test_onnxruntime_keeps_floats_in_front_of_integer_weights(tmp_path):
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(2, 5, 64)).clone()
    program.propagate()
    (site,) = weight_sites(program)[0]
    grid = ranges.weight_grid(program.tensor(site.name), site.axis, "minmax", 8)
    insertion.quantize_weight(program, site, site.axis, grid)
    program.recompile()
    (wanted,), (found,) = program.run_flat(*program.example), runs("onnxruntime", program, tmp_path)
    assert np.allclose(wanted.detach().numpy(), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", levels.NAMES)
def test_what_inductor_compiles_computes_the_levels(name):
    program = on_levels(name)
    lowered = _exported(program, "fp32", None, 1).module()  # building it takes ten seconds
    for one, other in zip(
        program.run_flat(*program.example), lowered(*program.example), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
