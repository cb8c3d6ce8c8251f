"""Every verb on one small job, from the task file to predictions."""

import json

import numpy as np
import torch

import laconic as library

from .conftest import said


def test_the_version_is_said(laconic):
    assert said(laconic("--version")).strip() == f"laconic {library.__version__}"


def test_a_job_from_start_to_end(laconic, task_file, tmp_path):
    out = tmp_path / "out"
    task = task_file()
    steps = ("--step", "simplify.fold", "--step", "quantize.static samples=64")
    done = laconic("compress", task, *steps, "--minimize", "size", "--threads", 1, "--out", out)
    text = said(done)
    assert done.exit_code == 0, text
    assert "before and after" in text
    assert {p.name for p in out.iterdir()} == {
        "model.laconic", "model.onnx", "model.xml", "model.bin", "report.html", "result.json",
        "recipe.yaml",
    }  # fmt: skip
    told = json.loads((out / "result.json").read_text())
    assert told["provenance"]["seed"] == 0
    assert str(tmp_path.parent) not in json.dumps(told["provenance"]).replace(
        str(task), ""
    ).replace(str(out), "")
    _replays(laconic, task, out, tmp_path)
    _runs_everywhere(laconic, out, tmp_path)
    for command, says in (
        (["inspect", out, "--groups"], "2.weight"),
        (["inspect", out, "--runtime", "onnxruntime"], "total"),
        (["measure", out / "model.laconic", out / "model.xml", "--batch", 4], "model.xml"),
        (["export", out / "model.laconic", "--to", "onnx", "-o", tmp_path / "n.onnx"], "wrote"),
        (["report", out], "report.html"),
        (["methods"], "quantize.static"),
        (["methods", "distill.logits"], "temperature"),
    ):
        result = laconic(*command)
        assert result.exit_code == 0, said(result)
        assert says in said(result)


def _replays(laconic, task, out, tmp_path):
    """The saved recipe gives the very same program, bit for bit."""
    again = tmp_path / "again"
    recipe = out / "recipe.yaml"
    done = laconic("compress", task, "--recipe", recipe, "--threads", 1, "--out", again)
    assert done.exit_code == 0, said(done)
    first, second = (library.load(folder) for folder in (out, again))
    for (name, one), (other, two) in zip(first.tensors(), second.tensors(), strict=True):
        assert name == other
        assert torch.equal(one, two)


def _runs_everywhere(laconic, out, tmp_path):
    """Predictions of all files agree within what int8 may differ by."""
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    found = []
    for name in ("model.laconic", "model.onnx", "model.xml"):
        result = laconic("run", out / name, tmp_path / "x.npz", "-o", tmp_path / "y.npz")
        assert result.exit_code == 0, said(result)
        with np.load(tmp_path / "y.npz") as held:
            assert list(held) == ["output"]
            found.append(held["output"])
    scale = np.abs(found[0]).max()
    for other in found[1:]:
        assert np.abs(other - found[0]).max() <= 0.05 * scale
    result = laconic("run", out / "model.onnx", tmp_path / "x.npz", "-o", tmp_path / "y.json")
    assert result.exit_code == 0
    listed = json.loads((tmp_path / "y.json").read_text())
    np.testing.assert_allclose(np.array(listed["output"]), found[1], rtol=1e-6)
    np.savez(tmp_path / "bad.npz", a=x, b=x)
    result = laconic("run", out / "model.onnx", tmp_path / "bad.npz")
    assert result.exit_code == 1
    assert "has no array" in said(result)
