"""The part of a training run that belongs to weights of one bit: two steps, gradients that sharpen.

First the activations become binary while weights stay floats, then the weights too: from there on
the weights know where they have to go (Bulat & Tzimiropoulos, arXiv 1909.13863; Liu et al.,
"ReActNet", arXiv 2003.03488). `k tanh(t x)` with t from 0.1 to 10 and k = max(1 / t, 1) begins as
the identity and ends nearly as the sign (Qin et al., "IR-Net", arXiv 1909.10788).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from laconic.program.program import Program
from laconic.solvers.quantization.binary_layers import SHARPNESS, BinaryWeight
from laconic.solvers.quantization.learned_grids import Course, LearnedGrids
from laconic.solvers.quantization.learned_steps import LearnedStep
from laconic.training.plan import Plan

_SOFT, _SHARP = 0.1, 10.0


class BinaryGrids(LearnedGrids):
    """Learned grids, of which some are weights of one bit; for one run."""

    def __init__(
        self, steps: Sequence[LearnedStep], weights: Sequence[BinaryWeight], first: float
    ) -> None:
        """`first`: part of the run in which `weights` are floats."""
        super().__init__([*steps, *(held.step for held in weights)], Course())
        self._weights, self._first = list(weights), first
        self._joined = 0
        self._floats = False
        self._users: dict[str, list[fx.Node]] = {}

    def begin(self, program: Program, plan: Plan) -> None:
        """Weights are floats at first, if they have time for it."""
        super().begin(program, plan)
        self._joined = round(self._first * self._length) if self._weights else 0
        for held in self._weights:
            self._users[held.trained] = list(self._nodes[held.trained].users)
        self._floats = False
        self._sharpen(0)
        self._switch(self._joined > 0)

    def _switch(self, floats: bool) -> None:
        """Let operators read the float weights, or those of one bit."""
        if floats is self._floats:
            return
        for held in self._weights:
            source: Any = self._nodes[held.node].args[0]
            trained = self._nodes[held.trained]
            old, new = (trained, source) if floats else (source, trained)
            for user in self._users[held.trained]:
                user.replace_input_with(old, new)
        self._floats = floats
        self._program.recompile()

    @torch.no_grad()
    def _sharpen(self, step: int) -> None:
        buffers = dict(self._program.named_buffers())
        if SHARPNESS[0] in buffers:
            sharp = _SOFT * (_SHARP / _SOFT) ** min(step / self._length, 1.0)
            buffers[SHARPNESS[0]].fill_(sharp)
            buffers[SHARPNESS[1]].fill_(max(1 / sharp, 1.0))

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Scales of weights that are floats still have no gradient: the optimizer wants one."""
        for held in self._weights if self._floats else ():
            scale = self._program.tensor(held.scale)
            scale.grad = torch.zeros_like(scale)
        super().before(step)

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Binary weights when it is time; gradients a little sharper."""
        super().after(step, optimizer)
        self._sharpen(step)
        if step >= self._joined:
            self._switch(False)

    def judged(self, step: int) -> bool:
        """Only states whose weights have one bit count."""
        return step >= self._joined

    def tensors(self) -> Mapping[str, Tensor]:
        """Whether weights are still floats, too."""
        return {**super().tensors(), "floats": torch.tensor(self._floats)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        super().restore(tensors)
        self._switch(bool(tensors["floats"]))
