"""A reader written from `docs/format.md` alone reads what Laconic writes."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from laconic import storage
from laconic.program.capture import capture
from laconic.storage import codecs, container, directory


def raw(tensor):
    if tensor.numel() == 0:
        return b""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_it_is_independent():
    source = Path(__file__).with_name("independent_reader.py").read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    standard = {"hashlib", "json", "lzma", "math", "re", "struct", "zlib", "pathlib"}
    assert imported == standard | {"numpy"}


@pytest.mark.parametrize("which", ["net", "tied", "frozen"])
def test_programs(which, request, reader, tmp_path):
    program = request.getfixturevalue(which)
    storage.save(program, tmp_path / "m.laconic", extra={"a": 1})
    header, tensors = reader(tmp_path / "m.laconic")
    assert header == storage.read_header(tmp_path / "m.laconic")
    expected = {name: (str(t.dtype)[6:], tuple(t.shape), raw(t)) for name, t in program.tensors()}
    assert tensors == expected


def test_the_graph_can_be_run_from_the_page_alone(reader, tmp_path):
    """Node references, names and arguments mean what the page says: a network run in NumPy."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    program = capture(model, torch.randn(2, 4))
    storage.save(program, tmp_path / "m.laconic")
    header, tensors = reader(tmp_path / "m.laconic")
    names = list(tensors)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    functions = {
        "aten.linear.default": lambda x, w, b: x @ w.T + b,
        "aten.relu.default": lambda x: np.maximum(x, 0),
    }
    values = []
    for kind, what, *_ in header["nodes"]:
        if kind == -1:
            values.append(x)
        elif kind == -2:
            _, shape, data = tensors[names[what]]
            values.append(np.frombuffer(data, np.float32).reshape(shape))
        else:
            given = [values[-int(back)] for back in what]
            values.append(functions[header["operators"][kind]](*given))
    found = values[-int(header["output"][0])]
    expected = program(torch.from_numpy(x)).detach().numpy()
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6)


def store(path, tensors, axes=None, extra=None):
    """A file of tensors only."""
    rows, data = [], []
    for name, tensor in tensors.items():
        row, coded = directory.encode(name, tensor, "dense", (axes or {}).get(name, 0))
        rows.append(row)
        data.append(coded)
    content = {"tensors": rows, "nodes": [], "extra": extra}
    path.write_bytes(b"".join(container.assemble(content, data)))
    return {row[0]: coded[:1] for row, coded in zip(rows, data, strict=True)}


def test_every_coding_and_dtype(reader, tmp_path, rng):
    integers = np.rint(rng.standard_normal((20, 6, 3, 3)) * 2.0 ** rng.uniform(0, 4, (20, 6, 1, 1)))
    tensors = {
        "codes": torch.from_numpy(integers.clip(-127, 127).astype(np.int8)),
        "transposed": torch.from_numpy(integers.clip(-127, 127).astype(np.int16)),
        "unsigned": torch.from_numpy((integers.clip(-99, 99) + 128).astype(np.uint8)),
        "large": torch.from_numpy(integers.astype(np.int64) + 20000),
        "one row": torch.from_numpy(integers.reshape(1, -1)[:, :200].astype(np.int32)),
        "one column": torch.from_numpy(integers.reshape(-1, 1)[:200].astype(np.int32)),
        "four bits": torch.from_numpy(integers.clip(-7, 7).astype(np.int8)),
        "arange": torch.arange(3000),
        "mask": torch.ones(40, 40, dtype=torch.bool).tril(),
        "pattern": torch.tensor([7, 1, 200, 90], dtype=torch.uint8).repeat(100, 5),
        "zeros": torch.zeros(30, dtype=torch.int32),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "raw": torch.from_numpy(rng.integers(0, 256, 50).astype(np.uint8)),
    }
    dropped = torch.from_numpy(rng.random((12, 8, 3, 3)) < 0.7)
    by_four = torch.from_numpy(rng.permuted(np.tile([0, 0, 1, 1], (12, 2, 3, 3, 1)), axis=-1))
    for dtype in (torch.float32, torch.float16, torch.int16, torch.int8, torch.uint8):
        values = (torch.randn(12, 8, 3, 3) * 9).to(dtype)
        tensors[f"sparse {dtype}"] = values.masked_fill(dropped, 0)
        pattern = by_four.movedim(-1, 2).reshape(12, 8, 3, 3)
        tensors[f"two of four {dtype}"] = values * pattern.to(dtype)
    for name, dtype in codecs.DTYPES.items():
        if dtype.is_floating_point or dtype.is_complex:
            tensors[name] = (torch.randn(60, 20) * 0.02).to(dtype)
    used = store(tmp_path / "m", tensors, {"transposed": 1})
    assert {bytes([coding]) for coding in codecs.Coding} <= set(used.values())
    _, found = reader(tmp_path / "m")
    for name, tensor in tensors.items():
        assert found[name][2] == raw(tensor), name


def test_more_than_one_checksum_and_both_header_codings(reader, tmp_path):
    store(tmp_path / "few", {"a": torch.randn(3)})
    many = {f"layer.{i}.weight": torch.randn(30, 10) for i in range(120)}
    store(tmp_path / "many", many, extra=[i * i for i in range(4000)])
    assert [(tmp_path / name).read_bytes()[10] for name in ("few", "many")] == [0, 1]
    for name in ("few", "many"):
        reader(tmp_path / name)
