"""Random networks out of awkward pieces: whatever is found in them, pruned has to equal masked."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.program.capture import capture
from laconic.program.cost import CostModel, cost
from laconic.program.groups import groups
from laconic.program.surgery import cut
from laconic.testing.masked import masked
from laconic.testing.zoo import shake


class Piece(nn.Module):
    """One step on features [batch, length, width]; `kind` says which."""

    def __init__(self, kind, width, dice):
        super().__init__()
        self.kind, self.width = kind, width
        self.factor = dice.choice([d for d in range(2, width + 1) if width % d == 0])
        wide = self.factor * dice.randint(1, 3)
        made = {
            "linear": lambda: (nn.Linear(width, wide), wide),
            "norm": lambda: (nn.LayerNorm(width), width),
            "residual": lambda: (nn.Linear(width, width), width),
            "gate": lambda: (nn.Linear(width, 2 * wide), wide),
            "grouped": lambda: (nn.Conv1d(width, wide, 3, padding=1, groups=self.factor), wide),
            "group_norm": lambda: (nn.GroupNorm(self.factor, width), width),
            "heads": lambda: (nn.Linear(width, 3 * width), width),
            "cat": lambda: (nn.Linear(width, wide), width + wide),
            "pad": lambda: (nn.Identity(), width + 3),
            "swap": lambda: (nn.Identity(), width),
            "shuffle": lambda: (nn.Identity(), width),
            "repeat": lambda: (nn.Identity(), 2 * width),
            "part": lambda: (nn.Identity(), width - width // 2),
            "largest": lambda: (nn.Identity(), width // self.factor),
        }
        self.inner, self.out = made[kind]()

    def forward(self, x):
        return getattr(self, f"_{self.kind}")(x)

    def _linear(self, x):
        return torch.tanh(self.inner(x))

    def _norm(self, x):
        return self.inner(x)

    def _residual(self, x):
        return x + torch.relu(self.inner(x))

    def _gate(self, x):
        one, two = self.inner(x).chunk(2, -1)
        return one * torch.sigmoid(two)

    def _grouped(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)

    def _group_norm(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)

    def _heads(self, x):
        n, length, width = x.shape
        size = width // self.factor
        q, k, v = (
            t.view(n, length, self.factor, size).transpose(1, 2)
            for t in self.inner(x).split(width, -1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)

    def _cat(self, x):
        return torch.cat([self.inner(x), x], -1)

    def _pad(self, x):
        return F.pad(x, (1, 2))

    def _swap(self, x):
        half = self.width // 2
        return (
            torch.cat([x[..., half:], x[..., :half]], -1)
            if self.width % 2
            else x + torch.cat(x.chunk(2, -1)[::-1], -1)
        )

    def _shuffle(self, x):
        n, length, width = x.shape
        return (
            x.view(n, length, self.factor, width // self.factor)
            .transpose(2, 3)
            .reshape(n, length, width)
        )

    def _repeat(self, x):
        return x.repeat_interleave(2, dim=-1) if self.factor % 2 else x.repeat(1, 1, 2)

    def _part(self, x):
        return x[..., self.width // 2 :]

    def _largest(self, x):
        return x.unflatten(-1, (self.width // self.factor, self.factor)).amax(-1)


KINDS = (
    "linear norm residual gate grouped group_norm heads cat pad swap shuffle repeat part largest"
)


class Network(nn.Module):
    def __init__(self, seed):
        super().__init__()
        dice = random.Random(seed)
        width, pieces = 12, [nn.Linear(5, 12)]
        for _ in range(dice.randint(3, 7)):
            kinds = [k for k in KINDS.split() if 2 <= width <= 40 or k == "linear"]
            piece = Piece(dice.choice(kinds), max(width, 2), dice) if width > 1 else nn.Linear(1, 8)
            width = piece.out if isinstance(piece, Piece) else 8
            pieces.append(piece)
        self.pieces, self.head = nn.Sequential(*pieces), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.pieces(x).mean(1))


@pytest.mark.parametrize("seed", [*range(24), 95])
@torch.no_grad()
def test_pruned_equals_masked(seed):
    torch.manual_seed(seed)
    model = shake(Network(seed)).double()  # so that a norm over two close values stays exact
    program = capture(model, (torch.randn(2, 6, 5).double(),))
    found = groups(program)
    assert not found.unknown
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in found:
        count = int(torch.randint(1, group.size + 1, (1,), generator=generator))
        keep[group.name] = torch.randperm(group.size, generator=generator)[:count]
    pruned, changes = cut(program, keep, found)
    (given,), (expected,) = pruned.run_flat(*program.example), masked(program, changes)
    assert (given - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1e-2)
    sizes = {name: len(kept) for name, kept in keep.items()}
    after, foretold = cost(pruned), CostModel(program, found)
    assert (foretold.macs(sizes), foretold.params(sizes)) == (after.macs, after.params)
