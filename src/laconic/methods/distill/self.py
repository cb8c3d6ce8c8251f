"""Self-distillation: a network teaches its own shallower parts, and its past teaches it.

Idea: heads are put on inner nodes while it trains. They learn the labels, what the deepest output
says, and the deepest features; so shallow layers are told directly what to prepare ("Be your own
teacher", Zhang et al., ICCV 2019, arXiv 1905.08094). And the network learns from a running mean of
its own earlier states, which is steadier and better than any one of them ("Mean teachers",
Tarvainen & Valpola, arXiv 1703.01780), the more the further training has come, as in progressive
self-distillation (Kim et al., ICCV 2021, arXiv 2006.12000). The running mean was taken over
snapshots (Yang et al., arXiv 1812.00123) and born-again generations (Furlanello et al., arXiv
1805.04770): it is never older than it has to be, and costs no further training. Heads and mean are
thrown away afterwards; the network has its own graph again.

Helps: training a network from scratch, or on, with labels and without a better teacher. Does not:
where there is a better one, `distill.logits` gives more; without labels it is refused. For exits
that stay, see `dynamic.early_exit`.

Cost: a step has the heads' share more, and one run of the mean without gradients; together about
half of a plain step.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from laconic.core.errors import DataError
from laconic.core.task import Task, to_device
from laconic.methods.base import Context, Method, Outcome
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.teaching.auxiliary_heads import Heads, heads_on
from laconic.solvers.teaching.beside import beside
from laconic.solvers.teaching.earlier import Earlier
from laconic.solvers.teaching.held_out import figures_of, score_of
from laconic.solvers.teaching.learning import Course, only, trainable
from laconic.statistics.batches import check_inputs, count, flat_inputs, padding_mask
from laconic.training import losses
from laconic.training.attendant import Attendant
from laconic.training.checkpoint import identity_of
from laconic.training.distillation import kind_for, soft
from laconic.training.feed import mixed
from laconic.training.job import Forward, Job, Loss, Trained
from laconic.training.loop import train
from laconic.training.plan import Plan
from laconic.training.precision import in_float32, laid_out, wants_channels_last
from laconic.training.processes import Processes
from laconic.training.taps import tapped


class SelfTaught(Plan, Method):
    """Train a network on labels with its deepest output and its past as teachers; see `Plan`.

    Attributes:
        exits: how many heads, evenly spaced over the ends of residual blocks, or over activations
            where there are none; 0 takes none.
        nodes: names of the nodes they are put on, in place of spacing them.
        temperature: of softened outputs.
        alpha: share of the deepest output in what a head learns; the rest is labels.
        hints: weight of the distance of a head's features to the deepest ones.
        past: share of the running mean in what the network itself learns, at the end of training;
            it rises evenly from 0.
        decay: of the running mean, a step.
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {"steps": 3, "evaluations": 1, "precision": "fp32"}

    exits: int = Field(default=2, ge=0)
    nodes: tuple[str, ...] | None = None
    temperature: float = Field(default=3.0, gt=0)
    alpha: float = Field(default=0.3, ge=0, le=1)
    hints: float = Field(default=0.1, ge=0)
    past: float = Field(default=0.5, ge=0, le=1)
    decay: float = Field(default=0.99, ge=0, lt=1)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Train a copy; the input stays as it was.

        Raises:
            DataError: no training data, no labels, or data that do not fit.
            RecipeError: `nodes` that do not exist or cannot be pooled.
            TrainingError: the loss diverged at once.
        """
        student = (thaw(program) if is_frozen(program) else program.clone()).train()
        names = trainable(student, sites)
        if not names:
            return Outcome(program=program.clone(), notes=["there is no float parameter to train"])
        trained, heads = self._train(program, student, names, Course.of(context))
        decided = trained.plan.model_dump(mode="json", exclude={"save_every"})
        options = self.model_dump(mode="json", exclude_defaults=True)
        return Outcome(
            program=freeze(student) if is_frozen(program) else student,
            resolved={**options, **decided, "nodes": list(heads.nodes)},
            notes=[*heads.notes, *trained.notes],
            figures={**figures_of(trained, context.task, "score"), "heads": list(heads.nodes)},
        )

    def _train(
        self, program: Program, student: Program, names: list[str], course: Course
    ) -> tuple[Trained, Heads]:
        """Train `student` in place, with heads beside it while that lasts."""
        settings = Plan.model_validate({key: getattr(self, key) for key in Plan.model_fields})
        plan = settings.settled(student, course.device, Processes.current().count)
        told = [self.model_dump(mode="json"), names, course.seed]
        flat: Any = student.output_node.args[0]
        with ExitStack() as stack:
            past: Earlier | None = None
            if self.past:
                past = Earlier(student, self.decay, course.device, plan.precision)
            generator = torch.Generator().manual_seed(mixed(course.seed, 5))
            made = stack.enter_context(beside(student, generator))
            heads = heads_on(student, made, course.task, self.exits, self.nodes)
            objective = _Own(self, course.task, student, len(flat), course.device, heads, past)
            stack.enter_context(only(student, [*names, *made.names]))
            stack.enter_context(tapped(student, heads.taps))
            job = Job(
                program=student,
                names=[*names, *made.names],
                objective=objective,
                loader=course.loader,
                plan=plan,
                score=score_of(course.task, objective, course.device),
                seed=course.seed,
                device=course.device,
                progress=course.progress,
                folder=course.folder,
                identity=identity_of(told, [program]) if course.folder else "",
                attendant=past or Attendant(),
            )
            return train(job), heads


@dataclass(frozen=True)
class _Own:
    """The objective: labels, heads, and the past."""

    options: SelfTaught
    task: Task
    student: Program
    outputs: int
    device: torch.device
    heads: Heads
    earlier: Earlier | None

    def __call__(self, forward: Forward, batch: Any, number: int) -> Loss:
        """The loss of batch `number`.

        Raises:
            DataError: inputs that do not fit or are not finite; no labels.
        """
        where = f"training batch {number}" if number >= 0 else f"validation batch {-1 - number}"
        inputs, targets = self.task.split(batch)
        if targets is None:
            raise DataError(
                "the batch has no targets",
                where=where,
                hint="self-distillation needs labels; distill.logits learns from unlabelled data",
            )
        flat = flat_inputs(self.student, inputs, where)
        check_inputs(self.student, flat, where)
        samples = count(self.student, flat)
        flat = laid_out(flat, self.device, wants_channels_last(self.student))
        targets, mask = to_device(targets, self.device), padding_mask(self.student, flat)
        given = in_float32(forward(*flat))
        leaves, inner = given[: self.outputs], given[self.outputs :]
        value = self._whole(leaves, flat, targets, mask, number)
        if self.heads.nodes:
            value = value + self._exits(leaves, inner, targets, mask)
        return Loss(value, samples)

    def _logits(self, leaves: Sequence[Tensor]) -> Tensor:
        return self.task.logits(self.student.signature.arrange(leaves))

    def _whole(
        self,
        leaves: Sequence[Tensor],
        flat: Sequence[Tensor],
        targets: Any,
        mask: Tensor | None,
        number: int,
    ) -> Tensor:
        """What the network's own output learns."""
        value = self.task.loss(self.student.signature.arrange(leaves), targets)
        if self.earlier is None or number < 0:
            return value
        # while steps are only timed, the length is not known, and the past costs what it costs
        share = self.options.past * min(1.0, number / max(1, self.earlier.batches))
        past = self._logits(self.earlier(flat))
        apart = self._soft(self._logits(leaves), past, mask)
        return (1 - share) * value + share * apart

    def _exits(
        self, leaves: Sequence[Tensor], inner: Sequence[Tensor], targets: Any, mask: Tensor | None
    ) -> Tensor:
        """What the heads learn, the mean over them."""
        options, number = self.options, len(self.heads.nodes)
        logits, points, deepest = inner[:number], inner[number:-1], inner[-1].detach()
        wanted = self._logits(leaves)
        place = next((i for i, leaf in enumerate(leaves) if leaf is wanted), None)
        alpha = options.alpha if place is not None else 1.0
        total = torch.zeros((), device=self.device)
        for said, features in zip(logits, points, strict=True):
            total = total + alpha * self._soft(said, wanted.detach(), mask)
            if place is not None and alpha < 1:
                own = [*leaves[:place], said, *leaves[place + 1 :]]
                arranged = self.student.signature.arrange(own)
                total = total + (1 - alpha) * self.task.loss(arranged, targets)
            if options.hints:
                total = total + options.hints * losses.relative_error(features, deepest, mask)
        return total / number

    def _soft(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        kind = kind_for(self.task, student)
        return soft(kind, student, teacher, self.options.temperature, mask)
