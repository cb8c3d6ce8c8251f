"""What a training run is given, and what it comes to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from laconic.core.progress import SILENT, Progress
from laconic.core.task import Loader
from laconic.program.program import Program
from laconic.training.attendant import Attendant
from laconic.training.plan import Plan

Forward = Callable[..., tuple[Tensor, ...]]
"""Flat inputs → flat outputs."""


@dataclass(frozen=True)
class Loss:
    """`value`: scalar, a mean over the batch; `samples`: how many it is the mean of."""

    value: Tensor
    samples: int


class Objective(Protocol):
    """What is minimised: the loss of one batch; `forward` runs the Program on flat inputs."""

    def __call__(self, forward: Forward, batch: Any, number: int) -> Loss:
        """The loss of batch `number` of the stream."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run.

    Attributes:
        program: trained in place and left in eval mode with the best state; give a clone.
        names: the tensors that are trained.
        objective: what is minimised.
        loader: training batches, re-iterable.
        plan: how.
        score: the Program's score, higher is better; None keeps the last state. It is called with
            the settled plan's precision.
        watch: a second number, taken down with every score and judging nothing.
        folder: where the state is kept; None keeps none.
        identity: what run this is; a state on disk is taken up only by the same one, on data that
            begin with the same batch (where looking at it does not count as a pass).
        attendant: takes part in the run.
        start: steps of the plan that are taken as done: rate, data and marks begin there.
    """

    program: Program
    names: Sequence[str]
    objective: Objective
    loader: Loader
    plan: Plan
    score: Callable[[Program, str], float] | None = None
    watch: Callable[[Program, str], float] | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = SILENT
    folder: Path | None = None
    identity: str = ""
    attendant: Attendant = field(default_factory=Attendant)
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run came to.

    Attributes:
        plan: the plan with everything decided; the same plan replays the run.
        best_step: the step whose state was kept.
        score: its score; None without a validation.
        evaluations: (step, mean training loss since the last one, score).
        watched: what was watched, a number for each evaluation; empty if nothing was.
        seconds: training time, over all sessions of a resumed run.
        notes: what a person should know, one sentence each.
    """

    plan: Plan
    best_step: int
    score: float | None
    evaluations: Sequence[tuple[int, float | None, float | None]]
    seconds: float
    notes: Sequence[str]
    watched: Sequence[float] = ()
