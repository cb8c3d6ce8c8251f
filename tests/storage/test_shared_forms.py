"""Vectors, hashed buckets and several models in a file, computed from the page by the other reader."""

import numpy as np
import pytest
import torch
from torch import nn

from laconic import storage
from laconic.core.errors import StorageError
from laconic.methods.base import Context, method_class
from laconic.program import members
from laconic.program.capture import capture
from laconic.program.freezing import freeze
from laconic.program.program import HASHED, MEMBER, VECTORS
from laconic.program.sites import Sites


def made(seed):
    """A small network, its first layer as vectors, its second as buckets."""
    torch.manual_seed(seed)
    layers = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    program = capture(nn.Sequential(*layers).eval(), torch.randn(2, 6))
    context = Context(task=None, original=program)
    vectors = method_class("share.vector")(dim=2, codewords=3)
    hashed = method_class("share.hash")(ratio=0.3, seed=5)
    program = vectors.apply(program, Sites(("0.*",)), context).program
    return hashed.apply(program, Sites(("2.*",)), context).program


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    first = made(0)
    storage.save(made(1), folder / "second.laconic")
    together = method_class("share.models")(others=[str(folder / "second.laconic")], error=0.1)
    outcome = together.apply(first, Sites(("4.*",)), Context(task=None, original=first))
    storage.save(freeze(outcome.program), folder / "m.laconic")
    return folder / "m.laconic"


def mixed(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def of_hash(values, shape, seed):
    out = np.zeros(int(np.prod(shape)), np.float32)
    for i in range(len(out)):
        h = mixed(mixed((i + 0x9E3779B9 * (seed + 1)) % 2**32) ^ seed)
        value = values[h * len(values) >> 32]
        out[i] = -value if mixed(h ^ 0x9E3779B9) & 1 else value
    return out.reshape(shape)


def of_vectors(codes, values, shape, axis):
    assert axis == 0
    return np.stack([np.concatenate([values[c] for c in row]) for row in codes]).reshape(shape)


def of_scale(codes, scale, zero, axis):
    side = [1] * codes.ndim
    side[axis or 0] = -1
    return ((codes - zero.reshape(side)) * scale.reshape(side)).astype(np.float32)


def pick(number):
    def member(rows, base, names, chosen, sizes):
        assert names == {"string": "first,second"} and chosen == 0
        own = rows[sum(sizes[:number]) : sum(sizes[: number + 1])]
        return own if base is None else own + base

    return member


@pytest.mark.parametrize("number", [0, 1])
def test_the_other_reader_computes_every_model(number, reader, file):
    header, tensors = reader(file)
    roles = {row[5] for row in header["tensors"] if len(row) > 5}
    assert "affine.codes" in roles
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    functions = {
        "aten.linear.default": lambda x, w, b: x @ w.T + b,
        "aten.relu.default": lambda x: np.maximum(x, 0),
        "laconic.vectors.default": of_vectors,
        "laconic.hashed.default": of_hash,
        "laconic.dequantize.default": of_scale,
        "laconic.member.default": pick(number),
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
    loaded = storage.load(file)
    name = members.names(loaded)[number]
    for program in (members.choose(loaded, name), members.alone(loaded, name)):
        expected = program(torch.from_numpy(x)).detach().numpy()
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_parts_that_do_not_fit_are_refused():
    codes, values = torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(2, 2)
    with torch.device("meta"), pytest.raises(ValueError, match="for a tensor of shape"):
        VECTORS(codes.to("meta"), values.to("meta"), [4, 7], 0)
    with torch.device("meta"), pytest.raises(ValueError, match="a seed of -1"):
        HASHED(torch.zeros(3), [2, 2], -1)
    with torch.device("meta"), pytest.raises(ValueError, match="3 buckets for a shape of"):
        HASHED(torch.zeros(3), [1 << 10, 1 << 10], 1)
    for sizes, chosen in (([2, 3], 0), ([2], 0), ([2, 2], 2)):
        with pytest.raises(ValueError, match="model"):
            MEMBER(torch.zeros(4, 2), None, "one model,two", chosen, sizes)


def test_a_choice_that_does_not_fit_is_refused_by_name(file, tmp_path):
    program = storage.load(file)
    for node in program.graph.nodes:
        if node.target is MEMBER:
            node.update_arg(3, 2)
    storage.save(program, tmp_path / "m.laconic")
    with pytest.raises(StorageError, match="model 2 of 2"):
        storage.load(tmp_path / "m.laconic")


@pytest.mark.parametrize(
    ("method", "options", "code"),
    [
        ("share.vector", {"dim": 2, "codewords": 3}, 200),
        ("share.cluster", {"clusters": 4}, 100),
        ("share.cluster", {"clusters": 4, "per": "channel"}, 100),
    ],
)
def test_numbers_beyond_the_list_are_refused_by_name(method, options, code, tmp_path):
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(24, 32), nn.ReLU()).eval(), torch.randn(2, 24))
    context = Context(task=None, original=program)
    forged = method_class(method)(**options).apply(program, Sites(), context).program
    storage.save(forged, tmp_path / "good.laconic")
    storage.load(tmp_path / "good.laconic")
    codes = forged.tensor("0.weight").clone()
    assert not codes.is_floating_point()
    codes.view(-1)[0] = code
    forged.set_tensor("0.weight", codes)
    storage.save(forged, tmp_path / "forged.laconic")
    with pytest.raises(StorageError, match=rf"0\.weight: numbers from .* to {code} of values"):
        storage.load(tmp_path / "forged.laconic")
