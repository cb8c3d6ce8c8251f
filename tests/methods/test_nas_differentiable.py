"""nas.differentiable: what is drawn is what would be cut, costs are exact, the penalty pays."""

import pytest
import torch
from pydantic import ValidationError

from laconic.core.errors import BudgetError
from laconic.methods.base import Context
from laconic.methods.nas.differentiable import Differentiable
from laconic.program.cost import cost
from laconic.program.sites import Sites
from laconic.solvers.search.elastic import Elastic, declare
from laconic.solvers.search.member_costs import Prices
from laconic.solvers.search.relaxation import Relaxation
from laconic.testing import zoo
from laconic.testing.contracts import own_outputs
from laconic.training.plan import Plan

SPACE = {"width:*": [1.0, 0.75, 0.5, 0.25], "depth:*": [1.0, 0.5, 0]}


def program_of(name):
    return zoo.captured(name)


def relaxed_of(program, order):
    elastic = Elastic(program)
    space, _ = declare(elastic, SPACE, Sites())
    student = program.clone().train()
    made = Relaxation(
        elastic, space, order, student, target=0.5, strength=1.0, temperature=(1.0, 0.5), seed=0
    )
    return elastic, space, student, made


def chosen(space, genes):
    """Certainty about one choice of every knob."""
    return {
        knob.name: torch.nn.functional.one_hot(torch.tensor(gene), len(knob.choices)).float()
        for knob, gene in zip(space.knobs, genes, strict=True)
    }


@pytest.mark.parametrize("name", ["resnet", "padded_shortcut"])
def test_a_draw_computes_and_costs_what_its_cut_does(name):
    program = program_of(name)
    order = {
        f"width:{group.name}": list(range(group.size))[::-1] for group in Elastic(program).groups
    }
    elastic, space, _, relaxed = relaxed_of(program, order)
    generator = torch.Generator().manual_seed(0)
    prices = Prices(elastic, order)
    for member in (space.least(), space.random(generator)):
        relaxed._drawn = chosen(space, space.genes(member))
        wanted = elastic.cut(member, order).program.train()
        torch.testing.assert_close(
            relaxed._forward()(*program.example), wanted.run_flat(*program.example),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
        assert float(relaxed._bill(relaxed._drawn)) == pytest.approx(prices.macs(member), rel=1e-5)


def test_draws_repeat_themselves_and_have_gradients():
    program = program_of("resnet")
    _, _, student, relaxed = relaxed_of(program, {})
    rows = []
    for number in (3, 4, 3):
        relaxed._draw(number)
        rows.append(torch.cat(list(relaxed._drawn.values())).detach())
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert set(rows[0].round(decimals=5).tolist()) <= {0.0, 1.0}
    sum(o.square().sum() for o in relaxed._forward()(*program.example)).backward()
    moved = {
        knob for knob, n in relaxed.logits.items() if float(student.tensor(n).grad.abs().sum()) > 0
    }
    assert {knob for knob in relaxed.logits if knob.startswith("depth")} <= moved
    assert any(knob.startswith("width") for knob in moved)  # all but those in a closed branch
    relaxed.remove()
    assert not {name for name, _ in student.tensors()} & set(relaxed.logits.values())


def test_the_penalty_brings_the_cost_to_the_target():
    program = program_of("no_bias")
    context = Context(task=own_outputs(program), original=program.clone(), seed=1)
    method = Differentiable(
        space={"width:*": [1.0, 0.75, 0.5, 0.25]}, macs=0.4, explore=0.75, steps=80, strength=20.0,
        importance="l1", evaluations=1, teacher="torch", precision="fp32", optimizer="adamw",
    )  # fmt: skip
    got = method.apply(program, Sites(), context)
    parts = [part for _, part in got.figures["expected"]]
    assert 0.4 < parts[0] < 1 and parts[-1] < 0.9 * parts[0]
    assert got.figures["macs"][1] == cost(got.program).macs <= 0.4 * cost(program).macs
    assert got.resolved["steps"] == 80 and got.resolved["explore"] == 0.75


def test_budgets_out_of_reach_and_other_kinds_are_refused():
    program = program_of("no_bias")
    context = Context(task=own_outputs(program), original=program.clone())
    with pytest.raises(BudgetError, match="no member is within the budget"):
        Differentiable(macs=0.001, importance="l1").apply(program, Sites(), context)
    for options in ({"space": {"bits:*": [8]}}, {"steps": 1}, {"explore": 1.0}):
        with pytest.raises(ValidationError):
            Differentiable(**options)


def test_what_was_expected_survives_a_stop_and_forgets_trials():
    _, _, _, relaxed = relaxed_of(program_of("no_bias"), {})
    relaxed.expected = [(0, 0.9)]  # of a trial step
    relaxed.begin(relaxed._student, Plan(steps=4, optimizer="sgd"))
    assert relaxed.expected == []
    relaxed.expected = [(0, 0.75), (2, 0.7)]
    held = relaxed.tensors()
    relaxed.begin(relaxed._student, Plan(steps=4, optimizer="sgd"))
    relaxed.restore(held)
    assert relaxed.expected == [(0, 0.75), (2, 0.7)]
