"""The part of a training run that belongs to learned grids: gradients, fewer bits, calm weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.solvers.quantization import learned_steps
from laconic.solvers.quantization.learned_steps import Initial, LearnedStep
from laconic.solvers.quantization.oscillation import Damping, OnGrid, Oscillation
from laconic.training.attendant import Attendant
from laconic.training.optimizers import forget
from laconic.training.plan import Plan

_SMALLEST = 0.01  # part of what a step was at the beginning of a stage that it cannot fall below


@dataclass(frozen=True, kw_only=True)
class Course:
    """How grids change during a run.

    Attributes:
        starts: for each stage, the part of the run it begins at; the first is 0.
        initial: where the steps of weights begin in a stage.
        damping: what is done about weights that jump to and fro.
        strength: of "damp".
        positive: tensors that are kept from becoming negative.
    """

    starts: tuple[float, ...] = (0.0,)
    initial: Initial = "mse"
    damping: Damping = "none"
    strength: float = 0.1
    positive: tuple[str, ...] = ()


class LearnedGrids(Attendant):
    """Scales the gradients of steps, lowers bits, keeps steps positive; for one run."""

    def __init__(self, steps: Sequence[LearnedStep], course: Course) -> None:
        self._learned, self._course = list(steps), course
        self.oscillation = Oscillation(course.damping, course.strength)
        self._stage = 0
        self._fresh = False  # a stage has begun, a running mean has to follow
        self._floors: dict[str, Tensor] = {}
        self._starts = [0]
        self._length = 1

    # the run ------------------------------------------------------------------------------

    def begin(self, program: Program, plan: Plan) -> None:
        """Everything stands as inserted: the first stage."""
        self._program = program
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._length = plan.steps or 1
        self._starts = [round(part * self._length) for part in self._course.starts]
        self._enter(0)

    def _enter(self, stage: int) -> None:
        """The steps stand on the grids of a stage: take them as where it begins."""
        self._stage = stage
        for step in self._learned:
            tensor = self._program.tensor(step.scale).detach()
            self._floors[step.scale] = tensor * _SMALLEST
        self.oscillation.begin(self._watched(), self._length)

    def _watched(self) -> dict[str, OnGrid]:
        found: dict[str, OnGrid] = {}
        for step in self._learned:
            if step.weight is not None:
                args: Any = self._nodes[step.node].args
                weight, scale, zero = (self._program.tensor(str(s.target)) for s in args[:3])
                found[step.weight] = OnGrid(weight, scale, zero, *args[3:])
        return found

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Scale the gradients of the steps."""
        for learned in self._learned:
            gradient = self._program.tensor(learned.scale).grad
            if gradient is not None:
                gradient.mul_(learned.gradient[min(self._stage, len(learned.gradient) - 1)])
        self.oscillation.damp(step)

    @torch.no_grad()
    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Keep steps positive, watch the weights, and lower the bits if it is time."""
        self.project(dict(self._program.tensors()))
        self.oscillation.look(step)
        following = self._stage + 1
        if following < len(self._starts) and step >= self._starts[following]:
            self._lower(following, optimizer)

    @torch.no_grad()
    def project(self, tensors: Mapping[str, Tensor]) -> None:
        """Positive steps, frozen weights; a running mean begins anew with a stage."""
        if self._fresh:
            for step in self._learned:
                tensors[step.scale].data.copy_(self._program.tensor(step.scale))
            self._fresh = False
        for name, floor in self._floors.items():
            tensors[name].data.copy_(torch.maximum(tensors[name].detach(), floor))
        for name in self._course.positive:
            tensors[name].data.clamp_(min=0)
        self.oscillation.hold(lambda name: tensors[name].data)

    def judged(self, step: int) -> bool:
        """Only states with the last bits count."""
        return step >= self._starts[-1]

    # stages -------------------------------------------------------------------------------

    def _lower(self, stage: int, optimizer: torch.optim.Optimizer) -> None:
        for step in self._learned:
            if stage >= len(step.ends) or step.ends[stage] == step.ends[self._stage]:
                continue
            tensor = self._program.tensor(step.scale)
            tensor.copy_(self._first_step(step, stage, tensor))
            forget(optimizer, tensor, torch.ones_like(tensor, dtype=torch.bool))
        self._set(stage)
        self._enter(stage)
        self._fresh = True

    def _first_step(self, step: LearnedStep, stage: int, now: Tensor) -> Tensor:
        """What the step of a stage begins with."""
        if step.weight is None:
            return now * step.factors[stage]
        axis: Any = self._nodes[step.node].args[3]
        weight = self._program.tensor(step.weight)
        ends, initial = step.ends[stage], self._course.initial
        return learned_steps.weight_grid(weight, axis, ends, initial).scale

    def _set(self, stage: int) -> None:
        for step in self._learned:
            if len(step.ends) > 1:
                ends = step.ends[min(stage, len(step.ends) - 1)]
                learned_steps.set_ends(self._nodes[step.node], ends)
        self._program.recompile()

    # on disk ------------------------------------------------------------------------------

    def tensors(self) -> Mapping[str, Tensor]:
        """The stage, where its steps began, and what is known about jumps."""
        found = {"stage": torch.tensor(self._stage)}
        found |= {f"floor/{name}": tensor for name, tensor in self._floors.items()}
        for part, held in self.oscillation.parts().items():
            found |= {f"{part}/{name}": tensor for name, tensor in held.items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        self._set(int(tensors["stage"]))
        self._enter(int(tensors["stage"]))
        for name, floor in self._floors.items():
            floor.copy_(tensors[f"floor/{name}"])
        for part, held in self.oscillation.parts().items():
            for name, tensor in held.items():
                tensor.copy_(tensors[f"{part}/{name}"])
