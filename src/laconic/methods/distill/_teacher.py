"""Who runs the original during distillation: torch, or a runtime that is faster on a CPU."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from laconic import runtimes
from laconic.core.errors import ExportError, MissingExtra
from laconic.core.task import Loader
from laconic.methods.base import Context
from laconic.training.feed import Feed
from laconic.training.plan import Plan
from laconic.training.teacher import Original, Remembered, Teacher

Wish = Literal["auto", "torch", "openvino", "onnxruntime"]
_FEW_STEPS = 100  # below that, writing and loading a file costs more than it saves


class Deployed:
    """The original in a runtime: flat outputs, no intermediate values."""

    def __init__(self, runner: runtimes.Runner) -> None:
        self._runner = runner

    def __call__(self, flat: Sequence[Tensor], number: int) -> list[Tensor]:
        """Outputs as tensors on the CPU."""
        del number
        arrays = self._runner.run([tensor.detach().contiguous().numpy() for tensor in flat])
        return [torch.from_numpy(array) for array in arrays]


def make(
    stack: ExitStack, wish: Wish, plan: Plan, taps: Sequence[str], loader: Loader, context: Context
) -> tuple[Teacher, str, list[str]]:
    """A teacher, what runs it, and what to know about that.

    A list of batches, the same in every pass, is asked about once.

    Raises:
        ExportError: the wished runtime cannot run the original.
    """
    notes: list[str] = []
    teacher: Teacher | None = None
    name = wish if wish != "auto" else _choice(plan, taps, loader, context)
    if name != "torch":
        try:
            teacher = _deployed(stack, name, plan, taps, context)
        except (ExportError, MissingExtra) as error:
            if wish != "auto":
                raise
            notes.append(f"the original runs in torch, because {name} cannot: {error}")
            name = "torch"
    if teacher is None:
        teacher = Original(context.original, taps, context.device, plan.precision)
    if isinstance(loader, (list, tuple)) and loader:
        teacher = Remembered(teacher, len(loader))
    return teacher, name, notes


def _choice(plan: Plan, taps: Sequence[str], loader: Loader, context: Context) -> str:
    """A runtime only on a CPU, for outputs only, and where there is much to run."""
    if context.device.type != "cpu" or taps:
        return "torch"
    if plan.minutes is not None:
        return "openvino" if plan.minutes >= 1 else "torch"
    batches = Feed(loader, context.seed).known_length() or _FEW_STEPS
    steps = plan.steps or (plan.epochs or 1) * batches / (plan.accumulate or 1)
    return "openvino" if steps >= _FEW_STEPS else "torch"


def _deployed(
    stack: ExitStack, name: str, plan: Plan, taps: Sequence[str], context: Context
) -> Teacher:
    if taps:
        raise ExportError(
            "a runtime gives outputs only, and features were asked for",
            where="teacher",
            hint='take teacher: "torch" or features: 0',
        )
    if context.device.type != "cpu":
        raise ExportError(f"{name} runs on the CPU, training on {context.device}", where="teacher")
    runtime = runtimes.get(name)
    precision: runtimes.Precision = "bf16" if plan.precision == "bf16" else "fp32"
    if runtime.check(context.original, precision):
        precision = "fp32"
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="laconic-teacher-")))
    path = runtime.write(context.original, folder / f"teacher{runtime.suffix}", precision)
    return Deployed(runtime.load(path, precision, torch.get_num_threads()))
