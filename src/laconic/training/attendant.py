"""Somebody who takes part in a training run: masks that change, states worth remembering."""

from collections.abc import Mapping

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.program.surgery import Changes
from laconic.training.plan import Plan


class Attendant:
    """Does nothing; a subclass does something at the places it overrides.

    What it holds goes into the state on disk with `tensors` and comes back with `restore`, so that
    a run that was stopped goes on as if it had not been. Steps are counted from 1, as they end.
    """

    def begin(self, program: Program, plan: Plan) -> None:
        """The run's length is in `plan`, the program is on its device, nothing has moved yet."""

    def before(self, step: int) -> None:
        """The gradients of a step are there, neither clipped nor used."""

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has moved the tensors."""

    def cut(self, step: int) -> Changes:
        """Make the program itself smaller (`surgery.cut_`); what was cut, nothing by default.

        The optimizer's moments and the running mean are cut with it, and what the run was before
        is not kept as its result. Comes after `after`.
        """
        del step
        return {}

    def project(self, tensors: Mapping[str, Tensor]) -> None:
        """Bring a running mean of the program's tensors to where the tensors themselves may be."""

    def judged(self, step: int) -> bool:
        """Whether the state after `step` steps may be kept as the run's result."""
        del step
        return True

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything that a run which goes on needs."""
        return {}

    def reshape(self, tensors: Mapping[str, Tensor]) -> Changes:
        """Cut the program as it was when `tensors` were taken; its values are loaded next.

        Comes between `begin` and `restore`.
        """
        del tensors
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`; comes after `begin`."""
