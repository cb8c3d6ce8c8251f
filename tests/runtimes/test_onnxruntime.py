"""ONNX Runtime gives the Program's numbers, with integer kernels where it should."""

import numpy as np
import onnx
import pytest
import torch

from laconic.core.errors import ExportError
from laconic.measuring.parity import parity
from laconic.runtimes import batch_of, fixed_shapes, get, names

ORT = get("onnxruntime")


def test_names_are_files_and_a_typing_error_is_helped():
    assert names() == ["inductor", "onnxruntime", "openvino"]
    with pytest.raises(Exception, match="openvino"):
        get("openvin")


def test_fp32_is_the_program(attention, tmp_path):
    path = ORT.write(attention, tmp_path / "m.onnx")
    runner = ORT.load(path, threads=1)
    assert runner.inputs == ("ids", "mask")
    assert runner.conditions["threads"] == 1
    report = parity(attention, runner.run, [attention.example])
    assert report.ok, report.failures
    assert ORT.files(path) == [path]


def test_a_runner_is_called_like_the_model(attention, tmp_path):
    model = ORT.load(ORT.write(attention, tmp_path / "m.onnx"), threads=1).as_model(
        attention.signature
    )
    ids = torch.randint(0, 50, (3, 9))
    given = model(ids=ids, mask=torch.ones_like(ids))
    wanted = attention(ids=ids, mask=torch.ones_like(ids))
    assert set(given) == {"mean", "tokens"}
    torch.testing.assert_close(given["mean"], wanted["mean"], atol=1e-5, rtol=1e-5)


def test_int8_runs_integer_kernels(quantized, tmp_path):
    import onnxruntime

    path = ORT.write(quantized, tmp_path / "m.onnx", "int8")
    runner = ORT.load(path, "int8", threads=1)
    report = parity(quantized, runner.run, [(torch.randn(16, 3, 16, 16),)], precision="int8")
    assert report.ok, report.failures
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "used.onnx")
    onnxruntime.InferenceSession(str(path), options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "used.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3
    assert "Conv" not in kinds


def test_what_cannot_be_done_is_said(residual, quantize, tmp_path):
    assert ORT.check(residual) == []
    assert "bf16" in ORT.check(residual, "bf16")[0]
    assert "quantize.static" in ORT.check(residual, "int8")[0]
    assert "8 bits" in ORT.check(quantize(residual, grid=(0, 999)), "int8")[0]
    with pytest.raises(ExportError, match="bf16"):
        ORT.write(residual, tmp_path / "m.onnx", "bf16")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_and_wrong_inputs_are_refused_in_words(residual, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"bad\.onnx"):
        ORT.load(tmp_path / "bad.onnx")
    runner = ORT.load(ORT.write(residual, tmp_path / "m.onnx"), threads=1)
    with pytest.raises(ExportError, match="refuses the inputs"):
        runner.run([np.zeros((1, 5, 16, 16), np.float32)])


def test_batches_for_timing_have_the_size_asked_for(residual, attention):
    assert fixed_shapes(residual, 7) == {"x": (7, 3, 16, 16)}
    assert fixed_shapes(attention, 1) == {"ids": (1, 12), "mask": (1, 12)}
    (batch,) = batch_of(residual, 7)
    assert batch.shape == (7, 3, 16, 16)
    assert (batch[4] == residual.example[0][0].numpy()).all()
