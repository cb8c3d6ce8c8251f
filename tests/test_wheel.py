"""The built wheel works in an empty environment, with nothing but what it declares."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys, torch, laconic
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
program = laconic.capture(model, torch.ones(2, 4))
laconic.save(program, "model.laconic")
x = torch.randn(5, 4)
assert torch.equal(laconic.load("model.laconic")(x), model(x))
heavy = {"transformers", "sklearn", "plotly", "onnxruntime", "openvino"} & set(sys.modules)
assert not heavy, heavy
"""


def _run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    os.environ.get("CI") != "true", reason="installs torch into a new environment: set CI=true"
)
def test_installs_and_runs_from_a_wheel(tmp_path: Path) -> None:
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("laconic-*.whl")
    home = tmp_path / "empty"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _run(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    _run(python, "-W", "error", "-c", SCRIPT, cwd=tmp_path)
    listed = _run(home / "bin" / "laconic", "methods", cwd=tmp_path)
    assert "prune.channels" in listed
    assert "compress" in _run(home / "bin" / "laconic", "--help", cwd=tmp_path)
