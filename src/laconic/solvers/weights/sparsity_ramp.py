"""How sparsity rises while training goes on."""

from dataclasses import dataclass
from typing import Literal

Curve = Literal["cubic", "linear"]
_UPDATES = 100  # of the masks, where nobody says how often


@dataclass(frozen=True)
class Ramp:
    """Sparsity from `first` to `last` between two steps, changed every few of them.

    Cubic (Zhu & Gupta 2017): `last + (first - last) (1 - (t - begin) / (end - begin))^3`, fast
    while much is superfluous and slow towards the end.

    Attributes:
        first: sparsity before, from 0 to 1.
        last: sparsity from `end` on.
        begin: steps done when it begins to rise.
        end: steps done when it is `last`; 1 or more.
        every: steps between two changes; the last one is at `end` in any case.
    """

    first: float
    last: float
    begin: int
    end: int
    every: int
    curve: Curve = "cubic"

    @classmethod
    def over(
        cls,
        steps: int,
        parts: tuple[float, float],
        change: tuple[float, float],
        every: int | None = None,
        curve: Curve = "cubic",
    ) -> "Ramp":
        """The ramp of a run of `steps` steps.

        Args:
            steps: of the whole run.
            parts: begin and end, as parts of the run.
            change: sparsity before and behind.
            every: None changes it about a hundred times.
            curve: how it rises.
        """
        end = max(1, round(parts[1] * steps))
        begin = min(round(parts[0] * steps), end - 1)
        first, last = change
        return cls(first, last, begin, end, every or max(1, (end - begin) // _UPDATES), curve)

    def due(self, step: int) -> bool:
        """Whether the masks change after `step` steps."""
        within = max(self.begin, 1) <= step < self.end
        return step == self.end or (within and (step - self.begin) % self.every == 0)

    def done(self, step: int) -> float:
        """How much of the way lies behind, from 0 to 1."""
        return min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)

    def at(self, step: int) -> float:
        """Sparsity after `step` steps.

        >>> ramp = Ramp(0.0, 0.8, 10, 30, 5)
        >>> [round(ramp.at(step), 2) for step in (0, 10, 15, 20, 30, 40)]
        [0.0, 0.0, 0.46, 0.7, 0.8, 0.8]
        """
        left = 1.0 - self.done(step)
        if left == 0.0:
            return self.last
        return self.last + (self.first - self.last) * left ** (3 if self.curve == "cubic" else 1)
