"""The latency table and the measured goal, with a clock that is a formula of a program's shapes."""

from math import ceil, prod

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.errors import BudgetError, ExportError
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.groups import groups
from laconic.program.surgery import cut
from laconic.solvers.channels.allocate import choice
from laconic.solvers.search import latency_budget
from laconic.solvers.search.latency_table import interpolate, measure, probe
from laconic.solvers.weights.elimination import Removal
from laconic.testing import zoo

BLOCK = 8
CALL = 0.002  # milliseconds of a call, whatever is in it


def clock(programs):
    """Milliseconds of an imagined machine: 1 ns a multiply-add, channels rounded up to blocks."""
    return {name: CALL + sum(map(layer, heavy(program))) for name, program in programs.items()}


def heavy(program):
    nodes = {row.node for row in cost(program).rows if row.macs}
    return [node for node in program.graph.nodes if node.name in nodes]


def layer(node):
    weight = node.args[1].meta["shape"]
    out = node.meta["shape"]
    places = prod(out[2:]) if len(out) == 4 else 1
    wide, deep = (ceil(size / BLOCK) * BLOCK for size in weight[:2])
    return 1e-6 * places * wide * deep * prod(weight[2:])


class Net(nn.Module):
    """A wide layer on few positions, and narrow ones on many."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(16, 32, 3, padding=1),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.Conv2d(32, 64, 3, stride=4, padding=1),
        )
        self.d, self.e = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x):
        for convolution in (self.a, self.b, self.c, self.d):
            x = F.relu(convolution(x))
        return self.e(x.mean((2, 3)))


def net():
    return capture(zoo.shake(Net()), torch.randn(1, 16, 16, 16), dynamic={})


def choices_of(found, harm=1.0, block=BLOCK, floor=8):
    return [
        choice(
            group,
            Removal(torch.arange(group.size), torch.full((group.size,), harm).double()),
            block=block,
            floor=floor,
        )
        for group in found
    ]


def cutter(program, found):
    return lambda counts: cut(program, {n: range(k) for n, k in counts.items()}, found)[0]


def solve(goal, program=None, harms=None, **options):
    program = program or net()
    found = groups(program)
    choices = choices_of(found, **options)
    for place, harm in enumerate(harms or []):
        choices[place].harm[:] *= harm
    table = measure(found, choices, clock)
    return (
        program,
        table,
        latency_budget.meet(choices, table, goal, cutter(program, found), program, clock),
    )


# The grid -----------------------------------------------------------------------------------


def test_interpolation_is_exact_for_a_product_and_at_every_knot():
    knots = (np.array([1.0, 2.0, 5.0]), np.array([2.0, 8.0]))
    values = np.outer(knots[0], knots[1])
    x, y = np.array([1.0, 1.5, 4.0, 5.0, 7.0]), np.array([2.0, 3.0, 8.0, 5.0, 2.0])
    assert np.allclose(interpolate(knots, values, (x, y)), x * y)
    assert np.array_equal(interpolate(knots, -values, (x, y)), np.zeros(5))


def test_the_table_is_the_clock_where_the_clock_is_even():
    program = net()
    found = groups(program)
    choices = choices_of(found)
    table = measure(found, choices, clock)
    counts = {c.name: int(c.counts[len(c.counts) // 2]) for c in choices}
    row = np.array([counts[c.name] for c in choices])
    small = cut(program, {n: range(k) for n, k in counts.items()}, found)[0]
    layers = len(heavy(program))
    wanted = clock({"": small})[""] - CALL + layers * CALL / 4  # a probe is four layers and a call
    assert table.of(row)[0] * 1e-6 == pytest.approx(wanted, rel=1e-3)


def test_layers_of_one_shape_are_measured_once():
    asked = []

    def counting(programs):
        asked.append(len(programs))
        return clock(programs)

    program = zoo.captured("resnet")
    found = groups(program)
    table = measure(found, choices_of(found, block=1, floor=1), counting)
    layers = sum(len(kind.nodes) for kind in table.kinds)
    assert len(asked) == len(table.kinds) < layers == len(heavy(program))
    assert max(asked) <= 9


def test_a_smaller_layer_never_counts_as_slower():
    program = net()
    found = groups(program)
    noise = np.random.default_rng(0)
    table = measure(
        found, choices_of(found), lambda programs: {n: noise.random() for n in programs}
    )
    for kind in table.kinds:
        for axis in range(kind.milliseconds.ndim):
            assert (np.diff(kind.milliseconds, axis=axis) >= 0).all()


PROBED = ["densenet", "grouped", "unet", "sound", "fused_view", "batched_heads", "windows"]


@pytest.mark.parametrize("model", PROBED)
def test_a_probe_has_the_shapes_of_the_layer_in_the_cut_network(model):
    program = zoo.captured(model)
    found = groups(program)
    keep = {group.name: range(max(1, group.size // 2)) for group in found}
    small = cut(program, keep, found)[0]
    nodes = {node.name: node for node in small.graph.nodes}
    sizes = {group.atom: len(keep[group.name]) for group in found}
    for node in found.equations.multiply_adds:
        made = probe(found.equations, node, sizes, 2)
        with torch.no_grad():
            (out,) = made.run_flat(*made.example)
        assert tuple(out.shape) == nodes[node.name].meta["shape"], node.name
        copies = [n for n in made.graph.nodes if n.target is node.target and n.op == node.op]
        assert len(copies) == 2


def test_what_cannot_be_measured_is_noted_and_counts_for_nothing():
    program = net()
    found = groups(program)
    notes = []

    def broken(programs):
        raise ExportError("no such kernel")

    table = measure(found, choices_of(found), broken, notes=notes)
    assert not table.kinds
    assert all("no such kernel" in note for note in notes)
    assert len(notes) >= 4


# The goal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [0.3, 0.5, 0.8])
def test_the_measured_goal_is_met_and_nearly_used(goal):
    program, _, met = solve(goal)
    small = cutter(program, groups(program))(met.counts)
    whole, fast = (clock({"": p})[""] for p in (program, small))
    assert met.milliseconds == (whole, fast)
    assert goal - 0.2 <= fast / whole <= goal  # the dearest block is a fifth of the whole
    assert all(count % BLOCK == 0 for count in met.counts.values())


def test_a_budget_in_milliseconds_cuts_where_milliseconds_are():
    """The same harm everywhere: what goes is what takes time, not what has multiply-adds."""
    program = net()
    found = groups(program)
    choices = choices_of(found)

    def stride(node):
        return tuple(node.args[3]) if len(node.args) > 3 else (1, 1)

    def machine(programs):
        """This one runs the layer with a stride, c, a hundred times slower."""
        return {
            name: sum(layer(n) * (100 if stride(n) == (4, 4) else 1) for n in heavy(program))
            for name, program in programs.items()
        }

    table = measure(found, choices, machine)
    met = latency_budget.meet(choices, table, 0.5, cutter(program, found), program, machine)
    shrunk = {name.split(".")[0] for name, k in met.counts.items() if k < found.find(name).size}
    assert shrunk and shrunk <= {"b", "c"}  # what c reads and writes
    even = latency_budget.meet(
        choices, measure(found, choices, clock), 0.5, cutter(program, found), program, clock
    )
    assert even.counts["a.out"] < 32  # where the multiply-adds are


def test_indices_that_save_no_time_stay():
    """Below a block nothing is faster: with steps of one index only whole blocks go."""
    _, _, met = solve(0.6, block=1, floor=1)
    shrunk = {n: k for n, k in met.counts.items() if k % BLOCK}
    assert len(shrunk) <= 1


def test_a_clock_that_the_table_does_not_foresee_is_corrected_by_measuring():
    """Whole networks have a part that no layer has: the table alone would stop too early."""
    program = net()
    found = groups(program)
    choices = choices_of(found)
    table = measure(found, choices, clock)
    fixed = 0.3 * clock({"": program})[""]

    def bent(programs):
        return {name: fixed + value**1.5 for name, value in clock(programs).items()}

    met = latency_budget.meet(choices, table, 0.6, cutter(program, found), program, bent)
    whole, fast = met.milliseconds
    assert 0.5 <= fast / whole <= 0.6
    assert met.tries


def test_an_impossible_goal_says_how_fast_it_can_be_and_what_is_in_the_way():
    with pytest.raises(BudgetError, match=r"latency can fall by .*% at most.*95\.0%") as caught:
        solve(0.05, floor=16)
    assert caught.value.where in {group.name for group in groups(net())}
    assert "may not go below" in str(caught.value)
    with pytest.raises(BudgetError, match="no group"):
        latency_budget.meet([], measure(groups(net()), [], clock), 0.5, net, net(), clock)


def test_a_goal_that_is_met_already_leaves_everything():
    _, _, met = solve(1.0)
    assert all(met.counts[g.name] == g.size for g in groups(net()))


def test_figures_are_json_with_the_table():
    _, table, met = solve(0.5)
    figures = met.figures(table)
    layers = [name for kind in figures["table"] for name in kind["layers"]]
    assert len(layers) == len(set(layers)) == 5
    for kind in figures["table"]:
        assert np.shape(kind["milliseconds"]) == tuple(map(len, kind["sizes"]))
