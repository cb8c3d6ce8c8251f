"""quantize.where: integers stay where a clock says that they pay. The clocks here are made up."""

import pytest
import torch
from torch import nn

from laconic.core.errors import RecipeError
from laconic.methods.base import Context
from laconic.methods.quantize.static import QuantizeStatic
from laconic.methods.quantize.where import QuantizeWhere
from laconic.program.capture import capture
from laconic.program.freezing import freeze
from laconic.program.program import FAKE_QUANTIZE
from laconic.program.sites import Sites
from laconic.solvers.quantization import integer_front
from laconic.solvers.quantization.integer_units import units, without
from laconic.testing.contracts import own_outputs

SAVES = (3.0, -1.0, 0.0, 2.0)
"""Milliseconds that integers save in each layer of the network below."""


def fakes(program):
    return [node.name for node in program.graph.nodes if node.target is FAKE_QUANTIZE]


@pytest.fixture(scope="module")
def quantized():
    """Four layers on integer grids, and the float network's task."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 12) for _ in SAVES]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU()))).eval()
    program = capture(model, torch.randn(4, 12))
    context = Context(task=own_outputs(program), original=program)
    options = QuantizeStatic(samples=16, skip_above=None)
    return options.apply(program, Sites(), context).program, context


@pytest.fixture
def clock(quantized):
    """Ten milliseconds, less what every layer's integers save."""
    whole, _ = quantized
    layers = units(whole)

    def timer(programs):
        there = {name: set(fakes(program)) for name, program in programs.items()}
        return {
            name: 10 - sum(
                saved for layer, saved in zip(layers, SAVES, strict=True)
                if set(layer.nodes) <= held
            )
            for name, held in there.items()
        }  # fmt: skip

    return timer


def test_units_hold_every_node_once(quantized):
    program, _ = quantized
    found = units(program)
    assert [unit.name for unit in found] == ["0", "2", "4", "6"]
    assert sorted(name for unit in found for name in unit.nodes) == sorted(fakes(program))
    pieces = units(program, 3)
    assert len(pieces) == 3
    assert sum((unit.nodes for unit in pieces), ()) == sum((unit.nodes for unit in found), ())


def test_without_all_is_the_network_with_rounded_weights(quantized):
    program, _ = quantized
    bare = without(program, fakes(program))
    assert not fakes(bare)
    weights_only = without(program, [n for n in fakes(program) if _is_activation(program, n)])
    x = program.example[0]
    assert torch.equal(bare(x), weights_only(x))
    assert torch.equal(without(program, ())(x), program(x))


def _is_activation(program, name):
    node = next(node for node in program.graph.nodes if node.name == name)
    return node.args[0].op != "get_attr"


def test_integers_stay_where_they_save_time(quantized, clock):
    program, _ = quantized
    found = integer_front.measure(program, units(program), [1.0, 1.0, 1.0, 1.0], clock, 4)
    assert found.milliseconds == 6.0
    assert found.gains == pytest.approx([save / 6 for save in SAVES])
    assert found.choose(0.0).floats == {1, 2}
    assert found.choose(0.0).part == pytest.approx(5 / 6)


def test_a_budget_of_time_buys_accuracy_where_it_is_cheapest(quantized, clock):
    program, _ = quantized
    found = integer_front.measure(program, units(program), [1.0, 1.0, 1.0, 5.0], clock, 8)
    assert found.choose(0.45).floats == {1, 2, 3}  # 7 ms of 5: the most harm for 2 ms
    assert found.choose(10.0).floats == {0, 1, 2, 3}


def test_the_method_takes_nodes_away_and_replays(quantized, clock, monkeypatch):
    program, context = quantized
    monkeypatch.setattr("laconic.methods.quantize.where.Stopwatch", lambda *_, **__: clock)
    outcome = QuantizeWhere(samples=8).apply(program, Sites(), context)
    gone = [name for i in (1, 2) for name in units(program)[i].nodes]
    assert outcome.resolved["floats"] == gone
    assert fakes(outcome.program) == [name for name in fakes(program) if name not in gone]
    assert outcome.figures["chosen_milliseconds"] == 5.0
    x = program.example[0]
    again = QuantizeWhere(floats=tuple(gone)).apply(freeze(program), Sites(), context)
    torch.testing.assert_close(again.program(x), outcome.program(x), rtol=0, atol=0)


def test_resolved_nodes_have_to_be_there(quantized):
    program, context = quantized
    with pytest.raises(RecipeError, match="nowhere"):
        QuantizeWhere(floats=("nowhere",)).apply(program, Sites(), context)


def test_without_quantisation_there_is_nothing_to_choose():
    program = capture(nn.Linear(3, 2).eval(), torch.randn(2, 3))
    context = Context(task=own_outputs(program), original=program)
    assert "nothing to choose" in QuantizeWhere().apply(program, Sites(), context).notes[0]
