"""`import laconic` is light and offers what the README says."""

import subprocess
import sys

import pytest

import laconic


def test_import_loads_nothing_heavy():
    heavy = ["torch", "openvino", "onnxruntime", "onnx", "plotly", "transformers", "constriction"]
    code = f"import sys, laconic; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_api_loads_no_runtime():
    heavy = ["openvino", "onnxruntime", "onnx", "plotly", "transformers", "constriction"]
    code = f"import sys, laconic; laconic.compress; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in laconic.__all__:
        assert getattr(laconic, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = laconic.compres
