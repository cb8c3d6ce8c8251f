"""Masks over single weights that change while training goes on.

Between two steps the Program holds masked weights: exact zeros where the mask is False. So what is
evaluated, averaged and kept is what will be the result, and no node stands in the graph. What a
masked weight was is held beside it:

* `learn`: all of it goes on learning unseen. The gradient is taken at the masked weights and moves
  the hidden ones (Lin et al. 2020, arXiv 2006.07253; the straight-through estimator).
* `rest`: it keeps its value until the mask is True again (Zhu & Gupta 2017; Sanh et al. 2020).
* `gone`: it is zero. It comes back only where `regrow` lets the places with the largest gradients
  grow again from zero, as many as are dropped beyond the schedule (Evci et al. 2020).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.solvers.weights.sparsity_ramp import Curve, Ramp
from laconic.solvers.weights.weight_masks import Keep
from laconic.training.attendant import Attendant
from laconic.training.optimizers import forget
from laconic.training.plan import Plan

Masked = Literal["learn", "rest", "gone"]
Score = Literal["magnitude", "movement"]
Choose = Callable[[Mapping[str, Tensor], float], Keep]
"""Scores (minus infinity: never) and a sparsity → which weights stay."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How masks change.

    Attributes:
        ratio: sparsity in the end.
        score: "magnitude" of the weights (hidden ones with theirs), or "movement": the sum of
            -gradient x weight over all steps, positive where training moves away from zero.
        masked: what becomes of a masked weight.
        regrow: with `gone`: part of the kept weights that changes places at a change of the masks,
            falling to zero along a cosine.
        begin: part of the run when sparsity begins to rise.
        end: part of the run when it has risen and the masks stay.
        every: steps between two changes; None makes about a hundred.
        curve: how it rises.
    """

    ratio: float
    score: Score = "magnitude"
    masked: Masked = "learn"
    regrow: float = 0.0
    begin: float = 0.0
    end: float = 0.4
    every: int | None = None
    curve: Curve = "cubic"


class MovingMasks(Attendant):
    """Keeps weights of a Program under masks that follow a rule; give it to one training run.

    Zeros of tensors that are pruned already (`pruned`) stay zeros and count as part of the ratio.
    """

    def __init__(
        self, names: Sequence[str], rule: Rule, choose: Choose, pruned: Sequence[str]
    ) -> None:
        """`names`: the weights; `pruned`: those of them whose zeros are pruned weights already."""
        self._names, self._rule, self._choose = list(names), rule, choose
        self._pruned = frozenset(pruned)
        self._weights: dict[str, Tensor] = {}
        self._keep: Keep = {}
        self._free: Keep = {}  # what may be kept at all
        self._hidden: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._slopes: dict[str, Tensor] = {}  # abs(gradient) of a step after which masks change
        self._steps = 1
        self._ramp = Ramp(0.0, rule.ratio, 0, 1, 1)

    # the run ------------------------------------------------------------------------------

    def begin(self, program: Program, plan: Plan) -> None:
        """Take the weights over as they are; nothing is masked yet but what is pruned."""
        self._steps = plan.steps or 1
        self._weights = {name: program.tensor(name) for name in self._names}
        for name, weight in self._weights.items():
            value = weight.detach()
            free = value != 0 if name in self._pruned else torch.ones_like(value, dtype=torch.bool)
            self._free[name], self._keep[name] = free, free.clone()
            if self._rule.masked != "gone":
                self._hidden[name] = value.clone()
            if self._rule.score == "movement":
                self._scores[name] = torch.zeros_like(value, dtype=torch.float32)
        self._ramp = self._made_ramp()

    def _made_ramp(self) -> Ramp:
        rule = self._rule
        sizes = sum(free.numel() for free in self._free.values())
        first = 1 - sum(int(free.sum()) for free in self._free.values()) / max(sizes, 1)
        change = (min(first, rule.ratio), rule.ratio)
        return Ramp.over(self._steps, (rule.begin, rule.end), change, rule.every, rule.curve)

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Look at the gradients; those of weights that stay masked do not reach the optimizer."""
        ramp = self._ramp
        for name, weight in self._weights.items():
            gradient = weight.grad
            if gradient is None:
                continue
            if name in self._scores:
                self._scores[name] -= gradient * self._hidden.get(name, weight)
            if self._rule.regrow and ramp.due(step):
                self._slopes[name] = gradient.float().abs()
            learns = self._learns(step)
            gradient.masked_fill_(~(self._free if learns else self._keep)[name], 0.0)
            if learns:
                weight.copy_(self._hidden[name])

    @torch.no_grad()
    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Note what has moved, change the masks if it is time, and mask."""
        for name, weight in self._weights.items():
            if self._learns(step):
                self._hidden[name].copy_(weight)
            elif name in self._hidden:
                self._hidden[name] = torch.where(self._keep[name], weight, self._hidden[name])
        if self._ramp.due(step):
            self._change(step)
            for name, weight in self._weights.items():
                if name in self._hidden:
                    weight.copy_(self._hidden[name])
                if not self._learns(step + 1):
                    forget(optimizer, weight, ~self._keep[name])
        self.project({name: weight.detach() for name, weight in self._weights.items()})

    def project(self, tensors: Mapping[str, Tensor]) -> None:
        """Zeros where the masks are False."""
        for name, keep in self._keep.items():
            tensors[name].masked_fill_(~keep, 0.0)

    def judged(self, step: int) -> bool:
        """Only states with the sparsity that was asked for count."""
        return step >= self._ramp.end

    # the masks ----------------------------------------------------------------------------

    def _learns(self, step: int) -> bool:
        """Whether masked weights move in this step: until the masks are final."""
        return self._rule.masked == "learn" and step <= self._ramp.end

    def _change(self, step: int) -> None:
        rule, ramp = self._rule, self._ramp
        ratio = ramp.at(step)
        scores = self._worth()
        share = rule.regrow * (0.5 + 0.5 * math.cos(math.pi * ramp.done(step)))
        keep = self._allowed(scores, ratio + (1 - ratio) * share)
        if share and self._slopes:
            slopes = {name: self._slope(name, keep[name]) for name in keep}
            keep = self._allowed(slopes, ratio)
        self._slopes = {}
        self._keep = keep

    def _worth(self) -> dict[str, Tensor]:
        """What each weight is worth: minus infinity where it may not be kept."""
        found: dict[str, Tensor] = {}
        gone = self._rule.masked == "gone"
        for name, weight in self._weights.items():
            if name in self._scores:
                score = self._scores[name]
            else:
                score = self._hidden.get(name, weight.detach()).float().abs()
            may = self._free[name] & self._keep[name] if gone else self._free[name]
            found[name] = score.masked_fill(~may, -math.inf)
        return found

    def _slope(self, name: str, keep: Tensor) -> Tensor:
        """What a place is worth for growing: what is kept stays, then the largest gradients."""
        slope = self._slopes.get(name)
        if slope is None:
            slope = torch.zeros_like(keep, dtype=torch.float32)
        return slope.masked_fill(keep, math.inf).masked_fill(~self._free[name], -math.inf)

    def _allowed(self, scores: Mapping[str, Tensor], ratio: float) -> Keep:
        chosen = self._choose(scores, ratio)
        return {name: keep & (scores[name] > -math.inf) for name, keep in chosen.items()}

    # on disk ------------------------------------------------------------------------------

    def tensors(self) -> Mapping[str, Tensor]:
        """Masks, hidden weights, scores."""
        return {f"{part}/{name}": t for part, held in self._parts() for name, t in held.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for part, held in self._parts():
            for name, tensor in held.items():
                tensor.copy_(tensors[f"{part}/{name}"])
        self._ramp = self._made_ramp()

    def _parts(self) -> list[tuple[str, dict[str, Tensor]]]:
        return [
            ("keep", self._keep),
            ("free", self._free),
            ("hidden", self._hidden),
            ("score", self._scores),
        ]
