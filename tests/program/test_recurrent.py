"""Recurrent layers shrink as the masked original says they have to, and their work is counted."""

import pytest
import torch
from torch import nn

from laconic.program.capture import capture
from laconic.program.cost import CostModel, cost
from laconic.program.groups import groups
from laconic.program.surgery import cut
from laconic.testing.masked import masked


class Sequence(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: int) -> None:
        super().__init__()
        self.rnn = kind(6, 10, **options)
        width = (options.get("proj_size") or 10) * (1 + options.get("bidirectional", 0))
        self.head = nn.Linear(width, 4)
        self.last = nn.Linear(options.get("proj_size") or 10, 3)

    def forward(self, x):
        outputs, state = self.rnn(x)
        held = state[0] if isinstance(state, tuple) else state
        return self.head(outputs.mean(0)), self.last(held[-1])


def captured(kind, **options):
    torch.manual_seed(0)
    return capture(Sequence(kind, **options).eval(), (torch.randn(5, 2, 6),), dynamic=None)


OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bidirectional": True, "bias": False, "batch_first": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_all_layers_and_directions_shrink_together(kind, options):
    program = captured(kind, **options)
    found = groups(program)
    (group,) = found
    assert group.size == 10 and not found.unknown
    small, changes = cut(program, {group.name: [0, 2, 3, 7]}, found)
    for wanted, made in zip(
        masked(program, changes), small.run_flat(*program.example), strict=True
    ):
        torch.testing.assert_close(made, wanted)
    assert small.tensor("rnn.weight_hh_l0").shape[1] == 4
    assert CostModel(program, found).macs({group.name: 4}) == cost(small).macs


def test_every_step_is_counted():
    """Five steps of two samples, two directions: 4 gates of 10 units from 6 inputs and 10 units."""
    program = captured(nn.LSTM, bidirectional=True)
    counted = {row.operator: row.macs for row in cost(program).rows}
    assert counted["aten.lstm"] == 5 * 2 * 2 * 40 * (6 + 10)
    assert not cost(program).unknown


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projected_states_are_reported():
    program = captured(nn.LSTM, proj_size=4)
    assert "aten.lstm" in groups(program).unknown and "aten.lstm" in cost(program).unknown
