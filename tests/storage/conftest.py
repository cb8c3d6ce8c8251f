"""Small programs to store, the independent reader, and a way to forge files with right hashes."""

import hashlib
import importlib.util
import struct
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from laconic.forms import affine
from laconic.program.capture import capture
from laconic.program.program import DEQUANTIZE

HERE = Path(__file__).parent


class Net(nn.Module):
    """Convolutions, batch norm, a shape computed at run time, infinities, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 5)
        self.register_buffer("ids", torch.arange(12).reshape(3, 4))
        self.register_buffer("flag", torch.tensor([True, False, True]))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.body(x).clamp(max=float("inf")).to(torch.float32)
        x = x.reshape(x.shape[0], 16, -1).mean(-1)
        x = x.masked_fill(x < -1e30, float("-inf")) + self.ids.sum() * self.flag.sum()
        return {"logits": self.head(x), "features": (x, x * 0.1)}


class Tied(nn.Module):
    """One weight under two names, integer inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.mix(self.embed(ids))))


def freeze(program, bits=8):
    """Every weight as integer codes behind a `laconic.dequantize` node."""
    top = 2 ** (bits - 1) - 1
    nodes = {n.target: n for n in program.graph.nodes if n.op == "get_attr"}
    for name, tensor in list(program.tensors()):
        if tensor.ndim < 2 or not tensor.is_floating_point() or name not in nodes:
            continue
        w = tensor.detach()
        scale = w.abs().flatten(1).amax(1).clamp_min(1e-8) / top
        zero = torch.zeros(len(scale), dtype=torch.int32)
        node = nodes[name]
        program.set_tensor(name, affine.encode(w, scale, zero, 0, -top, top))
        with program.graph.inserting_after(node):
            s = program.graph.get_attr(program.add_tensor(f"{name}_scale", scale))
        with program.graph.inserting_after(s):
            z = program.graph.get_attr(program.add_tensor(f"{name}_zero_point", zero))
        with program.graph.inserting_after(z):
            decoded = program.graph.call_function(DEQUANTIZE, (node, s, z, 0))
        decoded.meta["grid"] = (-top, top)
        node.replace_all_uses_with(decoded, lambda user, d=decoded: user is not d)
    program.propagate()
    program.recompile()
    return program


@pytest.fixture(scope="session")
def freeze_program():
    return freeze


@pytest.fixture
def net():
    return capture(Net(), torch.randn(2, 3, 8, 8))


@pytest.fixture
def tied():
    return capture(Tied(), torch.randint(0, 20, (2, 5)), dynamic=("batch", "sequence"))


@pytest.fixture
def frozen(net):
    return freeze(net)


@pytest.fixture(scope="session")
def reader():
    """The independent reader as a function of a path."""
    spec = importlib.util.spec_from_file_location("reader", HERE / "independent_reader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document = (HERE.parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    return lambda path: module.read(path, document)


def seal(raw):
    """The bytes of a file with its checksums and hash made right again."""
    stored, data = struct.unpack_from("<I", raw, 12)[0], struct.unpack_from("<Q", raw, 24)[0]
    header, body = raw[64 : 64 + stored], raw[64 + stored : 64 + stored + data]
    sums = b"".join(
        struct.pack("<I", zlib.crc32(body[i : i + 16384])) for i in range(0, len(body), 16384)
    )
    prelude = raw[:20] + struct.pack("<I", zlib.crc32(header)) + raw[24:32]
    digest = hashlib.sha256(prelude + header + body + sums).digest()
    return prelude + digest + header + body + sums


@pytest.fixture(scope="session")
def sealed():
    return seal
