"""Inputs made from a network alone: what its batch normalisation remembers of the data.

Noise is moved by gradient descent until the mean and variance that reach each normalisation are the
running ones, and, for a classifier, until each input is taken for a class that was dealt to it,
every class equally often (Yin et al., "DeepInversion", CVPR 2020, arXiv 1912.08795; statistics
alone: Cai et al., "ZeroQ", CVPR 2020, arXiv 2001.00281). Statistics are compared as Gaussians, by
their KL divergence in each channel, which needs no weights for layers or scales.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx

from laconic.core.errors import RecipeError
from laconic.core.progress import Progress
from laconic.core.task import Inputs, Task
from laconic.program.program import Program
from laconic.program.signature import rebuild
from laconic.solvers.setting import Setting
from laconic.solvers.teaching.learning import Course, Learning
from laconic.training.distillation import kind_for
from laconic.training.feed import mixed
from laconic.training.plan import computes_bf16
from laconic.training.precision import autocast, in_float32, laid_out, wants_channels_last
from laconic.training.taps import tapped

_NORM = torch.ops.aten.batch_norm.default
_BATCH = 128
_STATISTICS = 10.0  # weight of the statistics beside the classes
_RATE = 0.05  # in units of the inputs' own spread
_SCALES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_COARSE = 4  # the first noise has that many pixels in one


class Drawn(NamedTuple):
    """A batch that was made: arguments of the program by name, without targets."""

    inputs: Mapping[str, Any]


class DataFree(Learning):
    """Learning that can do without data.

    Attributes:
        data: "task", or "synthetic": inputs drawn from the batch normalisation of the first teacher
            take the place of the task's training data; they have no labels.
        synthetic: how many are drawn.
        synthetic_steps: steps of the descent that makes a batch of them.
    """

    data: Literal["task", "synthetic"] = "task"
    synthetic: int = Field(default=512, ge=1)
    synthetic_steps: int = Field(default=200, ge=1)

    def course(self, student: Program, context: Setting) -> tuple[Course, list[str]]:
        """What is learned from, and what to know about it.

        Raises:
            RecipeError: labels are asked for, the teacher has no batch normalisation with running
                statistics, or takes anything but one float tensor.
        """
        course = Course.of(context)
        if self.data == "task":
            return course, []
        if self.alpha < 1 and self.hard == "labels":
            raise RecipeError(
                "synthetic inputs have no labels",
                where="data",
                hint='take alpha: 1, or hard: "teacher"',
            )
        drawing = Drawing.of(self.wise(student, course)[0], course)
        made = drawing.batches(self.synthetic, self.synthetic_steps, course.progress)
        arguments = student.signature.arguments
        batches = [
            Drawn({name: rebuild(held, [values], {}) for name, held in arguments.items()})
            for values in made
        ]
        task = replace(
            course.task, train=batches, calibration=None, split=_Split(course.task).split
        )
        note = (
            f"learned from {self.synthetic} inputs drawn from batch normalisation; their "
            f"statistics are {drawing.left:.3g} nats a channel from the remembered ones"
        )
        return replace(course, task=task), [note]


class _Split:
    """The task's own split, and that of batches that were drawn."""

    def __init__(self, task: Task) -> None:
        self._split = task.split

    def split(self, batch: Any) -> tuple[Inputs, Any]:
        """`(inputs, targets)`."""
        return (batch.inputs, None) if isinstance(batch, Drawn) else self._split(batch)


@dataclass(frozen=True)
class _Norm:
    """Where one normalisation gets its input, and what it remembers: float32 `[channels]`."""

    source: str
    mean: Tensor
    variance: Tensor


class Drawing:
    """Draws inputs for a Program.

    Attributes:
        left: mean divergence of the statistics of what was drawn, in nats a channel.
    """

    def __init__(
        self, program: Program, task: Task, seed: int, device: torch.device, norms: Sequence[_Norm]
    ) -> None:
        flat: Any = program.output_node.args[0]
        self._program = program
        self._outputs = len(flat)
        self._task = task
        self._device = device
        self._norms = norms
        self._generator = torch.Generator().manual_seed(seed)
        self._precision = "bf16" if computes_bf16(device) else "fp32"
        self.left = float("nan")

    @classmethod
    def of(cls, teacher: Program, course: Course) -> "Drawing":
        """A drawing for a teacher, which is not changed.

        Raises:
            RecipeError: it has no batch normalisation, or other inputs than one float tensor.
        """
        program = teacher.clone().eval().to(course.device).requires_grad_(False)
        norms = _norms(program)
        if not norms:
            raise RecipeError(
                "inputs are drawn from the running statistics of batch normalisation, and the "
                "teacher has none",
                where="data: synthetic",
                hint="take a teacher whose batch normalisation was not folded, or give data: a few "
                "hundred unlabelled samples do",
            )
        inputs = [
            (p.name, e.dtype) for p, e in zip(program.placeholders, program.example, strict=True)
        ]
        if len(inputs) != 1 or not inputs[0][1].is_floating_point:
            named = ", ".join(f"{name} ({dtype})" for name, dtype in inputs)
            raise RecipeError(
                f"inputs can be drawn where there is one float tensor, found {named}",
                where="data: synthetic",
                hint="give data: unlabelled samples do",
            )
        return cls(program, course.task, mixed(course.seed, 4), course.device, norms)

    def batches(self, count: int, steps: int, progress: Progress) -> list[Tensor]:
        """Batches of `count` inputs together, each of the example's shape, on the CPU."""
        sizes = [len(part) for part in torch.arange(count).split(_BATCH)]
        made: list[Tensor] = []
        left: list[float] = []
        with ExitStack() as stack:
            stack.enter_context(tapped(self._program, [norm.source for norm in self._norms]))
            spread, middle = self._range()
            bar = stack.enter_context(progress.task("drawing inputs", steps * len(sizes)))
            for size in sizes:
                values = middle + spread * self._noise(size)
                apart = self._descend(values, spread, steps, bar.advance)
                made.append(values.detach().cpu())
                left.append(apart)
        self.left = sum(left) / len(left)
        return made

    def _range(self) -> tuple[float, float]:
        """Spread and mean of the noise whose statistics are nearest: inputs may have any scale."""
        noise = self._noise(16)
        tried: list[tuple[float, float, float]] = []
        with torch.no_grad():
            for spread in _SCALES:
                for middle in (0.0, 2.0 * spread):
                    apart, _ = self._apart(middle + spread * noise)
                    tried.append((float(apart), spread, middle))
        _, spread, middle = min(tried)
        return spread, middle

    def _noise(self, size: int) -> Tensor:
        """Noise of unit variance: of images, mostly in large patches."""
        shape = (size, *self._program.example[0].shape[1:])
        fine = torch.randn(shape, generator=self._generator)
        if len(shape) == 4 and min(shape[2:]) >= 2 * _COARSE:
            few = (*shape[:2], shape[2] // _COARSE, shape[3] // _COARSE)
            coarse = F.interpolate(
                torch.randn(few, generator=self._generator), shape[2:], mode="bilinear"
            )
            fine = coarse / coarse.std() + 0.3 * fine
        return fine.to(self._device)

    def _descend(self, values: Tensor, spread: float, steps: int, told: Any) -> float:
        """Move `values` in place; the divergence of the statistics that is left."""
        values.requires_grad_(True)
        optimizer = torch.optim.Adam([values], lr=_RATE * spread)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        classes: Tensor | None = None
        apart = torch.zeros(())
        for _ in range(steps):
            apart, logits = self._apart(values)
            loss = _STATISTICS * apart
            if logits is not None:
                classes = self._dealt(logits) if classes is None else classes
                loss = loss + F.cross_entropy(logits, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            told(1, f"statistics {float(apart.detach()):.3g} nats from the remembered ones")
        return float(apart.detach())

    def _apart(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Divergence of the statistics, and the logits of a classifier."""
        flat = laid_out([values], self._device, wants_channels_last(self._program))
        with autocast(self._device, self._precision):
            leaves = in_float32(self._program.run_flat(*flat))
        found, inner = leaves[: self._outputs], leaves[self._outputs :]
        each = [_gaussians(value, norm) for value, norm in zip(inner, self._norms, strict=True)]
        logits: Tensor | None = None
        if kind_for(self._task) == "kl":
            logits = self._task.logits(self._program.signature.arrange(found))
            logits = logits if logits.ndim == 2 and logits.shape[1] > 1 else None
        return torch.stack(each).mean(), logits

    def _dealt(self, logits: Tensor) -> Tensor:
        """Every class equally often, in random order."""
        size, classes = logits.shape
        order = torch.randperm(size, generator=self._generator)
        return (order % classes).to(logits.device)


def _gaussians(value: Tensor, norm: _Norm) -> Tensor:
    """KL divergence a channel of what arrives from what is remembered, as Gaussians."""
    dims = [dim for dim in range(value.ndim) if dim != 1]
    variance, mean = torch.var_mean(value.float(), dims, correction=0)
    wanted = norm.variance.clamp(min=1e-8)
    ratio = (variance / wanted).clamp(min=1e-8)
    each = 0.5 * (ratio + (mean - norm.mean).pow(2) / wanted - 1 - ratio.log())
    return each.mean()


def _norms(program: Program) -> list[_Norm]:
    """Normalisations with running statistics, one for each value that reaches one."""
    found: dict[str, _Norm] = {}
    for node in program.graph.nodes:
        if node.target != _NORM:
            continue
        source, mean, variance = node.args[0], node.args[3], node.args[4]
        if isinstance(source, fx.Node) and _stored(mean) and _stored(variance):
            held = [program.tensor(str(one.target)).float() for one in (mean, variance)]
            found.setdefault(source.name, _Norm(source.name, *held))
    return list(found.values())


def _stored(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"
