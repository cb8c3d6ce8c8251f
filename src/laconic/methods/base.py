"""The contract of a method: a frozen configuration with one pass, Program in, Program out.

A method's fields are the recipe's keys, the command line's options and the planner's search space.
One method is one file below `methods/`; its name is its path (`prune/channels.py` is
`prune.channels`), and its module docstring is its card.
"""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from laconic.core import registry
from laconic.core.errors import RecipeError
from laconic.core.progress import SILENT, Progress
from laconic.core.recipe import Step
from laconic.core.suggest import nearest
from laconic.core.task import Task
from laconic.program.program import Program
from laconic.program.sites import Sites

Changes = dict[str, dict[int, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may use besides its own fields.

    Attributes:
        task: data, loss and metric.
        original: the Program before any step: the teacher and the reference.
        seed: every random choice is drawn from a generator made from it.
        device: where calibration and training run.
        progress: where long work shows that it goes on.
        workdir: where training keeps its state, so that it can be resumed; None keeps nothing.
        runtime: the runtime whose speed counts ("openvino", "onnxruntime", "inductor").
        threads: threads of that runtime; None means all cores.
    """

    task: Task
    original: Program
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = SILENT
    workdir: Path | None = None
    runtime: str = "openvino"
    threads: int | None = None

    def generator(self) -> torch.Generator:
        """A fresh CPU generator of this run's seed."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a method made.

    Attributes:
        program: the new Program; the input is untouched.
        resolved: the options that replay this very step (kept indices, bits, steps, not minutes).
        changes: what was cut: tensor → dimension → kept positions in the step's input.
        notes: what was refused, fallen back to, or found not worth doing, one sentence each.
        figures: numbers worth keeping (losses, sensitivities), JSON.
    """

    program: Program
    resolved: Mapping[str, Any] = field(default_factory=dict[str, Any])
    changes: Changes = field(default_factory=dict[str, dict[int, Tensor]])
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Method(BaseModel, ABC):
    """A way of making a Program smaller or faster, or of repairing one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trains: ClassVar[bool] = False
    """Whether it runs gradient steps over many batches."""

    quick: ClassVar[Mapping[str, Any]] = {}
    """Options of a run that takes a second on a tiny model; the contract tests use them."""

    @abstractmethod
    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Make a new Program; leave `program` as it was.

        Raises:
            RecipeError: options that do not fit this program.
        """

    @classmethod
    def name(cls) -> str:
        """The method's name: its file below `methods/`."""
        return cls.__module__.removeprefix("laconic.methods.")

    def files(self) -> Sequence[str]:
        """Paths of files that the options name; what they hold is part of what a step is."""
        return ()

    def step(self, sites: str | Sequence[str] = "*") -> Step:
        """This method as a step of a recipe."""
        options = self.model_dump(mode="json", exclude_defaults=True)
        held = sites if isinstance(sites, str) else tuple(sites)
        return Step(method=self.name(), sites=held, options=options)


def method_class(name: str) -> type[Method]:
    """The class of the method `name`; imports its file only."""
    return registry.load("laconic.methods", name, Method)


def method_names() -> list[str]:
    """All methods, from the folder alone."""
    return registry.names("laconic.methods")


def method_of(step: Step, where: str) -> Method:
    """The method a step asks for, its options checked.

    Raises:
        RecipeError: unknown method or option (names the nearest), or a value out of range.
    """
    try:
        made = method_class(step.method)
    except RecipeError as error:
        raise RecipeError(error.message, where=where, hint=error.hint) from None
    for key in step.options:
        if key not in made.model_fields:
            raise RecipeError(
                f"{step.method} has no option {key!r}",
                where=where,
                hint=nearest(key, made.model_fields),
            )
    try:
        return made(**step.options)
    except ValidationError as error:
        raise RecipeError(
            _refused(error, step.options), where=f"{where} ({step.method})"
        ) from error


def _refused(error: ValidationError, options: Mapping[str, Any]) -> str:
    """Which option was refused and what it may be, in words."""
    first, *others = error.errors()
    if not first["loc"]:  # a check of several options says itself which
        return first["msg"].removeprefix("Value error, ")
    option = str(first["loc"][0])
    same = [first, *(other for other in others if other["loc"][0] == option)]
    said = dict.fromkeys(each["msg"] for each in same)  # one for each type that it may have
    return f"{option} = {reprlib.repr(options[option])}: {', or: '.join(said)}"
