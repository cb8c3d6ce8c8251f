"""The training loop: steps, evaluations, best state, states on disk, time.

What a run gives depends on the Program, the plan, the seed and the data only: not on the number of
processes, and not on whether it was stopped and taken up again. All randomness is drawn from
(seed, number of the batch); see `feed.py` for the order of the data and `normalization.py` for
batch statistics.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from laconic.core.errors import RecipeError, StorageError, TrainingError
from laconic.core.progress import Bar, clock
from laconic.training import checkpoint
from laconic.training.feed import Feed, forked, mixed, seed_all
from laconic.training.interrupts import Interrupt, deferred
from laconic.training.job import Forward, Job, Trained
from laconic.training.normalization import LoneValues, MergedStatistics, has_batch_norm
from laconic.training.optimizers import build, clip
from laconic.training.plan import DEFAULT_EPOCHS, Plan, steps_within
from laconic.training.precision import autocast, set_layout, wants_channels_last
from laconic.training.processes import Processes
from laconic.training.state import State

_NO_RATE = 1e-8  # of trial steps, which are taken back
_JUDGING = 0.25  # of a time that was given, what evaluations may take


def train(job: Job) -> Trained:
    """Train `job.program` in place; it ends in eval mode with the best state.

    Ctrl-C ends it after the current step: the state is written and `KeyboardInterrupt` raised.

    Raises:
        DataError: the training data are empty or do not fit.
        TrainingError: the loss became NaN or infinite before there was anything worth keeping.
        RecipeError: `accumulate` cannot be shared out among the processes.
    """
    home = next((t.device for _, t in job.program.tensors()), job.device)
    with ExitStack() as stack:
        stack.enter_context(forked(job.device))
        interrupt = stack.enter_context(deferred())
        job.program.dropout = job.plan.dropout
        stack.callback(setattr, job.program, "dropout", True)
        job.program.to(job.device).train()
        channels_last = wants_channels_last(job.program)
        if channels_last:
            set_layout(job.program, True)
            stack.callback(set_layout, job.program, False)
        stack.callback(job.program.to, home)
        stack.callback(job.program.eval)
        return _Run(job, interrupt).run()


class _Run:
    """A run under way."""

    def __init__(self, job: Job, interrupt: Interrupt) -> None:
        self.job = job
        self.interrupt = interrupt
        self.processes = Processes.current()
        self.plan = job.plan.settled(job.program, job.device, self.processes.count)
        self.batches = self.plan.accumulate or 1
        if self.batches % self.processes.count:
            raise RecipeError(
                f"accumulate = {self.batches} cannot be shared out among "
                f"{self.processes.count} processes",
                where="training",
                hint="make it a multiple of their number",
            )
        self.feed = Feed(job.loader, job.seed)
        self.identity = f"{job.identity} {self.feed.beginning()}" if job.folder else ""
        trained = [(name, job.program.tensor(name)) for name in job.names]
        self.parameters = [tensor for _, tensor in trained]
        self.optimizer = build(self.plan, self.parameters)
        self.state = State(job.program, self.optimizer, dict(trained), self.plan.ema)
        self.state.step = self.state.best_step = job.start
        self.processes.same_([tensor for _, tensor in job.program.tensors()])
        self.forward = self._forward()
        norms = has_batch_norm(job.program) and not self.plan.compile
        self.lone = LoneValues() if norms else nullcontext()
        self.notes: list[str] = []
        self.recent: list[float] = []  # losses since the last evaluation
        self.seen = 0.0  # what was watched at the last evaluation
        self.started = self.saved = time.perf_counter()

    def _forward(self) -> Forward:
        program = self.job.program
        return torch.compile(program.as_graph_module()) if self.plan.compile else program.run_flat

    def run(self) -> Trained:
        """All steps that are left, then the best state."""
        resumed = self._resume()
        if self.state.step:
            self.feed.skip(self.state.step * self.batches)
        if not resumed:
            first = self._evaluate() if self.job.score else None
            steps = self._steps()
            self.plan = self.plan.of_steps(steps)
            self._attend()
            if first is not None:
                self._judged(None, first)
        self._go()
        self._save(final=True)
        return self._finish()

    def _attend(self) -> None:
        self.state.attendant = self.job.attendant
        self.state.attendant.begin(self.job.program, self.plan)

    # length -------------------------------------------------------------------------------

    def _steps(self) -> int:
        plan = self.job.plan
        if plan.steps is not None:
            return plan.steps
        if plan.minutes is not None:
            return self._steps_in(60 * plan.minutes)
        batches = (plan.epochs or DEFAULT_EPOCHS) * self.feed.batches_per_epoch()
        return max(1, math.ceil(batches / self.batches - 1e-9))

    def _steps_in(self, seconds: float) -> int:
        """Steps that fit into a time, from a few trial steps that are taken back afterwards.

        Where batches come again, what the objective remembers makes later steps faster.
        """
        held = self.state.snapshot()
        first: list[float] = []
        later: list[float] = []
        while len(first) < 3 or self.processes.agree(
            len(first) < 12 and sum(first) < 0.02 * seconds
        ):  # each has a clock of its own
            base = len(first) * self.batches
            ahead = self.feed.look_ahead(base + self.batches)[base:]
            first.append(self._trial(ahead, base))
            if self.feed.period is not None:
                later.append(self._trial(ahead, base))
        self.state.restore(held)
        began = time.perf_counter()
        if self.job.score is not None:
            self._evaluate()
        judging = self._judged_within(_JUDGING * seconds, time.perf_counter() - began)
        left = seconds - (time.perf_counter() - self.started) - judging
        fresh = math.ceil((self.feed.period or 0) / self.batches)
        steps, each = steps_within(left, first, later, fresh)
        steps = int(self.processes.agree(steps))
        self.notes.append(
            f"{self.job.plan.minutes:g} minutes were taken as {steps} steps of {each:.3g} s"
        )
        return steps

    def _judged_within(self, seconds: float, each: float) -> float:
        """Seconds of all evaluations, fewer than planned where they would take too long."""
        planned = self.plan.evaluations
        fit = min(planned, max(1, int(seconds / max(each, 1e-9))))
        fit = int(self.processes.agree(fit))
        if fit < planned:
            self.plan = self.plan.model_copy(update={"evaluations": fit})
            self.notes.append(f"judged {fit} times, not {planned}: once takes {each:.3g} s")
        return fit * each

    def _trial(self, batches: Sequence[Any], base: int) -> float:
        """Seconds of one step that moves next to nothing."""
        began = time.perf_counter()
        self._step(batches, base, _NO_RATE)
        return time.perf_counter() - began

    # steps --------------------------------------------------------------------------------

    def _go(self) -> None:
        steps = self.plan.steps or 1
        marks = {round(i * steps / self.plan.evaluations) for i in range(1, self.plan.evaluations)}
        marks.add(steps)
        with self.job.progress.task("training", steps) as bar:
            bar.advance(self.state.step, "")
            began, first = time.perf_counter(), self.state.step
            while self.state.step < steps and not self.state.ended:
                batches = [self.feed.take() for _ in range(self.batches)]
                base = self.state.step * self.batches
                loss, stop = self._step(batches, base, self.plan.rate(self.state.step))
                if not math.isfinite(loss):
                    self._diverged(f"the loss became {loss}", self.state.step + 1)
                    return
                self.recent.append(loss)
                self._moved()
                if self.state.step in marks:
                    self._judge()
                each = (time.perf_counter() - began) / (self.state.step - first)
                self._show(bar, loss, each * (steps - self.state.step))
                self._keep(stop)

    def _moved(self) -> None:
        """A step is done; the attendant may make the program smaller before anything else."""
        changes = self.state.attendant.cut(self.state.step + 1)
        self.state.follow(changes)
        self.state.moved()
        if changes:
            self.state.restart()
            self.forward = self._forward()

    def _step(self, batches: Sequence[Any], base: int, rate: float) -> tuple[float, bool]:
        """One move of the optimizer: (mean loss, whether somebody asked to stop)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        merged = MergedStatistics() if len(batches) > 1 else None
        sums = torch.zeros(3, dtype=torch.float64)  # loss, samples, asked to stop
        for index, batch in enumerate(batches):
            if index % self.processes.count != self.processes.rank:
                continue
            if merged is not None:
                merged.start()
            seed_all(mixed(self.job.seed, base + index, 2), self.job.device)
            with merged or self.lone, autocast(self.job.device, self.plan.precision):
                loss = self.job.objective(self.forward, batch, base + index)
            weight = loss.samples if merged is not None else 1
            (loss.value * weight).backward()
            value = float(loss.value.detach())
            sums += torch.tensor([value * weight, weight, 0], dtype=torch.float64)
        sums[2] = self.interrupt.asked
        self._merge(sums, merged)
        mean = float(sums[0] / sums[1])
        if math.isfinite(mean):
            self.state.attendant.before(self.state.step + 1)
            clip(self.parameters, self.plan.clip)
            self.optimizer.step()
            self.state.attendant.after(self.state.step + 1, self.optimizer)
        return mean, bool(sums[2])

    def _merge(self, sums: Tensor, merged: MergedStatistics | None) -> None:
        """Sum over processes, and make sums over samples into means."""
        if merged is None:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        self.processes.sum_([sums, *grads])
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad.div_(float(sums[1]))
        merged.finish(self.processes)

    # judging and keeping ------------------------------------------------------------------

    def _evaluate(self) -> float:
        assert self.job.score is not None
        with self.state.averaged():
            if self.job.watch is not None:
                self.seen = self.job.watch(self.job.program, self.plan.precision)
            return self.job.score(self.job.program, self.plan.precision)

    def _judge(self) -> None:
        if not self.state.finite():  # a finite loss can have a gradient that is not
            self._diverged("weights became infinite or NaN", self.state.step)
            return
        score = self._evaluate() if self.job.score else None
        loss = sum(self.recent) / max(1, len(self.recent))
        self.recent.clear()
        self._judged(loss, score)
        if self.plan.patience is not None and self.state.worse >= self.plan.patience:
            self.state.ended = True
            self.notes.append(
                f"stopped at step {self.state.step} of {self.plan.steps}: "
                f"{self.state.worse} evaluations without a better one"
            )

    def _judged(self, loss: float | None, score: float | None) -> None:
        self.state.evaluations.append((self.state.step, loss, score))
        if self.job.watch is not None and score is not None:
            self.state.watched.append(self.seen)
        if self.state.attendant.judged(self.state.step):
            self.state.judge(score)

    def _diverged(self, what: str, step: int) -> None:
        self.state.ended = True
        told = f"{what} at step {step} of {self.plan.steps}"
        best = self.state.best_step
        if best == self.job.start or not self.state.attendant.judged(best):
            raise TrainingError(
                f"{told}, before any state worth keeping",
                where="training",
                hint=f"take a lower lr than {self.plan.lr:g}, a longer warmup, or check the data",
            )
        self.notes.append(f"{told}; the state of step {best} was kept")

    def _show(self, bar: Bar, loss: float, left: float) -> None:
        best = "" if (score := self.state.best_score) is None else f", best {score:.4g}"
        bar.advance(1, f"loss {loss:.4f}{best}, {clock(left)} left")

    def _keep(self, stop: bool) -> None:
        if stop:
            self._save(final=True)
            raise KeyboardInterrupt
        if time.perf_counter() - self.saved >= self.plan.save_every:
            self._save()

    def _save(self, final: bool = False) -> None:
        self.saved = time.perf_counter()
        folder = self.job.folder
        if folder is None:
            return
        about = {
            "plan": self.plan.model_dump(mode="json"),
            "seconds": self.state.seconds + time.perf_counter() - self.started,
            "recent": self.recent,
            "notes": self.notes,
        }
        try:
            if self.processes.first:
                self.state.checkpoint(self.identity, about).save(folder)
        except OSError as error:  # training is worth more than its safety copy
            note = f"the state could not be kept in {folder.name}: {error}"
            self.notes += [note] if note not in self.notes else []
        if final:
            self.processes.wait()

    def _resume(self) -> bool:
        if self.job.folder is None:
            return False
        found = checkpoint.read(self.job.folder, self.identity)
        step = -1 if found is None else found.state["step"]
        if step != self.processes.agree(step):
            raise StorageError(
                f"process {self.processes.rank} does not see the state that the first one sees",
                where=str(self.job.folder),
                hint="all processes need the same folder",
            )
        if found is None:
            return False
        self.plan = Plan.model_validate(found.state["plan"])
        self._attend()
        along = found.part("attendant")
        self.state.follow(self.state.attendant.reshape(along))
        self.forward = self._forward()
        about = self.state.restore(found)
        self.state.attendant.restore(along)
        self.recent = list(about["recent"])
        self.notes = list(about["notes"])
        self.state.seconds = about["seconds"]
        self.job.progress.say(f"training goes on at step {self.state.step} of {self.plan.steps}")
        return True

    def _finish(self) -> Trained:
        self.state.take_best()
        if self.state.best_step == self.job.start:
            self.notes.append("no state was better than the one training began with, which is kept")
        return Trained(
            plan=self.plan,
            best_step=self.state.best_step,
            score=self.state.best_score,
            evaluations=self.state.evaluations,
            seconds=self.state.seconds + time.perf_counter() - self.started,
            notes=self.notes,
            watched=self.state.watched,
        )
