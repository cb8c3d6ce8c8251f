"""A Program of fixed sizes computes what the dynamic one does, bit for bit, with less."""

import pytest
import torch
from torch import nn

from laconic.core.errors import DataError
from laconic.program.capture import capture
from laconic.program.specialize import dimensions, shapes_of, specialize
from laconic.solvers.layers.constants import drop_identities, fold_constants, operators


class Decoder(nn.Module):
    """Positions and a causal mask made from the length: nothing of them is left at a fixed one."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(30, 8), nn.Embedding(16, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, ids):
        length = ids.shape[1]
        x = self.words(ids) + self.places(torch.arange(length, device=ids.device))
        later = torch.ones(length, length).triu(1).bool()
        scores = (self.mix(x) @ x.transpose(1, 2)).masked_fill(later, -1e9)
        return (scores.softmax(-1) @ x).reshape(ids.shape[0] * length, 8)


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return capture(Decoder().eval(), (torch.randint(0, 30, (2, 5)),), dynamic=("batch", "sequence"))


def _numbers_left(program):
    return [n for n in program.graph.nodes if n.op == "call_function" and n.meta["dtype"] is None]


def test_fixed_and_dynamic_are_equal_bit_for_bit(decoder):
    assert dimensions(decoder) == {"batch": 2, "sequence": 5}
    for batch, length in ((1, 7), (3, 16)):
        sizes = {"batch": batch, "sequence": length}
        made = specialize(decoder, sizes)
        assert made.dynamic == {}
        assert made.example[0].shape == (batch, length)
        assert _numbers_left(made) == []
        before = operators(made)
        drop_identities(made)
        fold_constants(made, parameters=True)
        made.recompile()
        names = [str(n.target) for n in made.graph.nodes]
        assert not any(word in name for name in names for word in ("arange", "ones", "triu"))
        assert operators(made) < before < operators(decoder)
        ids = torch.randint(0, 30, (batch, length))
        assert torch.equal(made(ids), decoder(ids))
        assert shapes_of(decoder, sizes) == {"ids": (batch, length)}
    assert decoder.example[0].shape == (2, 5)


def test_one_dimension_can_be_fixed_and_another_left(decoder):
    made = specialize(decoder, {"sequence": 6})
    assert made.dynamic == {"ids": {0: "batch"}}
    for batch in (1, 2, 5):
        ids = torch.randint(0, 30, (batch, 6))
        assert torch.equal(made(ids), decoder(ids))


def test_sizes_that_cannot_be_are_refused(decoder):
    for sizes, said in (
        ({"sequense": 4}, "did you mean 'sequence'"),
        ({"sequence": 0}, "sequence is 0"),
        ({"sequence": True}, "sequence is True"),
    ):
        with pytest.raises(DataError, match=said):
            specialize(decoder, sizes)
    fixed = specialize(decoder, {"batch": 2, "sequence": 4})
    with pytest.raises(DataError, match="specialised already"):
        specialize(fixed, {"sequence": 4})
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    sides = {"args[0]": {0: "batch"}}
    flat = capture(net, (torch.randn(2, 3, 4),), dynamic=sides)
    flat.dynamic = {"input_1": {0: "batch"}} | {
        node.name: {0: "batch", 2: "width"} for node in flat.placeholders
    }
    with pytest.raises(DataError, match="cannot take width=5"):
        specialize(flat, {"width": 5})
