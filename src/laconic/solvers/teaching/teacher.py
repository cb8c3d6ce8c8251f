"""Who runs the teachers during distillation: torch, or a runtime that is faster on a CPU."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from laconic import runtimes
from laconic.core.errors import ExportError, MissingExtra
from laconic.core.task import Loader
from laconic.program.program import Program
from laconic.training.feed import Feed
from laconic.training.plan import Plan
from laconic.training.taps import tapped
from laconic.training.teacher import Original, Remembered, Several, Teacher

Wish = Literal["auto", "torch", "openvino", "onnxruntime"]
_FEW_STEPS = 100  # below that, writing and loading a file costs more than it saves


class Deployed:
    """A teacher in a runtime; values inside it are further outputs of its file."""

    def __init__(self, runner: runtimes.Runner) -> None:
        self._runner = runner

    def __call__(self, flat: Sequence[Tensor], number: int) -> list[Tensor]:
        """Outputs, then tapped values, as tensors on the CPU."""
        del number
        arrays = self._runner.run([tensor.detach().contiguous().numpy() for tensor in flat])
        return [torch.from_numpy(array) for array in arrays]


@dataclass(frozen=True)
class Lesson:
    """What teachers are wanted for: who they are, values `taps` inside the first, how long.

    A teacher of several Programs gives the outputs of one behind those of another.
    """

    programs: Sequence[Program]
    plan: Plan
    taps: Sequence[str]
    loader: Loader
    device: torch.device
    seed: int
    validation: Loader | None = None


def make(stack: ExitStack, wish: Wish, lesson: Lesson) -> tuple[Teacher, str, list[str]]:
    """A teacher, what runs it, and what to know about that.

    `stack` closes what the teacher needs. Where batches come again (a list, or a loader with a
    `period`), each is asked about once.

    Raises:
        ExportError: the wished runtime cannot run the original.
    """
    notes: list[str] = []
    name = wish if wish != "auto" else _choice(lesson)
    teachers: list[Teacher] = []
    if name != "torch":
        try:
            teachers = [_deployed(stack, name, lesson, i) for i in range(len(lesson.programs))]
        except (ExportError, MissingExtra) as error:
            if wish != "auto":
                raise
            notes.append(f"the original runs in torch, because {name} cannot: {error}")
            name = "torch"
    if not teachers:
        device, precision = lesson.device, lesson.plan.precision
        wanted = [lesson.taps, *[()] * (len(lesson.programs) - 1)]
        teachers = [
            Original(one, taps, device, precision)
            for one, taps in zip(lesson.programs, wanted, strict=True)
        ]
    teacher = teachers[0]
    if len(teachers) > 1:
        flat: Any = lesson.programs[0].output_node.args[0]
        teacher = Several(teachers, len(flat))
    period = Feed(lesson.loader, lesson.seed).period or 0
    held_out = isinstance(lesson.validation, (list, tuple))
    if period or held_out:
        teacher = Remembered(teacher, period, held_out)
    return teacher, name, notes


def _choice(lesson: Lesson) -> str:
    """A runtime only on a CPU, and where there is much to run."""
    if lesson.device.type != "cpu":
        return "torch"
    plan = lesson.plan
    if plan.minutes is not None:
        return "openvino" if plan.minutes >= 1 else "torch"
    batches = Feed(lesson.loader, lesson.seed).known_length() or _FEW_STEPS
    steps = plan.steps or (plan.epochs or 1) * batches / (plan.accumulate or 1)
    return "openvino" if steps >= _FEW_STEPS else "torch"


def _deployed(stack: ExitStack, name: str, lesson: Lesson, place: int) -> Teacher:
    """Teacher number `place` in a runtime; the first one gives tapped values too."""
    if lesson.device.type != "cpu":
        raise ExportError(f"{name} runs on the CPU, training on {lesson.device}", where="teacher")
    runtime = runtimes.get(name)
    precision: runtimes.Precision = "bf16" if lesson.plan.precision == "bf16" else "fp32"
    program = lesson.programs[place].clone()
    with tapped(program, lesson.taps if place == 0 else ()):
        if runtime.check(program, precision):
            precision = "fp32"
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="laconic-teacher-")))
        path = runtime.write(program, folder / f"teacher{runtime.suffix}", precision)
    return Deployed(runtime.load(path, precision, torch.get_num_threads()))
