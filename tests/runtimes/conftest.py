"""Small Programs for the runtimes: a float one, and one with quantisation nodes set by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.program.capture import capture
from laconic.program.program import FAKE_QUANTIZE, Program

CONVOLUTION = torch.ops.aten.conv2d.default
LINEAR = torch.ops.aten.linear.default
ADD = torch.ops.aten.add.Tensor


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut, then a classifier; no batch norm."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Embedding, one attention layer, a masked mean; integer inputs of free length."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(50, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids, mask):
        x = self.words(ids)
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(0))
        x = self.norm(x + self.out(y.transpose(1, 2).reshape(batch, length, width)))
        kept = mask.unsqueeze(-1).to(x.dtype)
        return {"mean": (x * kept).sum(1) / kept.sum(1), "tokens": x}


def _side(program, name, scale, zero_point):
    scale_name = program.add_tensor(f"{name}_scale", torch.as_tensor(scale, dtype=torch.float32))
    zero = torch.as_tensor(zero_point, dtype=torch.int32)
    return scale_name, program.add_tensor(f"{name}_zero_point", zero)


def quantize_weight(program, user, qmax=127):
    """Per output channel, symmetric."""
    weight = user.args[1]
    values = program.tensor(weight.target).detach()
    scale = values.abs().flatten(1).amax(1).clamp(min=1e-8) / qmax
    names = _side(program, weight.target, scale, torch.zeros(len(scale)))
    with program.graph.inserting_before(user):
        sides = [program.graph.get_attr(name) for name in names]
        node = program.graph.call_function(FAKE_QUANTIZE, (weight, *sides, 0, -qmax, qmax))
    user.replace_input_with(weight, node)


def quantize_activation(program, node, users, low, high, grid=(0, 255)):
    """Per tensor, affine."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (grid[1] - grid[0]) or 1.0
    zero_point = round(grid[0] - low / scale)
    names = _side(program, f"activations.{node.name}", scale, zero_point)
    before = node.next
    with program.graph.inserting_before(before):
        sides = [program.graph.get_attr(name) for name in names]
        made = program.graph.call_function(FAKE_QUANTIZE, (node, *sides, None, *grid))
    for user in users:
        user.replace_input_with(node, made)


def _quantize(program: Program, *, grid=(0, 255)) -> Program:
    """int8 weights, and 8-bit inputs of convolutions, linear layers and residual additions."""
    program = program.clone()
    values = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name]

    Watch(program, graph=program.graph).run(*program.example)
    for node in list(program.graph.nodes):
        value = values.get(node.name)
        if (
            node.op == "get_attr"
            or not isinstance(value, torch.Tensor)
            or not value.is_floating_point()
        ):
            continue
        users = [
            u
            for u in node.users
            if u.target is ADD or (u.target in (CONVOLUTION, LINEAR) and u.args[0] is node)
        ]
        if users:
            quantize_activation(
                program, node, users, float(value.detach().min()), float(value.detach().max()), grid
            )
    for node in list(program.graph.nodes):
        if node.target in (CONVOLUTION, LINEAR):
            quantize_weight(program, node)
    program.recompile()
    return program


@pytest.fixture
def quantize():
    """A function: Program → Program with int8 weights and 8-bit activations, inserted by hand."""
    return _quantize


@pytest.fixture(scope="session")
def residual() -> Program:
    torch.manual_seed(1)
    return capture(Residual().eval(), torch.randn(4, 3, 16, 16))


@pytest.fixture(scope="session")
def quantized(residual) -> Program:
    return _quantize(residual)


@pytest.fixture(scope="session")
def attention() -> Program:
    torch.manual_seed(2)
    ids, mask = torch.randint(0, 50, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    return capture(Attention().eval(), {"ids": ids, "mask": mask}, dynamic=("batch", "sequence"))
