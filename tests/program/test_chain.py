"""A chain of pieces gives what the static Program gives, whoever leaves where."""

import numpy as np
import pytest
import torch
from torch import nn

from laconic.program import chain
from laconic.program.capture import capture
from laconic.program.choices import choices

CHOOSE = torch.ops.laconic.choose


def unsure(logits, threshold=0.0):
    return logits[:, 0] - logits[:, 1] < threshold


class Exits(nn.Module):
    """Three stages with an exit behind each of the first two; the last wins where both doubt."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4, 4, 3) for i in range(3)])
        self.heads = nn.ModuleList([nn.Linear(4, 5) for _ in range(3)])

    def forward(self, x):
        logits = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x).relu()
            logits.append(head(x.mean((2, 3))))
        first, second, last = logits
        return CHOOSE(unsure(first), CHOOSE(unsure(second), last, second), first)


class Skips(nn.Module):
    """Residual blocks with a gate each; batch norms, a reshape by size, a shared last layer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.gates = nn.ModuleList([nn.Linear(6, 2) for _ in range(3)])
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        for block, gate in zip(self.blocks, self.gates, strict=True):
            inner = self.norm(block(x)).relu().view(x.shape[0], 2, 3).flatten(1)
            x = CHOOSE(unsure(gate(x)), x + inner, x)
        return self.norm(x)


class Cascade(nn.Module):
    """A small model, then a large one; two outputs, integer inputs of free length and a table."""

    def __init__(self):
        super().__init__()
        self.words, self.table = nn.Embedding(9, 6), nn.Parameter(torch.randn(20, 6))
        self.small, self.large = nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))

    def forward(self, ids, mask):
        x = self.words(ids) + self.table[: ids.shape[1]]
        kept = mask.unsqueeze(-1).to(x.dtype)
        small = self.small((x * kept).sum(1))
        deep = self.large(self.words(ids).relu() + self.table[: ids.shape[1]])
        ask = unsure(small)
        large = (deep * kept).sum(1)
        return CHOOSE(ask, large, small), CHOOSE(ask, large.relu(), small * 2)


class Empty(nn.Module):
    """Both sides are there anyway: nothing can be left out, but the choice is made."""

    def forward(self, x):
        one, other = x.relu(), x * 2
        return CHOOSE(unsure(x), one, other) + one


class Folded(nn.Module):
    """What the body needs has the batch folded into another dimension: it stays a `where`."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        tokens = x.reshape(-1, 3) * 2
        there = self.inner(tokens).reshape(-1, 6)
        return CHOOSE(unsure(x), there, x) + tokens.sum()


class Whole(nn.Module):
    """The body reads a value that has no rows, the mean over the batch: all rows count in it."""

    def forward(self, x):
        mean = x.mean(0)
        return CHOOSE(unsure(x), (x - mean).relu(), x) + mean


def images(size):
    return (torch.randn(size, 3, 9, 9),)


def rows(size):
    return (torch.randn(size, 6),)


def text(size):
    lengths = torch.arange(size)[:, None] % 3 + 2
    return torch.randint(0, 9, (size, 5)), (torch.arange(5) < lengths).long()


MODELS = {
    "exits": (Exits, images, 3, 2),
    "skips": (Skips, rows, 4 + 3, 3),
    "cascade": (Cascade, text, 2, 1),
    "empty": (Empty, rows, 2, 1),
    "folded": (Folded, rows, 1, 0),
    "whole": (Whole, rows, 3, 1),
}


def _made(name, free="batch"):
    build, draw, *counts = MODELS[name]
    torch.manual_seed(3)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        if name == "exits":
            _balance(model, draw(64)[0])
    return capture(model, draw(6), dynamic=free), draw, counts


def _balance(model, x):
    """Let about half of the rows be unsure at either exit."""
    for stage, head in zip(model.stages, model.heads, strict=True):
        x = stage(x).relu()
        logits = head(x.mean((2, 3)))
        head.bias[0] -= (logits[:, 0] - logits[:, 1]).median()


def _decisions(steps):
    return sum(1 + _decisions(step["steps"]) for step in steps if "rows" in step)


@pytest.mark.parametrize("name", MODELS)
def test_a_chain_gives_what_the_static_program_gives(name):
    program, draw, (pieces, decisions) = _made(name)
    made = chain.split(program)
    assert len(made.pieces) == pieces
    assert _decisions(made.plan["steps"]) == decisions
    assert made.decides == bool(decisions)
    for size in (1, 2, 7, 32):
        inputs = draw(size)
        with torch.no_grad():
            wanted = program.run_flat(*inputs)
        found = made.run([tensor.numpy() for tensor in inputs])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-5, atol=1e-6)


def test_rows_that_left_are_not_computed():
    program, draw, _ = _made("exits")
    made = chain.split(program)
    seen = []

    def watched(number, piece):
        def run(arrays):
            seen.append((number, len(arrays[0])))
            return piece(arrays)

        return run

    inputs = [tensor.numpy() for tensor in draw(32)]
    eager = [chain._eager(piece) for piece in made.pieces]
    chain.execute(made.plan, inputs, [watched(i, p) for i, p in enumerate(eager)])
    sizes = [size for _, size in seen]
    assert [number for number, _ in seen] == [0, 1, 2]
    assert sizes[0] == 32
    assert 0 < sizes[2] < sizes[1] < 32
    rows_of = {node.name: node for node in program.graph.nodes}
    assert all(step["rows"] in rows_of for step in made.plan["steps"] if "rows" in step)


def test_pieces_hold_what_they_use_and_share_it():
    program, _, _ = _made("skips")
    made = chain.split(program)
    pointers = {program.tensor(name).data_ptr() for name, _ in program.tensors()}
    for piece in made.pieces:
        assert {tensor.data_ptr() for _, tensor in piece.tensors()} <= pointers
    owners = [p for p in made.pieces if "norm.running_mean" in dict(p.tensors())]
    assert len(owners) == 4  # three blocks and the end
    assert len({piece.tensor("norm.running_mean").data_ptr() for piece in owners}) == 1


def test_a_length_that_is_free_stays_free_in_every_piece():
    program, _, _ = _made("cascade", ("batch", "sequence"))
    made = chain.split(program)
    assert made.decides
    for piece in made.pieces:
        assert {dims[0] for dims in piece.dynamic.values()} == {"batch"}
        assert piece.dynamic["ids"] == {0: "batch", 1: "sequence"}
    ids = torch.randint(0, 9, (8, 11))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = program.run_flat(ids, mask)
    for one, other in zip(made.run([ids.numpy(), mask.numpy()]), wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-6)


def test_without_choices_there_is_one_piece():
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(6, 6), nn.ReLU()).eval(), rows(4))
    made = chain.split(program)
    assert len(made.pieces) == 1
    assert not made.decides
    assert not choices(program)
