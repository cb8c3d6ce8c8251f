"""Everything about a run that changes while it goes on."""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.program.surgery import Changes, sliced
from laconic.training.attendant import Attendant
from laconic.training.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer


class State:
    """Weights, optimizer, running mean, best state so far, and where in the run we are.

    Attributes:
        step: steps done.
        best_step: the step whose state is the best so far, 0 for the state at the beginning.
        best_score: its score, higher is better; None where nothing is judged.
        worse: evaluations since then.
        ended: whether to stop before the last step.
        evaluations: (step, mean loss since the last one, score).
        watched: the second number of each evaluation, if one was taken.
        seconds: time spent in earlier sessions.
        attendant: whoever takes part in the run, once its length is known.
    """

    def __init__(
        self,
        program: Program,
        optimizer: torch.optim.Optimizer,
        trained: Mapping[str, Tensor],
        ema: float | None,
    ) -> None:
        self._program = program
        self._optimizer = optimizer
        self._names = {tensor: name for name, tensor in trained.items()}
        self._decay = ema
        self._mean = self._copies() if ema is not None else {}
        self._best: dict[str, Tensor] = {}
        self.step = self.best_step = self.worse = 0
        self.best_score: float | None = None
        self.ended = False
        self.evaluations: list[tuple[int, float | None, float | None]] = []
        self.watched: list[float] = []
        self.seconds = 0.0
        self.attendant = Attendant()

    def _copies(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self._program.tensors()}

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._program.tensors():
            if name in tensors:
                tensor.copy_(tensors[name])

    @torch.no_grad()
    def moved(self) -> None:
        """A step is done."""
        self.step += 1
        if self._decay is None:
            return
        for name, tensor in self._program.tensors():
            if tensor.is_floating_point():
                self._mean[name].lerp_(tensor.detach(), 1 - self._decay)
            else:
                self._mean[name].copy_(tensor)
        self.attendant.project(self._mean)

    @contextmanager
    def averaged(self) -> Generator[None, None, None]:
        """With a running mean, the Program holds it for the length of a `with` block."""
        if self._decay is None:
            yield
            return
        held = self._copies()
        self._load(self._mean)
        try:
            yield
        finally:
            self._load(held)

    def finite(self) -> bool:
        """Whether all that is trained is finite."""
        return all(bool(torch.isfinite(tensor.detach()).all()) for tensor in self._names)

    def judge(self, score: float | None) -> None:
        """Keep this state if it is the best; of equals, and without scores, the later one.

        A score that is not a number never counts as better.
        """
        known = self.best_score
        if score is not None and (math.isnan(score) or (known is not None and score < known)):
            self.worse += 1
            if self._best:
                return
            score = None
        self.best_step, self.worse = self.step, 0
        self.best_score = score
        self._best = dict(self._mean) if self._decay is not None else self._copies()
        if self._decay is not None:
            self._best = {name: t.clone() for name, t in self._best.items()}

    def restart(self) -> None:
        """What the program was before is not wanted any more; this state is the best so far."""
        self.best_score, self._best = None, {}
        self.judge(None)

    def follow(self, changes: Changes) -> None:
        """Cut what lies beside the program's tensors as they were cut: moments, running mean."""
        for name, dims in changes.items():
            tensor = self._program.tensor(name)
            held = self._optimizer.state.get(tensor, {})
            for key, value in held.items():
                if isinstance(value, Tensor) and value.ndim == tensor.ndim:
                    held[key] = sliced(value, dims)
            if name in self._mean:
                self._mean[name] = sliced(self._mean[name], dims)
        for name, tensor in self._program.tensors() if self._mean else ():
            self._mean.setdefault(name, tensor.detach().clone())  # constants that a cut wrote out

    def take_best(self) -> None:
        """Load the best state into the Program."""
        self._load(self._best)

    def snapshot(self) -> Checkpoint:
        """A copy of all this, in memory."""
        found = self.checkpoint("", {})
        return Checkpoint("", {k: t.clone() for k, t in found.tensors.items()}, found.state)

    def checkpoint(self, identity: str, about: Mapping[str, Any]) -> Checkpoint:
        """All this, to be written to disk."""
        parts = {
            "now": {name: t.detach() for name, t in self._program.tensors()},
            "optimizer": optimizer_tensors(self._optimizer, self._names),
            "mean": self._mean,
            "best": self._best,
            "attendant": self.attendant.tensors(),
        }
        tensors = {f"{part}/{k}": t for part, held in parts.items() for k, t in held.items()}
        state = {
            **about,
            "step": self.step,
            "best_step": self.best_step,
            "best_score": self.best_score,
            "worse": self.worse,
            "ended": self.ended,
            "evaluations": self.evaluations,
            "watched": self.watched,
        }
        return Checkpoint(identity, tensors, state)

    def restore(self, found: Checkpoint) -> Mapping[str, Any]:
        """The inverse of `checkpoint`; returns the state with what was said about it."""
        self._load(found.part("now"))
        self._optimizer.state.clear()
        restore_optimizer(self._optimizer, self._names, found.part("optimizer"))
        if self._decay is not None:
            for name, tensor in found.part("mean").items():
                self._mean[name].copy_(tensor)
        device = next(iter(self._names)).device
        self._best = {name: t.to(device) for name, t in found.part("best").items()}
        state = found.state
        self.step, self.best_step = state["step"], state["best_step"]
        self.best_score, self.worse = state["best_score"], state["worse"]
        self.ended = state["ended"]
        self.evaluations = [tuple(entry) for entry in state["evaluations"]]  # type: ignore[misc]
        self.watched = list(state.get("watched", []))
        return state
