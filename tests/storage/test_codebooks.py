"""Codebooks and shared bases in a file: what the page says of them, read by the other reader."""

import numpy as np
import pytest
import torch
from torch import nn

from laconic import storage
from laconic.core.errors import StorageError
from laconic.forms import codebook
from laconic.program.capture import capture
from laconic.program.program import COMBINE, LOOKUP


def shared(zero=False):
    """Two linear layers, one on a codebook for every two channels, one on a basis of three."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    program = capture(model, torch.randn(2, 6))
    first, second = (
        next(n for n in program.graph.nodes if n.target == name)
        for name in ("0.weight", "2.weight")
    )
    weight = program.tensor("0.weight").detach()
    weight = weight.masked_fill(weight.abs() < 0.2, 0.0) if zero else weight
    form = codebook.nearest(weight, [torch.randn(5) for _ in range(4)], 0, 2, zero)
    program.set_tensor("0.weight", form.codes)
    program.set_tensor("2.weight", torch.randn(3))
    rest = (form.axis, form.group, form.low, form.zero)
    for node, side, target, more in (
        (first, form.values, LOOKUP, rest),
        (second, torch.randn(3, 4, 8), COMBINE, ()),
    ):
        name = program.add_tensor(f"{node.target}_side", nn.Parameter(side))
        with program.graph.inserting_after(node):
            held = program.graph.get_attr(name)
        with program.graph.inserting_after(held):
            made = program.graph.call_function(target, (node, held, *more))
        node.replace_all_uses_with(made, lambda user, made=made: user is not made)
    program.propagate()
    program.recompile()
    return program


@pytest.mark.parametrize("zero", [False, True])
def test_the_other_reader_computes_the_same(zero, reader, tmp_path):
    program = shared(zero)
    storage.save(program, tmp_path / "m.laconic")
    header, tensors = reader(tmp_path / "m.laconic")
    roles = {row[0]: row[5] for row in header["tensors"] if len(row) > 5}
    assert roles == {
        "0.weight": "codebook.codes",
        "0.weight_side": "codebook.values",
        "2.weight": "basis.coefficients",
        "2.weight_side": "basis.basis",
    }
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)

    def lookup(codes, values, axis, group, low, zero):
        out = np.zeros(codes.shape, np.float32)
        for place, code in np.ndenumerate(codes):
            if not (zero and code == 0):
                out[place] = values[place[axis] // group, int(code) - low]
        return out

    functions = {
        "aten.linear.default": lambda x, w, b: x @ w.T + b,
        "aten.relu.default": lambda x: np.maximum(x, 0),
        "laconic.lookup.default": lookup,
        "laconic.combine.default": lambda own, basis: np.einsum("r,rab->ab", own, basis),
    }
    names, values = list(tensors), []
    for kind, what, *_ in header["nodes"]:
        if kind == -1:
            values.append(x)
        elif kind == -2:
            dtype, shape, data = tensors[names[what]]
            values.append(np.frombuffer(data, dtype).reshape(shape))
        else:
            given = [values[-int(a)] if isinstance(a, str) else a for a in what]
            values.append(functions[header["operators"][kind]](*given))
    found = values[-int(header["output"][0])]
    expected = program(torch.from_numpy(x)).detach().numpy()
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_was_read_trains_on(tmp_path):
    program = shared()
    storage.save(program, tmp_path / "m.laconic")
    loaded = storage.load(tmp_path / "m.laconic")
    assert torch.equal(loaded(*program.example), program(*program.example))
    loaded.train()
    loaded(*program.example).square().sum().backward()
    for name in ("0.weight_side", "2.weight", "2.weight_side"):
        assert bool(loaded.tensor(name).grad.abs().sum() > 0)


def test_one_element_of_a_larger_tensor_is_stored(reader, tmp_path):
    """Such a view counts as contiguous, whatever its stride."""
    program = capture(nn.Linear(2, 1), torch.randn(2, 2))
    program.set_tensor("bias", torch.randn(3, 2)[1:2, 1])
    assert program.tensor("bias").stride() != (1,)
    storage.save(program, tmp_path / "m.laconic")
    found = np.frombuffer(reader(tmp_path / "m.laconic")[1]["bias"][2], np.float32)
    assert found.tolist() == program.tensor("bias").tolist()


def test_a_codebook_that_does_not_fit_is_refused_by_name(tmp_path):
    program = shared()
    program.set_tensor("0.weight_side", torch.zeros(3, 5))
    storage.save(program, tmp_path / "m.laconic")
    with pytest.raises(StorageError, match="expected \\[4, width\\]"):
        storage.load(tmp_path / "m.laconic")
