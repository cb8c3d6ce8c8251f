"""AOTInductor packages give the Program's numbers and refuse what they were not built for."""

import zipfile

import pytest
import torch

from laconic.core.errors import ExportError
from laconic.measuring.parity import parity
from laconic.runtimes import fixed_shapes, get
from laconic.runtimes.inductor import _exported

INDUCTOR = get("inductor")


def test_what_cannot_be_done_is_said(residual, monkeypatch):
    assert "quantisation" in INDUCTOR.check(residual, "int8")[0]
    monkeypatch.setattr("laconic.runtimes.inductor.shutil.which", lambda name: None)
    assert "compiler" in INDUCTOR.check(residual)[0]


def test_no_operator_of_ours_is_left_and_the_numbers_are_the_programs(quantized):
    exported = _exported(quantized, "fp32", None, 1)
    assert not [n for n in exported.graph.nodes if "laconic" in str(n.target)]
    x = torch.randn(3, 3, 16, 16)
    (given,) = exported.module()(x)
    assert torch.equal(given, quantized(x))


def test_bf16_computes_products_in_bf16_and_returns_fp32(residual):
    exported = _exported(residual, "bf16", None, 1)
    heavy = [
        n for n in exported.graph.nodes if str(n.target).startswith(("aten.conv2d", "aten.linear"))
    ]
    assert len(heavy) == 4
    assert all(n.meta["val"].dtype is torch.bfloat16 for n in heavy)

    def run(arrays):
        return [y.detach().numpy() for y in exported.module()(*map(torch.from_numpy, arrays))]

    report = parity(residual, run, [(torch.randn(8, 3, 16, 16),)], precision="bf16")
    assert report.ok, report.failures


@pytest.mark.slow
def test_a_package_is_the_program(residual, tmp_path):
    if INDUCTOR.check(residual):
        pytest.skip(INDUCTOR.check(residual)[0])
    path = INDUCTOR.write(residual, tmp_path / "m.pt2", "fp32", 1)
    runner = INDUCTOR.load(path, "fp32", 1)
    batches = [(torch.randn(n, 3, 16, 16),) for n in (1, 5)]
    report = parity(residual, runner.run, batches)
    assert report.ok, report.failures
    with pytest.raises(ExportError, match="threads 1, asked for 3"):
        INDUCTOR.load(path, "fp32", 3)
    with pytest.raises(ExportError, match="precision"):
        INDUCTOR.load(path, "bf16", 1)


def test_int8_stands_in_the_words_that_become_integer_kernels(quantized):
    exported = _exported(quantized, "int8", None, 1)
    x = torch.randn(3, 3, 16, 16)
    (given,) = exported.module()(x)
    assert torch.equal(given, quantized(x))
    named = [str(n.target).split(".")[1] for n in exported.graph.nodes if "." in str(n.target)]
    assert not [n for n in exported.graph.nodes if "laconic" in str(n.target)]
    readers = {"conv2d", "linear"}
    heavy = [n for n in exported.graph.nodes if str(n.target).split(".")[1:2] and
             str(n.target).split(".")[1] in readers]  # fmt: skip
    assert named.count("dequantize_per_channel") == len(heavy)
    assert named.count("quantize_per_tensor") == named.count("dequantize_per_tensor") > 0


def test_without_the_instructions_int8_is_refused(quantized, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert "VNNI" in INDUCTOR.check(quantized, "int8")[-1]


@pytest.mark.slow
def test_an_int8_package_runs_on_integer_kernels(quantized, tmp_path):
    if INDUCTOR.check(quantized, "int8"):
        pytest.skip(INDUCTOR.check(quantized, "int8")[0])
    path = INDUCTOR.write(quantized, tmp_path / "m.pt2", "int8", 1)
    with zipfile.ZipFile(path) as package:
        wrappers = [n for n in package.namelist() if n.endswith(".wrapper.cpp")]
        code = "".join(package.read(name).decode() for name in wrappers)
    assert "aoti_torch_cpu__qconv" in code
    runner = INDUCTOR.load(path, "int8", 1)
    batches = [(torch.randn(n, 3, 16, 16),) for n in (1, 5)]
    report = parity(quantized, runner.run, batches, precision="int8")
    assert report.ok, report.failures


def test_a_fixed_size_is_fixed(residual):
    exported = _exported(residual, "fp32", fixed_shapes(residual, 2), 1)
    (node,) = [n for n in exported.graph.nodes if n.name == "x"]
    assert tuple(node.meta["val"].shape) == (2, 3, 16, 16)


def test_what_is_no_package_is_refused(tmp_path):
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="no Inductor package"):
        INDUCTOR.load(tmp_path / "bad.pt2")
