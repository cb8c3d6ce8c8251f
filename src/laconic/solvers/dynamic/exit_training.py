"""Exits learn from the deepest output: the network as it was teaches every one of them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.errors import DataError
from laconic.core.task import Task, to_device
from laconic.program.program import Program
from laconic.solvers.dynamic.exits import Heads, up_to
from laconic.solvers.teaching.learning import Course
from laconic.statistics.batches import check_inputs, count, flat_inputs
from laconic.training import losses
from laconic.training.checkpoint import identity_of
from laconic.training.job import Forward, Job, Loss, Trained
from laconic.training.loop import train
from laconic.training.plan import Plan
from laconic.training.precision import in_float32, laid_out, wants_channels_last
from laconic.training.processes import Processes
from laconic.training.taps import tapped
from laconic.training.teacher import Original, Teacher

_RATES = {"sgd": 0.05, "adamw": 1e-3}  # of heads that start from nothing


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """The mean loss of all exits: softened answers of the deepest output, and labels.

    Attributes:
        task: splits batches; its loss takes the labels.
        program: the network; says how its inputs nest.
        teacher: its output, unless `alpha` is 0; then the values at the exits if those are all that
            the heads see.
        device: where this happens.
        inside: whether the student takes the values at the exits; otherwise the network's inputs.
        temperature: that softens.
        alpha: weight of the teacher; the rest goes to labels, where there are any.
    """

    task: Task
    program: Program
    teacher: Teacher
    device: torch.device
    inside: bool
    temperature: float
    alpha: float

    def __call__(self, forward: Forward, batch: Any, number: int) -> Loss:
        """The loss of batch `number`.

        Raises:
            DataError: inputs that do not fit; no labels where nothing else is to be learned.
        """
        where = f"training batch {number}"
        inputs, targets = self.task.split(batch)
        flat = flat_inputs(self.program, inputs, where)
        check_inputs(self.program, flat, where)
        samples = count(self.program, flat)
        flat = laid_out(flat, self.device, wants_channels_last(self.program))
        values = self.teacher(flat, number)
        deepest = values.pop(0) if self.alpha else None
        targets = to_device(targets, self.device)
        if targets is None and deepest is None:
            raise DataError("has no targets", where=where, hint="take an alpha above 0")
        total = torch.zeros((), device=self.device)
        answers = in_float32(forward(*(values if self.inside else flat)))
        for answer in answers:
            if deepest is not None:
                soft = losses.soft_targets(answer, deepest, self.temperature)
                total = total + (soft if targets is None else self.alpha * soft)
            if targets is not None:
                nested = self.program.signature.arrange((answer,))
                total = total + (1 - self.alpha) * self.task.loss(nested, targets)
        return Loss(total / len(answers), samples)


def train_heads(
    plan: Plan,
    program: Program,
    heads: Heads,
    course: Course,
    temperature: float,
    alpha: float,
) -> Trained:
    """Train heads in place; the network in front of them stays as it is and only runs forward.

    With labels alone it runs no further than to the last head, and does not copy what lies behind.
    """
    plan = _settled(plan, heads.program, course, fresh=True)
    if alpha:
        teacher = Original(program, heads.sources, course.device, plan.precision)
    else:
        teacher = Original(up_to(program, heads.sources), (), course.device, plan.precision)
    lessons = Lessons(
        task=course.task, program=program, teacher=teacher, device=course.device, inside=True,
        temperature=temperature, alpha=alpha,
    )  # fmt: skip
    return _train(plan, heads.program, lessons, course, [program, heads.program])


def train_along(
    plan: Plan,
    program: Program,
    student: Program,
    exits: Sequence[str],
    course: Course,
    temperature: float,
    alpha: float,
) -> Trained:
    """Train a network and the exits in it together, in place; `program` is what it was before."""
    plan = _settled(plan, student, course, fresh=False)
    teacher = Original(program, (), course.device, plan.precision) if alpha else _silent
    lessons = Lessons(
        task=course.task, program=program, teacher=teacher, device=course.device, inside=False,
        temperature=temperature, alpha=alpha,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(tapped(student, exits))
        return _train(plan, student, lessons, course, [program])


def _silent(flat: Sequence[Tensor], number: int) -> list[Tensor]:
    """A teacher who is not asked."""
    del flat, number
    return []


def _settled(plan: Plan, program: Program, course: Course, *, fresh: bool) -> Plan:
    settled = plan.settled(program, course.device, Processes.current().count)
    if fresh and plan.lr is None:
        settled = settled.model_copy(update={"lr": _RATES[settled.optimizer]})
    return settled


def _train(
    plan: Plan, student: Program, lessons: Lessons, course: Course, about: Sequence[Program]
) -> Trained:
    names = [
        name
        for name, tensor in student.tensors()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    ]
    told = [plan.model_dump(mode="json"), lessons.temperature, lessons.alpha, names, course.seed]
    return train(
        Job(
            program=student.train(),
            names=names,
            objective=lessons,
            loader=course.loader,
            plan=plan,
            seed=course.seed,
            device=course.device,
            progress=course.progress,
            folder=course.folder,
            identity=identity_of(told, about) if course.folder else "",
        )
    )
