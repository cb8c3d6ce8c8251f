"""What a method's context says, as far as solvers use it."""

from pathlib import Path
from typing import Protocol

import torch

from laconic.core.progress import Progress
from laconic.core.task import Task
from laconic.program.program import Program


class Setting(Protocol):
    """The context of methods, seen from the floor below; its attributes are explained there."""

    @property
    def task(self) -> Task: ...
    @property
    def original(self) -> Program: ...
    @property
    def seed(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def progress(self) -> Progress: ...
    @property
    def workdir(self) -> Path | None: ...
    @property
    def runtime(self) -> str: ...
    @property
    def threads(self) -> int | None: ...
    def generator(self) -> torch.Generator:
        """A fresh generator of this run's seed."""
        ...
