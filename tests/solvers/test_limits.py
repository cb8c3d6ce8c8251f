"""The end of a table of positions is found, however the model reads it."""

import pytest
import torch
from torch import nn

from laconic.program.capture import capture
from laconic.solvers.dynamic.limits import find_limits


class Reader(nn.Module):
    """Words and positions; positions looked up, or cut from a buffer, from a first place on."""

    def __init__(self, first, cut):
        super().__init__()
        self.first, self.cut = first, cut
        self.words, self.places = nn.Embedding(60, 8), nn.Embedding(24, 8)
        self.register_buffer("numbers", torch.arange(24).expand(1, -1).clone())

    def forward(self, ids):
        length = ids.shape[1]
        if self.cut:
            return self.words(ids) + self.places(self.numbers[:, :length])
        return self.words(ids) + self.places(torch.arange(length) + self.first)


@pytest.mark.parametrize(("first", "cut"), [(0, False), (2, False), (0, True)])
def test_the_last_position_is_the_limit(first, cut, caplog):
    ids = torch.randint(0, 60, (2, 5))
    program = capture(Reader(first, cut).eval(), (ids,), dynamic=("batch", "sequence"))
    assert find_limits(program, {"batch": 1, "sequence": 1}) == {"sequence": 24 - first}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_without_a_table_there_is_no_limit():
    net = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 3)).eval()
    ids = torch.randint(0, 30, (2, 5))
    program = capture(net, (ids,), dynamic=("batch", "sequence"))
    assert find_limits(program, {"batch": 1, "sequence": 1}) == {}
