"""One of several models in a file, chosen on the command line."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import laconic as library
from laconic import storage
from laconic.methods.base import Context
from laconic.methods.share.models import Models
from laconic.program.sites import Sites
from laconic.testing.contracts import own_outputs

from .conftest import said


@pytest.fixture
def folder(tmp_path):
    """`both.laconic` holds `first` and `other`; `other.laconic` the second alone; `x.npz`."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    other = copy.deepcopy(first)
    with torch.no_grad():
        other[0].weight += 0.3 * torch.randn_like(other[0].weight)
    x = torch.randn(4, 8)
    program, second = (library.capture(model, x) for model in (first, other))
    storage.save(second, tmp_path / "other.laconic")
    method = Models(others={"other": str(tmp_path / "other.laconic")}, error=1e-3)
    context = Context(task=own_outputs(program), original=program)
    both = method.apply(program, Sites(), context).program
    storage.save(both, tmp_path / "both.laconic")
    np.savez(tmp_path / "x.npz", x=x.numpy())
    return tmp_path


def test_each_model_runs_and_is_exported_by_its_name(laconic, folder):
    held = library.members(library.load(folder / "both.laconic"))
    x = torch.from_numpy(np.load(folder / "x.npz")["x"])
    found = {}
    for name, program in held.items():
        onnx, out = folder / f"{name}.onnx", folder / f"{name}.npz"
        both = folder / "both.laconic"
        for command in (
            ["export", both, "--to", "onnx", "-o", onnx, "--model", name],
            ["run", both, folder / "x.npz", "-o", out, "--model", name],
            ["run", onnx, folder / "x.npz", "-o", folder / f"{name}_onnx.npz"],
        ):
            result = laconic(*command)
            assert result.exit_code == 0, said(result)
        wanted = program(x).detach().numpy()
        for path in (out, folder / f"{name}_onnx.npz"):
            given = next(iter(np.load(path).values()))
            np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)
        found[name] = wanted
    assert np.abs(found["first"] - found["other"]).max() > 0.1


def test_a_wrong_name_is_answered_with_the_nearest(laconic, folder):
    for file, says in (("both.laconic", "'other'"), ("other.laconic", "share.models")):
        result = laconic("run", folder / file, folder / "x.npz", "--model", "othr")
        assert result.exit_code != 0
        assert says in said(result)
