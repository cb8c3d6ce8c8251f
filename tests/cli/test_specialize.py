"""`laconic specialize`, from a file and a list of sizes to predictions."""

import numpy as np
import torch
from torch import nn

from laconic import storage
from laconic.program.capture import capture

from .conftest import said


def test_sizes_in_files_out(laconic, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    sides = {"args[0]": {0: "batch", 2: "width"}}
    program = capture(net.eval(), (torch.randn(2, 3, 8),), dynamic=sides)
    storage.save(program, tmp_path / "net.laconic")
    (tmp_path / "sizes.txt").write_text("8\n12\n\n12\n")
    out, given = tmp_path / "out", tmp_path / "x.npz"
    made = laconic("specialize", tmp_path / "net.laconic", "--lengths", tmp_path / "sizes.txt",
                   "--batch", 2, "--threads", 1, "--out", out)  # fmt: skip
    text = said(made)
    assert made.exit_code == 0, text
    for part in ("batch=2 width=8", "batch=2 width=12", "any shape", "model.buckets", "model.bin"):
        assert part in text
    assert "width keeps exact sizes: no input is a mask" in text
    for width in (8, 12, 20):
        x = np.random.default_rng(0).standard_normal((3, 3, width)).astype(np.float32)
        np.savez(given, x=x)
        run = laconic("run", out, given, "--threads", 1, "-o", tmp_path / "y.npz")
        assert run.exit_code == 0, said(run)
        with np.load(tmp_path / "y.npz") as held:
            wanted = program(torch.from_numpy(x)).detach().numpy()
            np.testing.assert_allclose(held["output"], wanted, atol=1e-5)
    measured = laconic("measure", out, out / "model.xml", "--input", given, "--threads", 1)
    assert measured.exit_code == 0, said(measured)
    assert "model.buckets" in said(measured)


def test_what_is_no_size_is_named(laconic, tmp_path):
    (tmp_path / "net.laconic").write_bytes(b"")
    for lengths, words in (
        ("4,x", "entry 2 is 'x', expected a size such as 16 or 8x224x224"),
        ("sizes.text", "entry 1 is 'sizes.text'"),
    ):
        made = laconic("specialize", tmp_path / "net.laconic", "--lengths", lengths)
        assert made.exit_code == 1
        assert words in said(made)
    wrong = laconic("specialize", tmp_path / "net.laconic", "--lengths", "4", "--runtime", "onnx")
    assert "onnxruntime" in said(wrong)
