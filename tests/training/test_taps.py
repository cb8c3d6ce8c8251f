"""Which nodes of two graphs hold the same thing."""

import torch
from torch import nn

from laconic.program.capture import capture
from laconic.training.taps import matched


class Chain(nn.Module):
    """Stages of residual blocks; each stage halves the resolution: [batch, 3, 8, 8] -> [batch]."""

    def __init__(self, *blocks):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(n)) for n in blocks
        )

    def forward(self, x):
        for stage in self.stages:
            for conv in stage:
                x = x + conv(x)
            x = nn.functional.max_pool2d(x, 2)
        return x.mean((1, 2, 3))


def chain(*blocks):
    return capture(Chain(*blocks).eval(), (torch.randn(2, 3, 8, 8),))


def test_graphs_of_one_depth_go_by_name():
    program = chain(2, 2)
    assert matched(program, program.clone(), None) == {
        name: name for name in ("add", "add_1", "add_2", "add_3")
    }


def test_other_depths_go_by_stage_ends_together():
    assert matched(chain(1, 2), chain(3, 4), None) == {
        "add": "add_2", "add_1": "add_4", "add_2": "add_6"
    }  # fmt: skip
    # the deeper one may be the student
    assert matched(chain(3, 2), chain(1, 2), None) == {
        "add_2": "add", "add_3": "add_1", "add_4": "add_2"
    }  # fmt: skip


def test_blocks_that_left_keep_names_where_the_last_one_stayed():
    whole = chain(3, 2)
    cut = whole.clone()
    sums = {node.name: node for node in cut.graph.nodes if node.name.startswith("add")}
    sums["add_1"].replace_all_uses_with(sums["add"])
    cut.graph.eliminate_dead_code()
    cut.recompile()
    assert matched(cut, whole, None) == {n: n for n in ("add", "add_2", "add_3", "add_4")}


def test_stages_of_another_number_fall_back_to_names():
    pairs = matched(chain(2, 1, 1), chain(2, 2), None)
    assert pairs == {"add": "add", "add_1": "add_1", "add_2": "add_2"}
