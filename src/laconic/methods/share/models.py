"""Several models in one file: what they share is stored once, each adds a small difference.

Idea: fine-tunes of one base, or the members of an ensemble, lie close together. Each shared weight
becomes a common part on a fine grid, plus for every model a difference on a coarse grid whose codes
are mostly zero, which the entropy coder of the file makes small. The common part costs the same
wherever it lies: it stands where the differences get cheap. Biases, norms and heads of
other widths stay each model's own, rows below each other. One graph computes one model at a time;
which one is an argument in the graph: `laconic.members(program)` gives every model back, by name,
as a Program of its own. With a length of training (`steps`, `epochs` or `minutes`) the shared space
and the differences are trained end to end, each model towards its own separate self; where a model
has no difference it gets none, so that the file stays about as large as it was.

Papers: coded differences of fine-tunes as in BitDelta (Liu et al. 2024, arXiv 2402.10193) and Delta
Zip (Yao & Klimovic 2023, arXiv 2312.05215); quantised training with straight-through gradients,
Jacob et al. 2017 (arXiv 1712.05877); distillation, Hinton et al. 2015 (arXiv 1503.02531).

Helps: files of related models; the closer they lie, the more. `size` finds the coarsest grid that
is needed for a file of so many times one model's. Does not: nothing gets faster. Runtimes get the
dense tensors of one model at a time: the gain is in bytes. Models that were trained on their own
from different starts share nothing but their shapes. Prune and fold before, all models alike; what
is stored together cannot lose channels.

Cost: seconds; with `size` ten times the coding of the file. Training: for each batch a step and
a run of every model that the batch belongs to.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import torch
from pydantic import Field, field_validator
from torch import Tensor, fx, nn

from laconic import storage
from laconic.core.errors import DataError, RecipeError
from laconic.core.task import Loader, Task
from laconic.methods.base import Context, Method, Outcome
from laconic.program import members
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.solvers.sharing import together
from laconic.solvers.sharing.resting import Resting
from laconic.solvers.sharing.together import Together
from laconic.solvers.weights.curvature import Weighted
from laconic.training.checkpoint import identity_of
from laconic.training.distillation import Distillation, kind_for
from laconic.training.job import Forward, Job, Loss, Trained
from laconic.training.loop import train
from laconic.training.plan import Plan
from laconic.training.processes import Processes
from laconic.training.teacher import Original

_ROUNDS = 8
_FINEST, _COARSEST = 1e-3, 2.0
_GROWTH = 0.01  # what training may add to a file, in parts of it: differences that are there move
_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)
_LENGTHS = ("steps", "epochs", "minutes")


class Models(Weighted, Plan, Method):
    """Store several models of one graph together. Sites are the weights that they share.

    See `Plan` for the fields of training; without a length there is none. See `Weighted` for what
    errors count: where they count more, steps are finer. A training or calibration batch is for
    every model; one that is a mapping from models' names to batches has one for each.

    Attributes:
        others: name → `.laconic` file of the models to store with this one; or a list of files,
            named after them.
        called: name of this model.
        bits: of what is shared: its grid for each output channel, 2 to 8.
        error: relative error that the differences may leave in the largest weight, and in a smaller
            one less, by the root of its size. The larger, the smaller the file.
        size: largest file, in parts of the file of this model alone on the same grid: the least
            `error` that keeps it is found. Training is left a little room.
        temperature: of the softened outputs that training compares, and of `weighted: fisher`.
        hashes: resolved: name → SHA-256 of the file that was read.
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {}

    others: dict[str, str] | list[str] = Field(default_factory=dict[str, str])
    called: str = "first"
    bits: int = Field(default=8, ge=2, le=8)
    error: float = Field(default=0.05, gt=0)
    size: float | None = Field(default=None, gt=0)
    temperature: float = Field(default=4.0, gt=0)
    hashes: dict[str, str] | None = None

    @field_validator("others")
    @classmethod
    def _named(cls, value: dict[str, str] | list[str]) -> dict[str, str]:
        if isinstance(value, dict):
            return value
        named = {Path(path).stem: path for path in value}
        if len(named) < len(value):
            raise ValueError("two files of one name: give a mapping from names to files")
        return named

    def files(self) -> Sequence[str]:
        """The models that are stored with this one."""
        return tuple(self.others.values() if isinstance(self.others, dict) else self.others)

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Store the models together; the input stays as it was.

        Raises:
            RecipeError: sites that match nothing; models that do not fit on each other; files that
                changed since `hashes` were taken; a `size` below what is possible.
            StorageError: a file of `others` that cannot be read.
            DataError: weights that are not finite, or training data that do not fit.
        """
        found = [site.name for site in weight_sites(program)[0]]
        names = sites.choose(found)
        if not self.others:
            note = "nothing to share with: others names no files"
            return Outcome(program=program.clone(), resolved=self._plain(), notes=[note])
        models, hashes = self._read(program)
        together.check_alike(models)
        alone = _bytes(together.gridded(program, names, self.bits))
        counts = self._counts(models, names, context)
        made, error = self._joined(models, names, alone, counts)
        work = _Work(made, {"error": error, "hashes": hashes}, alone)
        trained = self._train(work, models, context)
        return self._outcome(work, models, trained)

    def _plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_defaults=True)

    def _trains(self) -> bool:
        return any(getattr(self, length) is not None for length in _LENGTHS)

    def _read(self, program: Program) -> tuple[dict[str, Program], dict[str, str]]:
        """All models by name, this one first, and what the files hashed to."""
        assert isinstance(self.others, dict)
        models, hashes = {self.called: program}, dict[str, str]()
        for name in (self.called, *self.others):
            if not name or not name.isprintable() or set(name) & set(",\"'\\"):
                raise RecipeError(f"{name!r} cannot be a model's name", where="share.models",
                                  hint="take letters, digits, '-', '_' and '.'")  # fmt: skip
        for name, path in self.others.items():
            if name in models:
                raise RecipeError(
                    f"two models are named {name!r}", where="share.models others",
                    hint="let this model be `called` something else",
                )  # fmt: skip
            models[name] = storage.load(path)
            hashes[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            if self.hashes is not None and self.hashes.get(name) != hashes[name]:
                raise RecipeError(
                    f"{path} is not the file that the step was resolved with",
                    where=f"share.models others {name}",
                    hint="leave 'hashes' out to take the file as it is now",
                )
        return models, hashes

    def _counts(
        self, models: Mapping[str, Program], names: Sequence[str], context: Context
    ) -> dict[str, Tensor]:
        """What errors of each weight count, all models together."""
        total: dict[str, Tensor] = {}
        if self.weighted == "none":
            return total
        loader = context.task.batches("calibration", "train")
        for model, program in models.items():
            task = replace(context.task, calibration=_Own(loader, model, frozenset(models)))
            found = self.counted(program, names, replace(context, task=task))
            for name, tensor in found.items():
                total[name] = total[name] + tensor if name in total else tensor
        return {name: tensor.cpu() for name, tensor in total.items()}

    def _joined(
        self,
        models: Mapping[str, Program],
        names: Sequence[str],
        alone: int,
        counts: Mapping[str, Tensor],
    ) -> tuple[Together, float]:
        """The models together, within the size that was asked for, and the error that led there.

        Raises:
            RecipeError: a size below what is possible; says how low it can go.
        """
        if self.size is None or self.hashes is not None:
            return together.join(models, names, self.bits, self.error, counts), self.error
        low, high = _FINEST, _COARSEST
        goal = self.size * alone * (1 - _GROWTH if self._trains() else 1)
        best = together.join(models, names, self.bits, high, counts)
        least = _bytes(best.program)
        if least > goal:
            raise RecipeError(
                f"size {self.size:g} is below what is possible: {least / alone:.3f} of one model "
                f"({least} of {alone} bytes) is taken even without differences",
                where="share.models",
                hint="fold or quantise what each model keeps of its own, or raise size",
            )
        for _ in range(_ROUNDS):
            middle = (low * high) ** 0.5
            tried = together.join(models, names, self.bits, middle, counts)
            if _bytes(tried.program) <= goal:
                best, high = tried, middle
            else:
                low = middle
        return best, high

    # training -------------------------------------------------------------------------------

    def _train(
        self, work: "_Work", models: Mapping[str, Program], context: Context
    ) -> Trained | None:
        """Train the shared space and the differences towards the separate models."""
        if not self._trains() or not members.names(work.made.program):
            return None
        student = work.made.program.train()
        plan = Plan.model_validate({key: getattr(self, key) for key in Plan.model_fields})
        plan = plan.settled(student, context.device, Processes.current().count)
        lesson = _Lesson(student, models, context, plan, self.temperature)
        floats = [
            name for name, tensor in student.tensors()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        ]  # fmt: skip
        told = [self._plain(), work.resolved, context.seed]
        trained = train(
            Job(
                program=student,
                names=floats,
                objective=lesson,
                loader=context.task.batches("train", "calibration"),
                plan=plan,
                seed=context.seed,
                device=context.device,
                progress=context.progress,
                folder=context.workdir,
                identity=identity_of(told, models.values()),
                attendant=Resting(work.made.steps),
            )
        )
        work.resolved |= trained.plan.model_dump(mode="json", exclude={"save_every"})
        work.made.notes += trained.notes
        return trained

    def _outcome(
        self, work: "_Work", models: Mapping[str, Program], trained: Trained | None
    ) -> Outcome:
        program = work.made.program
        after = _bytes(program)
        figures: dict[str, Any] = {
            "members": list(models),
            "bytes": {"together": after, "one": work.alone,
                      "separate": {n: _bytes(model) for n, model in models.items()}},
            "ratio": after / work.alone,
            "errors": work.made.errors,
        }  # fmt: skip
        if trained is not None:
            figures["training"] = {"steps": trained.plan.steps, "seconds": trained.seconds}
        each = "laconic.members gives each"
        if not members.names(program):
            each = "they are the same up to `error`, so it is one that stands for all"
        notes = [
            *work.made.notes,
            f"{len(models)} models take {after} bytes, {after / work.alone:.3f} times "
            f"{self.called!r} alone on a grid of {self.bits} bits; {each}",
            "runtimes get the dense tensors of one model at a time: the gain is in bytes",
        ]
        if self.size is not None and after > self.size * work.alone:
            notes.append(f"training took the file beyond size {self.size:g}: ask for less")
        resolved = {**self._plain(), **work.resolved}
        return Outcome(program=program, resolved=resolved, notes=notes, figures=figures)


@dataclass
class _Work:
    """What is known while the method runs; `alone`: bytes of one model on the same grid."""

    made: Together
    resolved: dict[str, Any] = field(default_factory=dict[str, Any])
    alone: int = 0


@dataclass(frozen=True)
class _Own:
    """The batches of one model out of a loader's; batches without names are everybody's."""

    loader: Loader
    name: str
    models: frozenset[str]

    def __iter__(self) -> Iterator[Any]:
        first: Any = getattr(self.loader, "set_epoch", None)
        if first is not None:
            first(0)  # the same samples each time
        for batch in self.loader:
            if not _by_model(batch, self.models):
                yield batch
            elif self.name in batch:
                yield batch[self.name]


class _Lesson:
    """The objective: every model of the joint Program gives what its separate self gives."""

    def __init__(
        self,
        student: Program,
        models: Mapping[str, Program],
        context: Context,
        plan: Plan,
        temperature: float,
    ) -> None:
        self._student, self._models, self._context = student, models, context
        self._plan, self._temperature = plan, temperature
        self._parts: dict[str, tuple[Program, Distillation]] = {}

    def __call__(self, forward: Forward, batch: Any, number: int) -> Loss:
        """The loss of one batch: the mean over the models that it belongs to."""
        del forward
        if not self._parts:  # here, because the loop has moved the tensors by now
            self._parts = {name: self._part(name) for name in self._models}
        own = _by_model(batch, self._models)
        some = own and len(batch) < len(self._models)
        if some and self._plan.accumulate != 1 and _normalises(self._student):
            raise DataError(
                f"a batch for {', '.join(batch)} only, and {self._plan.accumulate} batches a step",
                where=f"training batch {number}",
                hint="give every batch all models, or accumulate: 1: normalisations of several "
                "models cannot be merged",
            )
        found = [
            lesson(part.run_flat, batch[name] if own else batch, number)
            for name, (part, lesson) in self._parts.items()
            if not own or name in batch
        ]
        value = torch.stack([loss.value for loss in found]).mean()
        return Loss(value, max(loss.samples for loss in found))

    def _part(self, name: str) -> tuple[Program, Distillation]:
        """One model of the joint Program, over the very same tensors, and what teaches it."""
        part = members.switched(_over(self._student), name)
        part.dropout = self._student.dropout
        part.train()
        task: Task = self._context.task
        device = self._context.device
        teacher = Original(self._models[name], (), device, self._plan.precision)
        outputs: Any = part.output_node.args[0]
        lesson = Distillation(
            task=task, student=part, teacher=teacher, outputs=len(outputs), device=device,
            kind=kind_for(task), temperature=self._temperature,
        )  # fmt: skip
        return part, lesson


def _by_model(batch: Any, models: Collection[str]) -> TypeGuard[Mapping[str, Any]]:
    """Whether a batch maps names of models to batches of their own."""
    return isinstance(batch, Mapping) and bool(batch) and set(batch) <= set(models)


def _normalises(program: Program) -> bool:
    return any(node.target in _NORMS for node in program.graph.nodes)


def _over(program: Program) -> Program:
    """A Program of its own graph over the very tensors of another one."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    return Program(
        graph,
        dict(program.tensors()),
        program.signature,
        program.example,
        dynamic=program.dynamic,
        aliases=program.aliases,
        sparse=program.sparse,
    )


def _bytes(program: Program) -> int:
    """Of the file, exactly."""
    return storage.predict(freeze(program)).total
