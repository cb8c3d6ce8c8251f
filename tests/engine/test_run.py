from dataclasses import replace
from pathlib import Path

import pytest
import torch

from laconic.core.errors import RecipeError, SurgeryError
from laconic.core.progress import Progress
from laconic.core.recipe import Recipe, Step
from laconic.engine.run import Bench, run
from laconic.engine.store import Store, fingerprint
from laconic.methods.base import Context, method_of

from .conftest import FAKES, Halve, Scale  # isort: skip


def bench(task, program, folder=None, **more):
    return Bench(context=Context(task=task, original=program), store=Store(folder), **more)


RECIPE = Recipe.of([{"method": "scale", "factor": 3.0}, {"method": "halve"}])


def test_steps_run_in_order_and_leave_the_input_alone(fakes, program, task):
    before = fingerprint(program)
    done = run(program, RECIPE, bench(task, program))
    assert fakes == [("scale", 3.0), ("halve", 0.0)]
    assert fingerprint(program) == before
    expected = program.tensor("2.weight")[:, ::2] * 3
    assert torch.equal(done.program.tensor("2.weight"), expected)
    assert [record.method for record in done.steps] == ["scale", "halve"]
    assert done.steps[0].after == done.steps[1].before
    assert done.steps[1].after["macs"] == done.steps[1].before["macs"] / 2
    assert done.steps[1].figures == {"kept": 4}


def test_changes_of_two_cuts_name_positions_of_the_original(fakes, program, task):
    done = run(program, Recipe.of([{"method": "halve"}] * 2), bench(task, program))
    assert done.changes["0.weight"][0].tolist() == [0, 4]
    assert done.changes["2.weight"][1].tolist() == [0, 4]
    kept = done.changes["0.weight"][0]
    assert torch.equal(done.program.tensor("0.weight"), program.tensor("0.weight")[kept])


class Saying(Progress):
    """Hands on what is said."""

    def __init__(self, then):
        self.say = then


def test_resumed_is_uninterrupted(fakes, program, task, tmp_path: Path):
    whole = run(program, RECIPE, bench(task, program))

    def stops(text):
        if text.startswith("halve"):
            raise KeyboardInterrupt

    stopping = bench(task, program, tmp_path)
    stopping = replace(stopping, context=replace(stopping.context, progress=Saying(stops)))
    fakes.clear()
    with pytest.raises(KeyboardInterrupt):
        run(program, RECIPE, stopping)
    assert fakes == [("scale", 3.0)]
    fakes.clear()
    resumed = run(program, RECIPE, bench(task, program, tmp_path))
    assert fakes == [("halve", 0.0)]  # the finished step came from the folder
    assert fingerprint(resumed.program) == fingerprint(whole.program)
    assert resumed.recipe == whole.recipe
    again = run(program, RECIPE, bench(task, program, tmp_path))
    assert fakes == [("halve", 0.0)]
    assert again.changes["0.weight"][0].tolist() == whole.changes["0.weight"][0].tolist()
    assert torch.equal(again.program.example[0], program.example[0])


def test_a_checkpoint_cut_short_is_made_again(fakes, program, task, tmp_path: Path):
    done = run(program, RECIPE, bench(task, program, tmp_path))
    for path in tmp_path.glob("*.laconic"):
        path.write_bytes(path.read_bytes()[:-7])
    fakes.clear()
    again = run(program, RECIPE, bench(task, program, tmp_path))
    assert len(fakes) == 2
    assert fingerprint(again.program) == fingerprint(done.program)


def test_candidates_share_their_first_steps(fakes, program, task):
    shared = bench(task, program)
    run(program, Recipe.of([{"method": "scale"}]), shared)
    run(program, Recipe.of([{"method": "scale"}, {"method": "halve"}]), shared)
    assert fakes == [("scale", 2.0), ("halve", 0.0)]


def test_other_seeds_share_nothing(fakes, program, task, tmp_path):
    first = bench(task, program, tmp_path)
    run(program, RECIPE, first)
    run(program, RECIPE, replace(first, context=replace(first.context, seed=1)))
    assert len(fakes) == 4


class Widths:
    """Judges by the width of the first layer: a recipe has to make it smaller than `enough`."""

    def __init__(self, enough):
        self.enough = enough

    def concerns(self, before, after):
        return before.tensor("0.weight").shape != after.tensor("0.weight").shape

    def __call__(self, without, made):
        wide, narrow = (p.tensor("0.weight").shape[0] for p in (without, made))
        return "" if narrow < wide and narrow <= self.enough else f"{narrow} is no gain over {wide}"


class Reading(Scale):
    """Multiplies by what a file says."""

    path: str

    def files(self):
        return (self.path,)

    def apply(self, program, sites, context):
        held = Path(self.path)
        factor = float(held.read_text()) if held.exists() else 1.0
        return Scale(factor=factor).apply(program, sites, context)


def test_what_a_file_holds_is_part_of_the_step(fakes, program, task, tmp_path, monkeypatch):
    monkeypatch.setitem(FAKES, "reading", Reading)
    path = tmp_path / "factor"
    recipe = Recipe.of([{"method": "reading", "path": str(path)}])
    for text in (None, "2", "2", "3"):
        if text is not None:
            path.write_text(text)
        done = run(program, recipe, bench(task, program, tmp_path / "store"))
        expected = program.tensor("2.weight") * float(text or 1)
        assert torch.equal(done.program.tensor("2.weight"), expected)
    assert fakes == [("scale", 1.0), ("scale", 2.0), ("scale", 3.0)]


def test_a_step_that_does_not_pay_is_undone(fakes, program, task):
    done = run(program, RECIPE, bench(task, program, judge=Widths(3)))
    assert [record.kept for record in done.steps] == [True, False]
    assert done.steps[1].reason == "4 is no gain over 8"
    assert [step.method for step in done.recipe] == ["scale"]
    assert done.changes == {}
    assert done.program.tensor("0.weight").shape == (8, 4)


def test_a_step_that_pays_with_a_later_one_only_is_kept(fakes, program, task):
    twice = Recipe.of([{"method": "halve"}, {"method": "scale"}, {"method": "halve"}])
    done = run(program, twice, bench(task, program, judge=Widths(2)))
    assert all(record.kept for record in done.steps)
    assert done.program.tensor("0.weight").shape == (2, 4)
    # what each is compared with is made without the steps that are not judged
    assert [name for name, _ in fakes].count("scale") == 1


def test_replaying_the_resolved_recipe_is_bit_exact(fakes, program, task, tmp_path):
    done = run(program, RECIPE, bench(task, program))
    path = tmp_path / "recipe.yaml"
    path.write_text(done.recipe.to_yaml())
    replayed = run(program, Recipe.read(path), bench(task, program))
    assert Recipe.read(path).resolved
    assert fingerprint(replayed.program) == fingerprint(done.program)


def test_an_error_names_the_step_and_keeps_what_was_finished(
    fakes, program, task, tmp_path, monkeypatch
):
    def fails(self, program, sites, context):
        raise SurgeryError("no such group", where="x")

    monkeypatch.setattr(Halve, "apply", fails)
    with pytest.raises(SurgeryError, match=r"x: no such group\s+in step 2 \(halve\)"):
        run(program, RECIPE, bench(task, program, tmp_path))
    assert len(list(tmp_path.glob("*.laconic"))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.5}, "step 1 (prune.channels): ratio 1.5 is not from 0 to below 1"),
        ({"block": "atuo"}, "block = 'atuo': Input should be 'auto', or: Input should be a valid"),
        ({"samples": 0}, "samples = 0: Input should be greater than or equal to 1"),
        ({"ratoi": 0.5}, "no option 'ratoi' (did you mean 'ratio'?)"),
    ],
)
def test_an_option_that_does_not_fit_is_named_with_what_it_may_be(options, words):
    with pytest.raises(RecipeError) as caught:
        method_of(Step(method="prune.channels", options=options), "step 1")
    assert words in str(caught.value) and "Value error" not in str(caught.value)


def test_options_are_checked_before_anything_runs(program, task):
    recipe = Recipe.of([{"method": "prune.chanels"}])
    with pytest.raises(RecipeError, match="step 1: no method named 'prune.chanels'"):
        run(program, recipe, bench(task, program))
    assert Scale().factor == 2.0
