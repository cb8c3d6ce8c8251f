"""Ways of walking through a space: ask for a member, tell how good it is.

All of them only see members within the budget: one that is over it is made smaller knob by knob,
one that leaves room is made larger, so that nothing is spent on networks that are too small or too
slow. Regularised evolution: Real et al. 2019 (arXiv 1802.01548). TPE (Bergstra et al. 2011) and
NSGA-II (Deb et al. 2002) come from Optuna, see `optuna_search`.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

import torch

from laconic.core.errors import BudgetError
from laconic.solvers.search.search_space import Member, Space

Excess = Callable[[Member], float]
"""How far a member is over the budget: cost by limit less one, the largest; at most 0 is within."""
_POPULATION, _SAMPLE = 16, 5
_RATE = 0.1


class Within:
    """The members of a space that keep a budget."""

    def __init__(self, space: Space, excess: Excess) -> None:
        """Raises BudgetError where the space has no member within the budget."""
        self.space, self._excess = space, excess
        over = excess(space.least())
        if over > 0:
            raise BudgetError(
                f"no member is within the budget: the least of {space.members()} costs "
                f"{1 + over:.3g} times what was asked for",
                where="nas.search",
                hint="give the space smaller choices, more that varies, or ask for less",
            )

    def excess(self, member: Member) -> float:
        """How far a member is over the budget; at most 0 is within."""
        return self._excess(member)

    def repaired(self, member: Member, generator: torch.Generator) -> Member:
        """A near member within the budget that no knob makes larger without leaving it."""
        genes = list(self.space.genes(member))
        lengths = [len(knob.choices) for knob in self.space.knobs]
        for place in _shuffled(genes, lengths, generator):
            if self._excess(self.space.member(genes)) <= 0:
                break
            genes[place] += 1
        if self._excess(self.space.member(genes)) > 0:  # costs may not fall with every knob
            genes = list(self.space.genes(self.space.least()))
        for place in torch.randperm(len(genes), generator=generator).tolist():
            while genes[place] > 0:
                genes[place] -= 1
                if self._excess(self.space.member(genes)) > 0:
                    genes[place] += 1
                    break
        return self.space.member(genes)


def _shuffled(
    genes: Sequence[int], lengths: Sequence[int], generator: torch.Generator
) -> list[int]:
    """Every step down that is left, as the place it is taken at, in random order."""
    steps = [
        place
        for place, (gene, length) in enumerate(zip(genes, lengths, strict=True))
        for _ in range(length - 1 - gene)
    ]
    return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]


class Strategy(ABC):
    """Proposes members one at a time."""

    @abstractmethod
    def ask(self) -> Member:
        """A member within the budget."""

    @abstractmethod
    def tell(self, member: Member, values: Sequence[float]) -> None:
        """How good the member is that was asked for last; higher is better, the score first."""


class Random(Strategy):
    """Members drawn one by one, whatever is told."""

    def __init__(self, within: Within, generator: torch.Generator) -> None:
        self._within, self._generator = within, generator

    def ask(self) -> Member:
        """A random member within the budget."""
        drawn = self._within.space.random(self._generator)
        return self._within.repaired(drawn, self._generator)

    def tell(self, member: Member, values: Sequence[float]) -> None:
        """Nothing is learned."""
        del member, values


class Evolution(Strategy):
    """Regularised evolution: the best of a few is mutated, the oldest leaves."""

    def __init__(self, within: Within, generator: torch.Generator) -> None:
        self._within, self._generator = within, generator
        self._living: deque[tuple[Member, float]] = deque(maxlen=_POPULATION)
        self._first = Random(within, generator)

    def ask(self) -> Member:
        """A random member at first, then a child."""
        if len(self._living) < _POPULATION:
            return self._first.ask()
        drawn = torch.randint(len(self._living), (_SAMPLE,), generator=self._generator).tolist()
        parent = max((self._living[place] for place in drawn), key=lambda pair: pair[1])[0]
        child = self._within.space.mutated(parent, _RATE, self._generator)
        return self._within.repaired(child, self._generator)

    def tell(self, member: Member, values: Sequence[float]) -> None:
        """The newest; the oldest dies."""
        self._living.append((member, values[0]))
