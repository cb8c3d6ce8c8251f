"""Feature extraction: keep the first part of a trained network and learn a new head on it.

Idea: what a task needs is often known long before the end of a network. A linear probe is fitted at
every node, from one pass over the training data; the cheapest node whose probe is within a
tolerance of the best one is where the network is cut. Everything behind it is removed, and a linear
head (the probe itself is its start) or a small network is trained on the pooled features, alone
(`adapt: false`, the rest frozen) or with what is before it. The task may be another one: `classes`
gives the head so many outputs.

Papers: Alain & Bengio, "Understanding intermediate layers using linear classifier probes" (arXiv
1610.01644); Donahue et al., "DeCAF" (arXiv 1310.1531); Kornblith, Shlens & Le, "Do better ImageNet
models transfer better?" (arXiv 1805.08974) for linear heads against fine-tuning.

Helps: tasks that are easier than the one the network was trained for, few labels (only a head is
learned), and finding out where a network has done its work. Does not: the same hard task, where
every layer adds accuracy, without `adapt` or a step of `distill.*` behind it.
Cost: one forward pass over `samples` training samples with second moments of the pooled features,
one over validation data, then training of the head: forward passes of what is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from laconic.core.errors import RecipeError
from laconic.core.task import Task, to_device
from laconic.methods.base import Context, Method, Outcome
from laconic.program.cost import cost
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.teaching import heads, probes
from laconic.solvers.teaching.heads import Head, Supervised
from laconic.solvers.teaching.learning import trainable
from laconic.solvers.teaching.probes import Answer, Probe, Spot
from laconic.statistics.batches import count, flat_inputs
from laconic.training.checkpoint import identity_of
from laconic.training.evaluation import labelled, mean_score
from laconic.training.job import Job, Trained
from laconic.training.loop import train
from laconic.training.plan import Plan
from laconic.training.processes import Processes


class TransferFeatures(Plan, Method):
    """Options of `transfer.features`; see `Plan` for how it trains. Sites are names of nodes.

    Attributes:
        node: where to cut; None finds it by a probe of every node.
        tolerance: how much worse than the best probe the one taken may score, in the metric's unit
            (points of accuracy).
        macs: the largest share of the multiply-adds that the part kept may have; None sets none.
        classes: outputs of the new head for another task; None keeps the shape of the output.
        hidden: width of a hidden layer in the head; None is a linear head.
        adapt: train what is before the cut too.
        fit: train by gradient; without, the linear head is the probe's closed form.
        samples: training samples that the probes are fitted on, at most.
        most: how many nodes are probed, at most, evenly spread.
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {
        "steps": 4, "evaluations": 1, "precision": "fp32", "tolerance": 0.05,
    }  # fmt: skip

    node: str | None = None
    tolerance: float = Field(default=1.0, ge=0)
    macs: float | None = Field(default=None, gt=0, le=1)
    classes: int | None = Field(default=None, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    adapt: bool = False
    fit: bool = True
    samples: int = Field(default=4096, ge=1)
    most: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.fit and (self.hidden is not None or self.adapt):
            raise ValueError("hidden and adapt need training: leave fit at true")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Probe, cut, and learn a head; the input stays as it was.

        Raises:
            RecipeError: no such node, one that cannot be pooled, or outputs that are not one answer
                a sample.
            DataError: no training data, no labels, or data that do not fit.
            TrainingError: the loss diverged.
        """
        return _Extraction(self, program, sites, context).run()


@dataclass
class _Extraction:
    """One application."""

    method: TransferFeatures
    program: Program
    sites: Sites
    context: Context

    def run(self) -> Outcome:
        method, program = self.method, self.program
        dense = (thaw(program) if is_frozen(program) else program.clone()).eval()
        dense.propagate()
        _one_answer(dense)
        answer = Answer(self.context.task, dense, heads.answers(dense, method.classes))
        found = self._probes(dense, answer)
        task = self.context.task
        points = method.tolerance / task.scale
        taken = probes.cheapest(found, points, method.macs, task.higher_is_better)
        body = heads.cut_at(dense, taken.spot)
        student, head = heads.crowned(body, self._weights(taken), answer.shape)
        notes: list[str] = []
        if not labelled(task):
            notes.append("no labelled validation data: probes were scored on training data")
        figures = _table(found, taken.spot, task)
        figures["macs"] = [cost(dense).macs, cost(student).macs]
        resolved = method.model_dump(mode="json", exclude_defaults=True)
        resolved["node"] = taken.spot.node
        if method.hidden is None:
            figures["scale"] = heads.scaled(student, head, self._loss(student, head, body))
        if method.fit:
            trained = self._train(student, head, body)
            resolved |= trained.plan.model_dump(mode="json", exclude={"save_every"})
            notes += trained.notes
            figures |= _trained(trained, task)
        made = freeze(student) if is_frozen(program) else student.eval()
        return Outcome(program=made, resolved=resolved, notes=notes, figures=figures)

    def _probes(self, dense: Program, answer: Answer) -> list[Probe]:
        method, context = self.method, self.context
        if method.node is not None:
            places = [probes.spot_at(dense, method.node)]
        else:
            places = probes.spots(dense)
            chosen = self.sites.choose([spot.node for spot in places])
            places = _spread([spot for spot in places if spot.node in chosen], method.most)
        if not places:
            raise RecipeError(
                "no node of this program can be pooled to one row a sample", where="node"
            )
        there = dense.clone().to(context.device)
        return probes.probe(
            there, places, answer, samples=method.samples, seed=context.seed,
            device=context.device, progress=context.progress,
        )  # fmt: skip

    def _weights(self, taken: Probe) -> Sequence[tuple[Tensor, Tensor]]:
        """What the head begins with."""
        like = next((t for _, t in self.program.tensors() if t.is_floating_point()), None)
        like = torch.zeros(0) if like is None else like.detach()
        if self.method.hidden is None:
            return heads.closed(taken.fit, like)
        size = taken.fit.bias.numel()
        return heads.drawn(
            taken.spot.width, self.method.hidden, size, like, self.context.generator()
        )

    def _loss(self, student: Program, head: Head, body: Program) -> Callable[[], float]:
        """The task's mean loss over validation data, else training data, as the head is now."""
        context, task = self.context, self.context.task
        there = body.clone().to(context.device)
        home = student.tensor(head.layers[0][0]).device
        held: list[tuple[Tensor, Any, int]] = []
        split = "validation" if labelled(task) else "train"
        for number, batch in enumerate(task.batches(split)):
            inputs, targets = task.split(batch)
            flat = flat_inputs(body, inputs, f"{split} batch {number}")
            with torch.no_grad():
                (features,) = there.run_flat(*(tensor.to(context.device) for tensor in flat))
            held.append((features.to(home), to_device(targets, home), count(body, flat)))
            if sum(size for _, _, size in held) >= self.method.samples:
                break

        def loss() -> float:
            given = ((student.signature.arrange([head(student, x)]), y, n) for x, y, n in held)
            return sum(float(task.loss(outputs, targets)) * n for outputs, targets, n in given)

        return loss

    def _train(self, student: Program, head: Head, body: Program) -> Trained:
        method, context = self.method, self.context
        frozen = None if method.adapt else body.clone().to(context.device)
        names = [name for pair in head.layers for name in pair]
        if method.adapt:
            names = trainable(student, Sites())
        plan = Plan.model_validate({key: getattr(method, key) for key in Plan.model_fields})
        plan = plan.settled(student, context.device, Processes.current().count)
        told = [method.model_dump(mode="json"), names, context.seed]
        return train(
            Job(
                program=student.train(),
                names=names,
                objective=Supervised(context.task, student, context.device, head, frozen),
                loader=context.task.batches("train"),
                plan=plan,
                score=_score(context.task, context.device),
                seed=context.seed,
                device=context.device,
                progress=context.progress,
                folder=context.workdir,
                identity=identity_of(told, [self.program]) if context.workdir else "",
            )
        )


def _one_answer(program: Program) -> None:
    """Refuse programs that do not give one tensor with one answer for each sample.

    Raises:
        RecipeError: says what it gives.
    """
    outputs = program.output_node.all_input_nodes
    shapes = [list(node.meta["shape"]) for node in outputs]
    free = {dim for dims in program.dynamic.values() for dim in dims.values()} - {"batch"}
    whole = len(shapes) == 1 and len(shapes[0]) > 1 and shapes[0][0] == program.batch_size()
    if not whole or (len(shapes[0]) > 2 and free):
        raise RecipeError(
            f"gives outputs of {shapes}; a head gives one answer for each sample",
            where="program",
            hint="make it smaller with transfer.weights instead",
        )


def _spread(places: list[Spot], most: int) -> list[Spot]:
    """At most so many, evenly spread, the last one among them."""
    number = min(most, len(places))
    return [places[(index + 1) * len(places) // number - 1] for index in range(number)]


def _score(task: Task, device: torch.device) -> Callable[[Program, str], float] | None:
    """The validation metric, higher is better."""
    validation = task.validation
    if validation is None or not labelled(task):
        return None
    sign = 1.0 if task.higher_is_better else -1.0

    def score(program: Program, precision: str) -> float:
        shared = Processes.current()
        return sign * mean_score(program, task, validation, device, precision, shared)

    return score


def _table(found: Sequence[Probe], taken: Spot, task: Task) -> dict[str, Any]:
    rows = [
        {"node": one.spot.node, "origin": one.spot.origin, "features": one.spot.width,
         "macs": one.spot.macs, "score": task.scale * one.score, "ridge": one.fit.ridge}
        for one in found
    ]  # fmt: skip
    return {"probes": rows, "cut": taken.node}


def _trained(trained: Trained, task: Task) -> dict[str, Any]:
    sign = task.scale if task.higher_is_better else -task.scale
    score = None if trained.score is None else sign * trained.score
    return {"score": score, "steps": trained.plan.steps, "best_step": trained.best_step,
            "seconds": trained.seconds}  # fmt: skip
