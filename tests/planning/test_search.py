"""The budget loop on a model whose recipes' effects are known beforehand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laconic
from laconic.core.errors import BudgetError
from laconic.core.recipe import Recipe
from laconic.engine import deploy
from laconic.engine.store import fingerprint
from laconic.measuring import latency
from laconic.methods.base import Outcome
from laconic.methods.prune.channels import PruneChannels
from laconic.planning import compress as compress_module
from laconic.planning.candidates import Chain, basics, finer, paying, pruned, recovery
from laconic.planning.search import Search
from laconic.program.capture import capture
from laconic.program.groups import groups

W = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(64, 8, generator=draw) for _ in range(count)]
    return [(x, (x @ W).argmax(1)) for x in inputs]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = latency.Plan(rounds=2, seconds=0.0, calls=2, rest=0.0, repeats=0)
    monkeypatch.setattr(deploy, "BRIEF", plan)


@pytest.fixture
def model() -> nn.Module:
    return exact(12)


def exact(width: int) -> nn.Module:
    """Exact on the task; no output reads the hidden units after the first six."""
    net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight[:, 6:].zero_() if layer is net[2] else layer.weight[:6].zero_()
            layer.bias.zero_()
        for k in range(3):
            net[0].weight[2 * k], net[0].weight[2 * k + 1] = W[:, k], -W[:, k]
            net[2].weight[k, 2 * k], net[2].weight[k, 2 * k + 1] = 1.0, -1.0
    return net.eval()


@pytest.fixture
def task() -> laconic.Task:
    return laconic.classification(
        train=batches(4, 1), validation=batches(12, 2), test=batches(3, 3)
    )


def cut(name: str, keep: list[int]) -> Recipe:
    step = {"method": "prune.channels", "keep": {name: keep}, "compensate": False}
    return Recipe.of([{**step, "recalibrate": False, "block": 1}], name=f"keep {len(keep)}")


def try_only(monkeypatch: pytest.MonkeyPatch, *recipes: Recipe) -> None:
    monkeypatch.setattr(compress_module, "basics", lambda: [Chain("given", recipes)])
    monkeypatch.setattr(compress_module, "pruned", lambda *_: Chain("nothing more", []))


def test_the_strongest_within_the_budget_is_kept(model, task, monkeypatch, tmp_path):
    program = capture(model, torch.randn(2, 8))
    name = groups(program)[0].name
    mild, strong, beyond = (cut(name, list(range(n))) for n in (9, 6, 2))
    never = cut(name, [0])
    try_only(monkeypatch, mild, strong, beyond, never)
    before = fingerprint(program)
    result = laconic.compress(
        program, task, budget=laconic.Budget(minimize="macs", threads=1), workdir=tmp_path
    )
    assert [c.name for c in result.candidates] == ["keep 9", "keep 6", "keep 2"]
    assert [c.accepted for c in result.candidates] == [True, True, False]
    assert [c.chosen for c in result.candidates] == [False, True, False]
    assert result.program.tensor("0.weight").shape == (6, 8)
    assert result.changes["0.weight"][0].tolist() == list(range(6))
    assert fingerprint(program) == before
    x = torch.randn(16, 8)
    torch.testing.assert_close(result.program(x), model(x))
    drop = result.candidates[1].drop
    assert drop.conditions["losses"] == 0
    assert drop.conditions["split"] == "validation"
    splits = {m.conditions.get("split") for m in result.measurements["compressed"]}
    assert {"validation", "test"} <= splits
    for side in ("original", "compressed"):
        held = next(m for m in result.measurements[side] if m.name == "memory")
        assert 0 < held.value < 1000
        assert held.conditions["batch"] == 1
    assert "within the budget" in result.verdict
    replayed = laconic.compress(program, task, recipe=result.recipe)
    assert fingerprint(replayed.program) == fingerprint(result.program)


def test_the_test_split_plays_no_part_in_the_choice(model, task, monkeypatch):
    program = capture(model, torch.randn(2, 8))
    name = groups(program)[0].name
    try_only(monkeypatch, cut(name, list(range(2))))
    looked: list[int] = []

    class Test(list[object]):
        def __iter__(self):
            looked.append(1)
            return super().__iter__()

    watched = replace(task, test=Test(task.test))
    with pytest.raises(BudgetError, match=r"closest was 'keep 2': beyond the budget of 0.5"):
        laconic.compress(program, watched, budget=laconic.Budget(minimize="macs", threads=1))
    assert len(looked) <= 2  # the check of its shapes, before anything was tried


def test_a_resumed_search_does_not_repeat_what_was_done(model, task, monkeypatch, tmp_path: Path):
    program = capture(model, torch.randn(2, 8))
    name = groups(program)[0].name
    try_only(monkeypatch, cut(name, list(range(9))), cut(name, list(range(6))))
    budget = laconic.Budget(minimize="macs", threads=1)
    first = laconic.compress(program, task, budget=budget, workdir=tmp_path)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a finished step ran again")

    monkeypatch.setattr("laconic.methods.prune.channels.PruneChannels.apply", never)
    again = laconic.compress(program, task, budget=budget, workdir=tmp_path)
    assert fingerprint(again.program) == fingerprint(first.program)
    assert [c.name for c in again.candidates] == [c.name for c in first.candidates]


def test_what_was_done_with_other_data_is_not_taken_up(model, task, monkeypatch, tmp_path: Path):
    program = capture(model, torch.randn(2, 8))
    name = groups(program)[0].name
    try_only(monkeypatch, cut(name, list(range(9))))
    done: list[int] = []
    apply = PruneChannels.apply

    def counted(*args: Any) -> Outcome:
        done.append(1)
        return apply(*args)

    monkeypatch.setattr(PruneChannels, "apply", counted)
    budget = laconic.Budget(minimize="macs", threads=1)
    for held, times in ((task, 1), (task, 1), (replace(task, validation=batches(10, seed=7)), 2)):
        laconic.compress(program, held, budget=budget, workdir=tmp_path)
        assert len(done) == times


def test_candidates_go_from_mild_to_strong(model, task):
    program = capture(model, torch.randn(2, 8))
    recover = recovery(program, task, laconic.Budget())
    assert recover is not None
    assert recover.method == "distill.logits"
    assert [chain.recipes[0].name for chain in basics()] == ["fold", "int8"]
    for chain in basics():
        found = pruned(program, laconic.Budget(minimize="size"), recover, chain.name).recipes
        ratios = [r.steps[0].options["ratio"] for r in found]
        assert ratios == sorted(ratios)
        assert {r.steps[0].options["of"] for r in found} == {"parameters"}
        assert all(r.steps[1] == recover for r in found)
        assert all(r.steps[2] == chain.recipes[0].steps[0] for r in found)


def test_integers_where_they_pay_come_last_and_for_latency_only():
    latency = laconic.Budget(minimize="latency", batch=4)
    for chain in basics():
        (found,) = paying(chain.recipes[0], latency).recipes
        assert [step.method for step in found.steps] == ["quantize.static", "quantize.where"]
        assert found.steps[-1].options["batch"] == 4
        assert not paying(chain.recipes[0], laconic.Budget(minimize="size")).recipes
    (few,) = paying(finer(basics()[1].recipes[0]).recipes[0], latency).recipes
    assert few.steps[0].options == {"bits": 6}


def test_a_search_for_latency_ends_with_integers_where_they_pay(model, task, monkeypatch):
    program, asked = capture(model, torch.randn(2, 8)), []

    def refused(search: Search, recipe: Recipe) -> bool:
        asked.append(recipe.name)
        return False

    monkeypatch.setattr(Search, "_try", refused)
    with pytest.raises(BudgetError):
        laconic.compress(program, task, budget=laconic.Budget(threads=1))
    assert asked[:2] == ["fold", "int8"]
    assert asked[-1] == "int8, integers where they pay"


@pytest.mark.parametrize("spoiled", ["", "integers"])
def test_the_better_kind_is_pruned_and_the_other_where_it_fails(task, monkeypatch, spoiled):
    """By size, integers are the better kind; where pruning them is ruinous, floats come next."""
    program = capture(exact(100), torch.randn(2, 8))
    name = groups(program)[0].name
    asked: list[str] = []

    def stronger(program, budget, recover, kind):
        asked.append(kind)
        kept = [0] if kind == spoiled else list(range(6))
        first = cut(name, kept).steps[0]
        last = next(chain for chain in basics() if chain.name == kind).recipes[0].steps[0]
        return Chain(kind, [Recipe(steps=(first, last), name=f"pruned {kind}")])

    monkeypatch.setattr(compress_module, "pruned", stronger)
    budget = laconic.Budget(minimize="size", threads=1, max_drop=8.0)
    result = laconic.compress(program, task, budget=budget)
    assert asked == (["integers"] if not spoiled else ["integers", "as it is"])
    chosen = next(c.name for c in result.candidates if c.chosen)
    assert chosen.startswith("pruned integers" if not spoiled else "pruned as it is")
    finer = [c.name for c in result.candidates if "bit weights" in c.name]
    assert bool(finer) == (not spoiled)  # fewer bits only where the weights are integers
