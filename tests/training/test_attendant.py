"""Somebody who takes part: called in order, kept on disk, heard about which states count."""

import os
import signal

import pytest
import torch

from laconic.core.errors import TrainingError
from laconic.training.attendant import Attendant
from laconic.training.loop import train
from laconic.training.plan import Plan

PLAN = Plan(steps=6, lr=0.05, optimizer="sgd", precision="fp32", evaluations=3, save_every=0)


class Witness(Attendant):
    """Writes down what it is told; halves one tensor's gradient, and remembers a number."""

    def __init__(self, count_from=0):
        self.calls, self.count_from = [], count_from
        self.total = torch.zeros(1)

    def begin(self, program, plan):
        self.program = program
        self.calls.append(("begin", plan.steps))

    def before(self, step):
        self.calls.append(("before", step))
        gradient = self.program.tensor("head.weight").grad
        self.total += gradient.abs().sum()
        gradient.mul_(0.5)

    def after(self, step, optimizer):
        self.calls.append(("after", step))
        assert any(p is self.program.tensor("head.weight") for p in optimizer.state)
        self.program.tensor("head.weight").data.mul_(1 - 0.01 * self.total.clamp(max=1))

    def project(self, tensors):
        tensors["head.weight"].clamp_(min=0)

    def judged(self, step):
        return step >= self.count_from

    def tensors(self):
        return {"total": self.total}

    def restore(self, tensors):
        self.total.copy_(tensors["total"])


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("length", [{"steps": 6}, {"steps": None, "minutes": 0.01}])
def test_it_is_told_every_step_once_and_no_trial(sample, program, task, length):
    witness = Witness()
    plan = PLAN.model_copy(update=length)
    got = train(sample.make_job(program, task, plan, attendant=witness))
    steps = got.plan.steps
    pairs = [(when, step) for step in range(1, steps + 1) for when in ("before", "after")]
    assert witness.calls == [("begin", steps), *pairs]


@pytest.mark.parametrize("more", [{}, {"ema": 0.5}, {"accumulate": 2}])
def test_stopped_and_resumed_equals_uninterrupted(sample, program, task, tmp_path, more):
    plan = PLAN.model_copy(update=more)
    whole = sample.make_job(program, task, plan, attendant=Witness(4))
    wanted = train(whole)
    job = sample.make_job(program, task, plan)

    def stopping(forward, batch, number):
        if number == 2 * (plan.accumulate or 1):
            os.kill(os.getpid(), signal.SIGINT)
        return job.objective(forward, batch, number)

    with pytest.raises(KeyboardInterrupt):
        train(
            sample.make_job(
                program, task, plan, attendant=Witness(4), folder=tmp_path, objective=stopping
            )
        )
    witness = Witness(4)
    again = sample.make_job(program, task, plan, attendant=witness, folder=tmp_path)
    resumed = train(again)
    assert witness.calls[:2] == [("begin", 6), ("before", 4)]
    assert equal(sample.tensors(again.program), sample.tensors(whole.program))
    assert torch.equal(witness.total, whole.attendant.total)
    assert resumed.evaluations == wanted.evaluations
    assert resumed.best_step == wanted.best_step >= 4


def test_states_that_do_not_count_are_never_kept(sample, program, task):
    scores = iter([0.9, 0.8, 0.1, 0.2])
    got = train(
        sample.make_job(
            program, task, PLAN, attendant=Witness(4), score=lambda made, precision: next(scores)
        )
    )
    assert [entry[2] for entry in got.evaluations] == [0.9, 0.8, 0.1, 0.2]
    assert (got.best_step, got.score) == (6, 0.2)


def test_a_running_mean_is_projected(sample, program, task):
    job = sample.make_job(
        program, task, PLAN.model_copy(update={"ema": 0.9}), score=None, attendant=Witness()
    )
    train(job)
    assert bool((job.program.tensor("head.weight") >= 0).all())
    assert bool((program.tensor("head.weight") < 0).any())


def test_a_run_that_starts_later_is_the_rest_of_the_whole(sample, program, task):
    """Without momentum a run is its weights: step 2's state, trained from step 2 on, ends equal."""
    plan = PLAN.model_copy(update={"momentum": 0.0, "steps": 5})

    class Second(Attendant):
        def begin(self, program, plan):
            self.program = program

        def after(self, step, optimizer):
            if step == 2:
                self.kept = sample.tensors(self.program)

    second = Second()
    whole = sample.make_job(program, task, plan, score=None, attendant=second)
    train(whole)
    job = sample.make_job(program, task, plan, score=None, start=2)
    for name, tensor in second.kept.items():
        job.program.set_tensor(name, tensor)
    rest = train(job)
    assert equal(sample.tensors(job.program), sample.tensors(whole.program))
    assert rest.best_step == 5
    assert not rest.notes


def test_a_later_start_that_diverges_at_once_is_an_error(sample, program, task):
    plan = PLAN.model_copy(update={"lr": 1e30, "clip": None, "evaluations": 1})
    with pytest.raises(TrainingError, match="before any state worth keeping"):
        train(sample.make_job(program, task, plan, score=None, start=3))
