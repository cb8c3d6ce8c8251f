"""Weights that jump to and fro between two codes, seen and calmed.

Near the middle between two codes the straight-through gradient pushes a master weight to and fro
for ever; batch statistics follow neither of the two values. Nagel et al., "Overcoming Oscillations
in Quantization-Aware Training" (arXiv 2203.08453): "damp" adds the gradient of
`strength * |w - q(w)|^2`, more and more of it, which draws weights to the middle of their code;
"freeze" holds a weight for ever on the code it had most of the time once it has jumped back too
often, ever more strictly.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.forms import affine

Damping = Literal["none", "damp", "freeze"]
_MOMENTUM = 0.01
_STRICT = (0.05, 0.01)  # a weight that jumps back more often than that a step freezes: first, last
_OFTEN = 0.005
_TAIL = 0.9  # of a run: from there on jumps are counted where nothing is frozen


@dataclass(frozen=True)
class OnGrid:
    """A master weight and the grid it is rounded to; tensors of the Program itself."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    qmin: int
    qmax: int

    def codes(self) -> Tensor:
        """Its codes, in its shape; of a weight that has diverged any, the training says that."""
        weight, scale = self.weight.detach().nan_to_num(), self.scale.detach()
        return affine.encode(weight, scale, self.zero_point, self.axis, self.qmin, self.qmax)

    def decoded(self, codes: Tensor) -> Tensor:
        """The values of codes (floats allowed) in the weight's dtype."""
        scale = self.scale.detach()
        made = affine.decode(codes, scale, self.zero_point, self.axis)
        return made.to(self.weight.dtype)


class Oscillation:
    """Counts jumps of weights in one training run, and calms them.

    Attributes:
        frequency: weight → how often a step makes it jump back, a running mean.
        frozen: weight → which of its values are held.
    """

    def __init__(self, mode: Damping, strength: float) -> None:
        """`strength`: of "damp" in the last step."""
        self.mode, self.strength = mode, strength
        self.frequency: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}
        self._codes: dict[str, Tensor] = {}
        self._turn: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        self._weights: Mapping[str, OnGrid] = {}
        self._steps = 1

    def begin(self, weights: Mapping[str, OnGrid], steps: int) -> None:
        """Watch these weights; nothing is known about them. `steps`: of the whole run."""
        self._weights, self._steps = weights, steps
        for name, held in weights.items():
            codes = held.codes()
            self._codes[name] = codes
            self._turn[name] = torch.zeros_like(codes, dtype=torch.int8)
            self.frequency[name] = torch.zeros_like(codes, dtype=torch.float32)
            if self.mode == "freeze":
                self._mean[name] = codes.float()
                self.frozen[name] = torch.zeros_like(codes, dtype=torch.bool)

    def damp(self, step: int) -> None:
        """Add the gradient of the damping to those of the weights."""
        if self.mode != "damp":
            return
        share = self.strength * (0.5 - 0.5 * math.cos(math.pi * min(step / self._steps, 1.0)))
        for held in self._weights.values():
            if held.weight.grad is not None:
                codes = held.codes()
                inside = (codes > held.qmin) & (codes < held.qmax)
                off = (held.weight.detach() - held.decoded(codes)) * inside
                held.weight.grad.add_(off, alpha=2 * share)

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Count what jumped back in this step, and freeze."""
        if self.mode != "freeze" and step < _TAIL * self._steps:
            return
        done = min(step / self._steps, 1.0)
        first, last = _STRICT
        limit = last + (first - last) * (0.5 + 0.5 * math.cos(math.pi * done))
        for name, held in self._weights.items():
            codes = held.codes()
            turn = (codes.int() - self._codes[name].int()).sign().to(torch.int8)
            back = turn * self._turn[name] < 0
            self.frequency[name].lerp_(back.float(), _MOMENTUM)
            self._turn[name] = torch.where(turn != 0, turn, self._turn[name])
            self._codes[name] = codes
            if self.mode == "freeze":
                self._mean[name].lerp_(codes.float(), _MOMENTUM)
                self.frozen[name] |= self.frequency[name] > limit
        self.hold(lambda name: self._weights[name].weight.data)

    def hold(self, tensors: Callable[[str], Tensor]) -> None:
        """Put frozen values of `tensors` on their codes."""
        for name, frozen in self.frozen.items():
            held = self._weights[name]
            where = tensors(name)
            where.copy_(torch.where(frozen, held.decoded(self._mean[name].round()), where))

    def share(self) -> float:
        """Part of the watched weights that jump to and fro often."""
        total = sum(found.numel() for found in self.frequency.values())
        often = sum(int((found > _OFTEN).sum()) for found in self.frequency.values())
        return often / max(total, 1)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """What a run that goes on needs."""
        return {
            "codes": self._codes,
            "turn": self._turn,
            "frequency": self.frequency,
            "mean": self._mean,
            "frozen": self.frozen,
        }
