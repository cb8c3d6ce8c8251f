"""nas: training together is resumable and deterministic, searches keep their budgets."""

import builtins
import os
import signal
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from laconic.core.errors import BudgetError, DataError, MissingExtra
from laconic.methods.base import Context
from laconic.methods.nas import search as nas_search
from laconic.methods.nas.search import Search
from laconic.methods.nas.supernet import Supernet
from laconic.program.cost import cost
from laconic.program.sites import Sites
from laconic.solvers.recalibrate import recalibrate
from laconic.solvers.search.elastic import Elastic, declare
from laconic.testing import zoo
from laconic.testing.contracts import own_outputs

SPACE = {"width:*": [1.0, 0.75, 0.5, 0.25], "depth:*": [1.0, 0.5, 0]}
FEW = {"space": SPACE, "samples": 8, "validation": 8, "importance": "l2"}


@pytest.fixture(scope="module")
def program():
    return zoo.captured("resnet")


@pytest.fixture(scope="module")
def context(program):
    return Context(task=own_outputs(program), original=program.clone(), seed=1)


def equal(one, two):
    held, other = one.state_dict(), two.state_dict()
    return held.keys() == other.keys() and all(torch.equal(held[k], other[k]) for k in held)


class Interrupted(list):
    """Batches, of which one sends Ctrl-C when it is taken."""

    def __init__(self, batches, at):
        super().__init__(batches)
        self.taken, self.at = 0, at

    def __iter__(self):
        for batch in super().__iter__():
            self.taken += 1
            if self.taken == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


@pytest.mark.parametrize("inplace", [False, True])
def test_a_supernet_taken_up_again_is_the_uninterrupted_one(program, context, inplace, tmp_path):
    method = Supernet(
        space=SPACE, importance="l2", samples=8, steps=6, members=1, shrink=0.5, evaluations=1,
        teacher="torch", precision="fp32", save_every=0, inplace=inplace,
    )  # fmt: skip
    whole = method.apply(program, Sites(), context)
    stopped = replace(
        context,
        task=replace(context.task, train=Interrupted(context.task.train, 5)),
        workdir=tmp_path,
    )
    with pytest.raises(KeyboardInterrupt):
        method.apply(program, Sites(), stopped)
    stopped.task.train.at = -1
    again = method.apply(program, Sites(), stopped)
    assert equal(whole.program, again.program)
    assert not equal(whole.program, program)
    assert whole.figures["macs"][0] == cost(program).macs > whole.figures["macs"][1]
    assert {k: v.shape for k, v in whole.program.state_dict().items()} == {
        k: v.shape for k, v in program.state_dict().items()
    }


@pytest.mark.parametrize("inplace", [False, True])
def test_largest_and_smallest_both_learn(program, context, inplace):
    made = Supernet(
        space={"width:*": [1.0, 0.5]}, importance="l2", samples=8, steps=40, members=1, shrink=0.0,
        evaluations=1, teacher="torch", precision="fp32", lr=0.02, optimizer="sgd", inplace=inplace,
    ).apply(program, Sites(), context)  # fmt: skip
    fresh = Supernet(
        space={"width:*": [1.0, 0.5]}, importance="l2", samples=8, steps=1, members=0, shrink=0.0,
        evaluations=1, teacher="torch", precision="fp32", lr=1e-9, inplace=inplace,
    ).apply(program, Sites(), context)  # fmt: skip

    def away(trained):
        """Of the smallest member's outputs from the original's."""
        elastic = Elastic(trained.program)
        space, _ = declare(elastic, {"width:*": [1.0, 0.5]}, Sites())
        least = elastic.cut(space.least()).program
        held = [tuple(inputs.values()) for inputs, _ in context.task.train]
        recalibrate(least, held)
        with torch.no_grad():
            gaps = [(least(*flat) - program(*flat)).square().mean() for flat in held]
        return torch.stack(gaps).mean()

    assert away(made) < 0.7 * away(fresh)


@pytest.mark.parametrize(
    "more",
    [
        {"strategy": "random"},
        {"strategy": "evolution", "trials": 20},
        {"strategy": "tpe", "trials": 14},
        {"strategy": "nsga2", "objectives": ("score", "macs"), "trials": 18},
        {"by": "predictor"},
        {"by": "synflow"},
        {"by": "jacobian"},
        {"by": "zico"},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_every_strategy_keeps_the_budget_and_repeats_itself(program, context, more, tmp_path):
    context = replace(context, workdir=tmp_path)  # the second search asks for nothing anew
    method = Search(**{"trials": 6, **FEW, "macs": 0.4, **more})
    got = method.apply(program, Sites(), context)
    assert got.figures["macs"][1] == cost(got.program).macs <= 0.4 * cost(program).macs
    assert all(trial["macs"] <= 0.4 for trial in got.figures["history"])
    scores = [point["score"] for point in got.figures["front"]]
    assert scores == sorted(scores)
    if more.get("by", "predictor") == "predictor":
        assert got.figures["score"] == pytest.approx(
            max(t["score"] for t in got.figures["history"])
        )
    again = method.apply(program, Sites(), context)
    assert again.resolved["member"] == got.resolved["member"]
    assert again.figures["evaluated"] == 0


def test_a_space_without_a_member_within_the_budget_is_refused(program, context):
    with pytest.raises(BudgetError, match="no member is within the budget"):
        Search(**FEW, macs=0.001).apply(program, Sites(), context)


def test_a_search_taken_up_again_pays_for_nothing_twice(program, context, tmp_path):
    held = replace(context, workdir=tmp_path)
    method = Search(**FEW, macs=0.5, trials=6, rungs=2, strategy="random")
    first = method.apply(program, Sites(), held)
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('["cut sho')  # as a run leaves it that is killed while it writes
    second = method.apply(program, Sites(), held)
    assert first.figures["evaluated"] > 0 == second.figures["evaluated"]
    assert first.figures["history"] == second.figures["history"]
    other = Search(**{**FEW, "samples": 4}, macs=0.5, trials=6, strategy="random")
    assert other.apply(program, Sites(), held).figures["evaluated"] > 0


def test_evaluations_on_other_data_are_not_taken(program, context, tmp_path):
    method = Search(**FEW, macs=0.8, strategy="random", trials=3)
    here = replace(context, workdir=tmp_path)
    first = method.apply(program, Sites(), here)
    assert method.apply(program, Sites(), here).figures["evaluated"] == 0
    (x, y), *_ = context.task.validation
    moved = [({name: value + 1 for name, value in x.items()}, y)]
    other = replace(here, task=replace(context.task, validation=moved))
    assert method.apply(program, Sites(), other).figures["evaluated"] == first.figures["evaluated"]


def test_rungs_promote_the_best_to_more_data(program, context):
    got = Search(**FEW, macs=0.5, trials=8, rungs=2, strategy="random").apply(
        program, Sites(), context
    )
    first = [t for t in got.figures["history"] if t["share"] == 0.25]
    last = [t for t in got.figures["history"] if t["share"] == 1.0]
    distinct = len({tuple(t["genes"]) for t in first})
    assert len(first) == 8 and len(last) == max(distinct // 4, 1)
    best = sorted({t["score"] for t in first}, reverse=True)[: len(last)]
    chosen = [t["score"] for t in first if t["genes"] in [one["genes"] for one in last]]
    assert min(chosen) >= min(best)


def test_architecture_and_bits_share_a_budget_of_bytes(program, context):
    space = {"width:*": [1.0, 0.5], "bits:*": [8, 4]}
    got = Search(**{**FEW, "space": space}, size=0.3, trials=4).apply(program, Sites(), context)
    held = got.resolved["member"]
    assert {v for k, v in held.items() if k.startswith("bits")} & {8, 4}
    stored = sum(row.bytes for row in cost(program).rows)
    assert got.figures["bytes"][1] <= 0.3 * stored
    assert any(not t.is_floating_point() for _, t in got.program.tensors())


def test_milliseconds_are_those_of_the_clock(program, context, monkeypatch):
    class Fake:
        """A runtime whose milliseconds are a constant and the multiply-adds; it counts networks."""

        timed = 0

        def __init__(self, runtime, threads):
            assert runtime == context.runtime

        def __call__(self, programs):
            Fake.timed += len(programs)
            return {name: 1e-3 + 1e-6 * cost(one).macs for name, one in programs.items()}

    monkeypatch.setattr(nas_search, "Stopwatch", Fake)
    got = Search(**FEW, latency=0.5, trials=6).apply(program, Sites(), context)
    whole, member = got.figures["milliseconds"]
    assert member <= 0.5 * whole
    assert whole == pytest.approx(1e-3 + 1e-6 * cost(program).macs, abs=1e-6)
    assert all("latency" in trial for trial in got.figures["history"])


def test_optuna_is_named_where_it_is_missing(program, context, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "optuna":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"laconic\[search\]"):
        Search(**FEW, macs=0.5, strategy="tpe").apply(program, Sites(), context)


@pytest.mark.parametrize(
    "options",
    [{"objectives": ("macs",)}, {"strategy": "tpe", "objectives": ("score", "macs")},
     {"importance": "no_such"}, {"macs": 0}],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValidationError):
        Search(**options)


def test_without_labels_the_distance_to_the_original_counts(program, context):
    unlabelled = [batch[0] for batch in context.task.train]
    task = replace(context.task, train=unlabelled, validation=None, split=lambda b: (b, None))
    got = Search(**FEW, macs=0.9, trials=3).apply(program, Sites(), replace(context, task=task))
    assert got.figures["score"] >= 0  # a loss
    everything = {**FEW, "space": {"width:*": [1.0, 0.5]}}
    whole = Search(**everything, trials=2).apply(program, Sites(), replace(context, task=task))
    assert "no budget was given" in " ".join(whole.notes)


@pytest.mark.parametrize("by", ["inherited", "predictor"])
def test_members_that_score_nan_are_never_taken(program, context, by):
    task, asked = context.task, []

    def metric(outputs, targets):
        asked.append(0)
        scores = task.metric(outputs, targets)
        return scores * float("nan") if len(asked) % 2 else scores

    held = replace(context, task=replace(task, metric=metric))
    method = Search(**FEW, macs=0.8, strategy="random", trials=8, by=by)
    got = method.apply(program, Sites(), held)
    assert got.figures["score"] == got.figures["score"]  # a number
    assert any(trial["score"] is None for trial in got.figures["history"])

    def nothing(outputs, targets):
        return task.metric(outputs, targets) * float("nan")

    held = replace(context, task=replace(task, metric=nothing))
    with pytest.raises(DataError, match="none of .* members has a score"):
        method.apply(program, Sites(), held)
