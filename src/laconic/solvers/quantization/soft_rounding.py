"""One weight on a grid, in a form that gradients can move: codes, scales, and how they come down.

* "straight": the weight itself moves, is rounded in every forward pass, and the gradient goes
  straight through (AdaQuant, Hubara et al., arXiv 2006.10518); held within `reach` steps of where
  it was, 0.5 say, its code ends at most one away from the nearest (AutoRound, Cheng et al., arXiv
  2309.05516).
* "sigmoid": the code is the one below plus a rectified sigmoid, which a regulariser drives to 0 or
  1 (AdaRound, Nagel et al., arXiv 2004.10568): at most one away from the nearest by construction.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from laconic.solvers.quantization.ranges import Grid

Way = Literal["straight", "sigmoid"]
_LOW, _HIGH = -0.1, 1.1  # of the stretched sigmoid, so that 0 and 1 are reached


class SoftWeight:
    """One weight's codes and scales while they are learned.

    Attributes:
        codes: what the optimizer moves, float32 `[scales, weights of each]`.
        factors: on the scales, `[scales, 1]`.
    """

    def __init__(
        self, weight: Tensor, axis: int | None, grid: Grid, way: Way, *,
        reach: float | None = None, zeros: bool = False,
    ) -> None:  # fmt: skip
        """`zeros`: weights that are zero stay zero."""
        self.way, self.grid, self._axis, self._shape = way, grid, axis, weight.shape
        rows = weight.detach().float()
        rows = rows if axis is None else rows.movedim(axis, 0)
        self._moved = rows.shape
        rows = rows.reshape(grid.scale.numel(), -1)
        self._scale = grid.scale.detach().float().reshape(-1, 1)
        self._zero = grid.zero_point.float().reshape(-1, 1)
        self._held = (rows == 0) if zeros else None
        self.start, self.reach = rows / self._scale, reach
        self._below = self.start.floor()
        part = (self.start - self._below).clamp(0.01, 0.99)
        moves = self.start if way == "straight" else -torch.log((_HIGH - _LOW) / (part - _LOW) - 1)
        self.codes = moves.clone().requires_grad_()
        self.factors = torch.ones_like(self._scale).requires_grad_()

    def values(self) -> Tensor:
        """The weight as it stands, differentiable."""
        if self.way == "straight":
            codes = (self.codes + self._zero).clamp(self.grid.qmin, self.grid.qmax)
            codes = codes + (codes.round() - codes).detach()
        else:
            codes = (self._below + self._up() + self._zero).clamp(self.grid.qmin, self.grid.qmax)
        return self._shaped(self._kept(codes - self._zero) * (self._scale * self._positive()))

    def undecided(self, power: float) -> Tensor:
        """AdaRound's regulariser: mean of `1 - |2 h - 1|^power`; 0 where nothing is soft."""
        if self.way == "straight":
            return torch.zeros(())
        return (1 - (2 * self._up() - 1).abs().pow(power)).mean()

    @torch.no_grad()
    def hold(self) -> None:
        """Bring weights back that have moved further than `reach`."""
        if self.way == "straight" and self.reach is not None:
            self.codes.copy_(self.codes.clamp(self.start - self.reach, self.start + self.reach))

    @torch.no_grad()
    def settled(self) -> tuple[Tensor, Grid]:
        """The weight exactly on its grid, and the grid."""
        codes = self.codes.round() if self.way == "straight" else self._below + (self.codes >= 0)
        codes = (codes + self._zero).clamp(self.grid.qmin, self.grid.qmax)
        scale = (self._scale * self._positive()).clamp(min=torch.finfo(torch.float32).tiny)
        grid = replace(self.grid, scale=scale.reshape(self.grid.scale.shape).to(self.grid.scale))
        return self._shaped(self._kept(codes - self._zero) * scale), grid

    def _up(self) -> Tensor:
        return (torch.sigmoid(self.codes) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def _positive(self) -> Tensor:
        return self.factors.clamp(min=0.05)

    def _kept(self, steps: Tensor) -> Tensor:
        return steps if self._held is None else steps.masked_fill(self._held, 0.0)

    def _shaped(self, rows: Tensor) -> Tensor:
        made = rows.reshape(self._moved)
        return made if self._axis is None else made.movedim(0, self._axis)
