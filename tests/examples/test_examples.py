"""The examples run as a reader would run them; skipped where their framework is not installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "train_in_a_bare_loop": ["sklearn"],
    "train_in_lightning": ["sklearn", "lightning"],
    "train_in_the_hf_trainer": ["sklearn", "transformers", "accelerate"],
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("train_*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_example(name):
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    code = f"import {name}; found = {name}.main(); assert found > 85, found"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLES, env=environment, text=True,
        capture_output=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
