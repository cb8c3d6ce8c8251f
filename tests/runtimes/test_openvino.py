"""OpenVINO gives the Program's numbers, with integer kernels, and tells nobody."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from laconic.core.errors import ExportError
from laconic.core.task import embedding
from laconic.measuring.parity import parity
from laconic.methods.base import Context, method_class
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.runtimes import fixed_shapes, get
from laconic.runtimes.openvino import openvino

OV = get("openvino")


def _kernels(runner):
    """Layer kind → the data types its instances compute in."""
    found = {}
    for node in runner.compiled.get_runtime_model().get_ops():
        about = node.get_rt_info()
        found.setdefault(about["layerType"].value, []).append(about["runtimePrecision"].value)
    return found


@pytest.mark.parametrize("source", ["onnx", "xml"])
def test_fp32_is_the_program_for_any_size(attention, source, tmp_path):
    runtime = OV if source == "xml" else get("onnxruntime")
    path = runtime.write(attention, tmp_path / f"m.{source}")
    runner = OV.load(path, threads=1)
    assert runner.inputs == ("ids", "mask")
    for batch, length in ((1, 5), (3, 20)):
        ids = torch.randint(0, 50, (batch, length))
        report = parity(attention, runner.run, [{"ids": ids, "mask": torch.ones_like(ids)}])
        assert report.ok, report.failures


def test_fixed_shapes_give_the_same_numbers_and_are_fixed(residual, tmp_path):
    path = OV.write(residual, tmp_path / "m.xml")
    runner = OV.load(path, threads=1, shapes=fixed_shapes(residual, 2))
    report = parity(residual, runner.run, [(torch.randn(2, 3, 16, 16),)])
    assert report.ok, report.failures
    with pytest.raises(ExportError, match="refuses the inputs"):
        runner.run([np.zeros((3, 3, 16, 16), np.float32)])


def test_a_part_of_the_cores_is_not_always_the_same_part(residual, tmp_path, monkeypatch):
    path = OV.write(residual, tmp_path / "m.xml")
    monkeypatch.setattr("laconic.runtimes.openvino.cores", lambda: 4)
    runner = OV.load(path, threads=1)  # pinned, two processes would share the first core
    assert not runner.compiled.get_property("ENABLE_CPU_PINNING")


def test_int8_runs_integer_kernels_and_fuses_the_residual_addition(quantized, tmp_path):
    path = OV.write(quantized, tmp_path / "m.xml", "int8")
    runner = OV.load(path, "fp32", 1, fixed_shapes(quantized, 16))
    report = parity(quantized, runner.run, [(torch.randn(16, 3, 16, 16),)], precision="int8")
    assert report.ok, report.failures
    kernels = _kernels(runner)
    assert len(kernels["Convolution"]) == 3
    assert set(kernels["Convolution"]) <= {"u8", "i8"}
    assert set(kernels["FullyConnected"]) <= {"u8", "i8"}
    assert "Eltwise" not in kernels  # the addition is part of a convolution


class Tokens(nn.Module):
    """Patches of an image as tokens: the convolution is as wide as the layers behind it."""

    def __init__(self, width=32):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def test_layers_of_one_width_all_run_in_integers(tmp_path):
    """Their zero points are one constant, which OpenVINO takes for the float input of many."""
    x = torch.randn(16, 3, 16, 16)
    program = capture(Tokens().eval(), (x[:2],))
    context = Context(task=embedding(calibration=[((x,), None)]), original=program)
    made = method_class("quantize.static")().apply(program, Sites(), context).program
    runner = OV.load(OV.write(made, tmp_path / "m.xml", "int8"), "int8", 1)
    kernels = _kernels(runner)
    assert (len(kernels["Convolution"]), len(kernels["FullyConnected"])) == (1, 3)
    assert {*kernels["Convolution"], *kernels["FullyConnected"]} <= {"u8", "i8"}
    assert parity(made, runner.run, [(x,)], precision="int8").ok


def test_int8_weights_are_integers_on_disk(quantized, residual, tmp_path):
    whole = OV.write(residual, tmp_path / "f.xml").with_suffix(".bin").stat().st_size
    path = OV.write(quantized, tmp_path / "q.xml", "int8")
    assert [file.name for file in OV.files(path)] == ["q.xml", "q.bin"]
    weights = sum(tensor.numel() for _, tensor in residual.tensors() if tensor.ndim > 1)
    beside = path.with_suffix(".bin").stat().st_size - weights
    assert 0 < beside < 0.1 * whole  # biases, scales, shapes


def test_bf16_is_near_and_half_the_size(residual, tmp_path):
    if OV.check(residual, "bf16"):
        pytest.skip(OV.check(residual, "bf16")[0])
    whole = OV.write(residual, tmp_path / "f.xml").with_suffix(".bin").stat().st_size
    path = OV.write(residual, tmp_path / "h.xml", "bf16")
    assert path.with_suffix(".bin").stat().st_size < 0.55 * whole
    runner = OV.load(path, "bf16", 1)
    assert runner.conditions["float"] == "bf16"
    report = parity(residual, runner.run, [(torch.randn(16, 3, 16, 16),)], precision="bf16")
    assert report.ok, report.failures


def test_what_cannot_be_done_is_said(residual, tmp_path):
    assert OV.check(residual) == []
    assert "quantize.static" in OV.check(residual, "int8")[0]
    with pytest.raises(ExportError, match="no such file"):
        OV.load(tmp_path / "none.xml")
    (tmp_path / "bad.xml").write_text("<not a model")
    with pytest.raises(ExportError, match=r"bad\.xml"):
        OV.load(tmp_path / "bad.xml")


def test_its_telemetry_is_never_loaded():
    code = (
        "import sys, laconic.runtimes as r\n"
        "assert 'openvino' not in sys.modules\n"
        "from laconic.runtimes.openvino import openvino\n"
        "openvino().Core()\n"
        "assert not [m for m in sys.modules if m.startswith('openvino_telemetry')]\n"
        "from openvino.tools.ovc import telemetry\n"
        "assert type(telemetry).__module__ == 'openvino.tools.ovc.telemetry_stub'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_block_on_telemetry_is_lifted_again():
    openvino()
    assert sys.modules.get("openvino_telemetry", "absent") is not None
