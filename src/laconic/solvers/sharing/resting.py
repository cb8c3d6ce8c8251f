"""Differences that are zero stay zero while the others are trained.

A model's difference to what all share is paid for where its code is not zero. Training would wake
zeros all over for very little each, and the file would grow.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.training.attendant import Attendant
from laconic.training.plan import Plan

_INSIDE = 0.49  # steps from zero that still are code zero


class Resting(Attendant):
    """Keeps codes of zero; `steps`: tensor → width of a code."""

    def __init__(self, steps: Mapping[str, float]) -> None:
        self.steps = dict(steps)
        self._held: dict[str, Tensor] = {}
        self._limits: dict[str, Tensor] = {}

    def begin(self, program: Program, plan: Plan) -> None:
        """Take down which codes are zero; a limit of infinity leaves the others free."""
        del plan
        for name, step in self.steps.items():
            tensor = program.tensor(name)
            rests = tensor.detach().abs() < step / 2
            self._held[name] = tensor
            self._limits[name] = torch.where(rests, _INSIDE * step, torch.inf).to(tensor)

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Back into the cell of zero, where a code has left it."""
        del step, optimizer
        self.project(self._held)

    def project(self, tensors: Mapping[str, Tensor]) -> None:
        """The same for a running mean."""
        with torch.no_grad():
            for name, limit in self._limits.items():
                if name in tensors:
                    tensors[name].copy_(tensors[name].clamp(-limit, limit))

    def tensors(self) -> Mapping[str, Tensor]:
        """What rests is known from the start alone."""
        return self._limits

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse."""
        self._limits = {name: tensors[name].to(limit) for name, limit in self._limits.items()}
