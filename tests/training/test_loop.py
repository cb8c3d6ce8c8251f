"""What the loop promises: repeatable, resumable, keeps the best, says what went wrong."""

import dataclasses
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from laconic.core.errors import DataError, StorageError, TrainingError
from laconic.core.progress import Progress
from laconic.program.capture import capture
from laconic.training import checkpoint
from laconic.training.feed import Feed
from laconic.training.job import Job, Loss
from laconic.training.loop import train
from laconic.training.plan import Plan

PLAN = Plan(
    steps=7, lr=0.05, optimizer="sgd", precision="fp32", evaluations=3, save_every=0, dropout=True
)


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture
def fit(sample, program, task):
    """Train a fresh clone: (what came of it, tensors)."""

    def run(plan=PLAN, on=task, **options):
        job = sample.make_job(program, on, plan, **options)
        return train(job), sample.tensors(job.program)

    return run


VARIANTS = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "bf16": {"precision": "bf16"},
    "ema": {"ema": 0.5},
    "accumulate": {"accumulate": 3},
}


@pytest.fixture(params=VARIANTS)
def plan(request):
    return PLAN.model_copy(update=VARIANTS[request.param])


def test_training_repeats_bit_for_bit_and_touches_nothing_else(sample, program, task, fit, plan):
    before, random = sample.tensors(program), torch.get_rng_state()
    first, one = fit(plan)
    torch.rand(5)  # the state of the global generator must not matter
    second, two = fit(plan)
    assert equal(one, two)
    assert not equal(one, before)
    assert equal(sample.tensors(program), before)
    assert first.evaluations == second.evaluations
    torch.set_rng_state(random)
    fit(plan)
    assert torch.equal(torch.get_rng_state(), random)


def test_it_learns(fit):
    got, _ = fit(PLAN.model_copy(update={"steps": 150}))
    assert got.score > 0.7  # four classes
    assert got.score > got.evaluations[0][2] + 0.2


class Stopper:
    """Presses Ctrl-C while batch `at` is computed."""

    def __init__(self, objective, at):
        self.objective, self.at = objective, at

    def __call__(self, forward, batch, number):
        if number == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.objective(forward, batch, number)


@pytest.mark.parametrize("at", [0, 3, 6])
def test_stopped_and_resumed_equals_uninterrupted(sample, program, task, fit, plan, at, tmp_path):
    whole, wanted = fit(plan)
    handler = signal.getsignal(signal.SIGINT)
    job = sample.make_job(program, task, plan, folder=tmp_path)
    stopping = Stopper(job.objective, at * (plan.accumulate or 1))
    with pytest.raises(KeyboardInterrupt):
        train(sample.make_job(program, task, plan, folder=tmp_path, objective=stopping))
    assert signal.getsignal(signal.SIGINT) is handler
    identity = f"sample {Feed(task.train, job.seed).beginning()}"
    assert checkpoint.read(tmp_path, identity).state["step"] == at + 1
    resumed, got = fit(plan, folder=tmp_path)
    assert equal(got, wanted)
    assert resumed.evaluations == whole.evaluations
    assert resumed.best_step == whole.best_step


def test_a_finished_run_is_taken_as_it_is(fit, tmp_path):
    def never(forward, batch, number):
        raise AssertionError("trained again")

    _, first = fit(folder=tmp_path)
    _, again = fit(folder=tmp_path, objective=never)
    assert equal(first, again)


def test_another_runs_state_is_not_taken(fit, tmp_path):
    fit(PLAN.model_copy(update={"lr": 0.2}), folder=tmp_path, identity="another")
    _, got = fit(folder=tmp_path)
    assert equal(got, fit()[1])


@pytest.mark.parametrize("wrap", [list, lambda data: DataLoader(data, batch_size=None)])
def test_a_state_from_other_data_is_not_taken(sample, fit, task, tmp_path, wrap):
    """The first batch tells them apart."""
    own = replace(task, train=wrap(task.train))
    other = replace(task, train=wrap(sample.make_batches(6, seed=9)))
    fit(on=other, folder=tmp_path)
    fresh = fit(on=own)[1]
    assert equal(fit(on=own, folder=tmp_path)[1], fresh)
    assert not equal(fit(on=other)[1], fresh)


def test_a_loader_that_counts_its_passes_is_not_looked_at(fit, task, tmp_path):
    class Counting:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(task.train)

    looked, plain = Counting(), Counting()
    fit(on=replace(task, train=looked), folder=tmp_path)
    fit(on=replace(task, train=plain))
    assert looked.passes == plain.passes == 2  # seven steps of six batches


def test_a_damaged_state_is_an_error(fit, tmp_path):
    fit(folder=tmp_path)
    path = tmp_path / checkpoint.FILE
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StorageError, match="damaged"):
        fit(folder=tmp_path)


def test_a_full_disk_does_not_end_training_and_keeps_the_older_state(fit, tmp_path, monkeypatch):
    fit(folder=tmp_path, identity="older")
    held = (tmp_path / checkpoint.FILE).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    got, tensors = fit(folder=tmp_path)
    assert any("No space left" in note for note in got.notes)
    assert len([note for note in got.notes if "No space left" in note]) == 1
    assert (tmp_path / checkpoint.FILE).read_bytes() == held
    monkeypatch.undo()
    assert equal(tensors, fit()[1])


def test_the_best_state_is_kept(sample, program, task):
    """Scores that are dictated: the best is at the second of three evaluations."""
    dictated, seen = [0.1, 0.3, 0.9, 0.2], []

    def score(made, precision):
        seen.append(sample.tensors(made))
        return dictated[len(seen) - 1]

    job = sample.make_job(program, task, PLAN, score=score)
    got = train(job)
    assert (got.best_step, got.score) == (5, 0.9)
    assert [entry[0] for entry in got.evaluations] == [0, 2, 5, 7]
    assert equal(sample.tensors(job.program), seen[2])


def test_nothing_better_keeps_the_beginning_and_says_so(sample, program, task):
    scores = iter([1.0, 0.5, 0.5, 0.5])
    job = sample.make_job(program, task, PLAN, score=lambda made, precision: next(scores))
    got = train(job)
    assert got.best_step == 0
    assert equal(sample.tensors(job.program), sample.tensors(program))
    assert any("no state was better" in note for note in got.notes)


def test_patience_ends_early(sample, program, task):
    scores = iter([0.5, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1])
    plan = PLAN.model_copy(update={"evaluations": 6, "patience": 2})
    got = train(sample.make_job(program, task, plan, score=lambda made, precision: next(scores)))
    assert got.best_step == 1
    assert len(got.evaluations) == 4
    assert any("2 evaluations without" in note for note in got.notes)


def exploding(objective, at):
    def wrapped(forward, batch, number):
        loss = objective(forward, batch, number)
        return Loss(loss.value * float("nan"), loss.samples) if number == at else loss

    return wrapped


def test_nan_keeps_the_last_good_state(sample, program, task):
    good = sample.make_job(program, task, PLAN, score=None)
    job = sample.make_job(program, task, PLAN, score=None, objective=exploding(good.objective, 5))
    got = train(job)
    assert got.best_step == 5
    assert any("nan at step 6 of 7; the state of step 5 was kept" in note for note in got.notes)
    assert all(bool(t.isfinite().all()) for t in sample.tensors(job.program).values())


def test_nan_before_anything_good_is_an_error(sample, program, task):
    good = sample.make_job(program, task, PLAN)
    job = sample.make_job(program, task, PLAN, objective=exploding(good.objective, 1))
    with pytest.raises(TrainingError, match="nan at step 2 of 7.*lower lr"):
        train(job)
    assert not job.program.training


def test_epochs_become_steps(fit):
    assert fit(Plan(epochs=2, precision="fp32"))[0].plan.steps == 12
    assert fit(Plan(epochs=0.4, precision="fp32"))[0].plan.steps == 3
    assert fit(Plan(epochs=1, accumulate=4, precision="fp32"))[0].plan.steps == 2
    assert fit(Plan(precision="fp32"))[0].plan.steps == 30


def test_minutes_become_steps_that_replay_exactly(fit, task):
    got, tensors = fit(PLAN.model_copy(update={"steps": None, "minutes": 0.02}))
    assert got.plan.minutes is None
    assert got.plan.steps > 3
    again, replayed = fit(got.plan)
    assert equal(tensors, replayed)
    assert again.plan == got.plan


def test_judging_takes_a_part_of_the_minutes(sample, program, task):
    def slow(*_):
        time.sleep(0.1)
        return 0.5

    plan = PLAN.model_copy(update={"steps": None, "minutes": 0.03, "evaluations": 50})
    job = replace(sample.make_job(program, task, plan), score=slow)
    got = train(job)
    assert got.plan.evaluations <= 4
    assert got.plan.steps > 3
    assert any(note.startswith("judged ") and "not 50" in note for note in got.notes)


def test_an_empty_loader_is_an_error(sample, program):
    task = sample.make_task(batches=0)
    with pytest.raises(DataError, match="training data: the loader gives no batches"):
        train(sample.make_job(program, task, PLAN))


def test_layout_mode_and_flags_are_as_before(sample, program, task):
    job = sample.make_job(program, task, PLAN)
    train(job)
    assert not job.program.training
    assert all(t.is_contiguous() for _, t in job.program.tensors())
    x = task.train[0][0]
    assert torch.equal(job.program(x), job.program(x))  # dropout is off


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_off_unless_asked_for(sample, program, task, dropout):
    job = sample.make_job(program, task, PLAN.model_copy(update={"dropout": dropout}))
    same, objective = [], job.objective

    def twice(forward, batch, number):
        first, second = forward(batch[0])[0], forward(batch[0])[0]
        same.append(torch.equal(first, second))
        return objective(forward, batch, number)

    train(dataclasses.replace(job, objective=twice))
    assert same == [not dropout] * PLAN.steps
    assert job.program.dropout  # a switch of the run only


def test_vectors_do_not_decay(sample, program, task):
    """With a gradient of zero, weight decay is all that moves a weight."""

    def nothing(forward, batch, number):
        return Loss(forward(batch[0])[0].sum() * 0, len(batch[0]))

    plan = PLAN.model_copy(update={"weight_decay": 0.5})
    job = sample.make_job(program, task, plan, objective=nothing, score=None)
    train(job)
    for name, parameter in job.program.named_parameters():
        same = torch.equal(parameter, program.tensor(name))
        assert same == (parameter.ndim <= 1), name


def test_progress_names_loss_and_time_left(sample, program, task):
    notes = []

    class Bars(Progress):
        def task(self, what, total=None):
            from contextlib import contextmanager

            class Bar:
                def advance(self, steps=1, note=""):
                    notes.append((steps, note))

            @contextmanager
            def opened():
                yield Bar()

            assert (what, total) == ("training", 7)
            return opened()

    train(sample.make_job(program, task, PLAN, progress=Bars()))
    assert sum(steps for steps, _ in notes) == 7
    assert all("loss " in note and note.endswith(" left") for steps, note in notes if note)


def test_a_last_step_with_an_infinite_gradient_keeps_the_last_good_state(sample, program, task):
    good = sample.make_job(program, task, PLAN)

    def steep(forward, batch, number):
        loss = good.objective(forward, batch, number)
        root = (loss.value * 0).sqrt() if number == 6 else 0.0  # zero; its gradient is not finite
        return Loss(loss.value + root, loss.samples)

    for score in (None, good.score):
        job = sample.make_job(program, task, PLAN, score=score, objective=steep)
        got = train(job)
        assert any("NaN at step 7 of 7; the state of step" in note for note in got.notes)
        assert got.best_step < 7
        assert all(bool(t.isfinite().all()) for t in sample.tensors(job.program).values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sample_alone_behind_pooling_leaves_statistics_finite(accumulate):
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)]
    program = capture(nn.Sequential(*layers).eval(), (torch.randn(2, 6),)).clone()
    x = torch.randn(9, 6)
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split(4)]

    def objective(forward, batch, number):
        del number
        return Loss(nn.functional.cross_entropy(forward(batch[0])[0], batch[1]), len(batch[0]))

    names = [name for name, tensor in program.tensors() if isinstance(tensor, nn.Parameter)]
    plan = Plan(steps=3, accumulate=accumulate, precision="fp32", evaluations=1)
    train(Job(program=program, names=names, objective=objective, loader=batches, plan=plan))
    assert all(bool(t.isfinite().all()) for _, t in program.tensors())
    assert float(program.tensor("1.running_mean").abs().max()) > 0
