"""Optimal-brain-surgeon order of removal for blocks of columns of linear maps.

A consumer y = W x loses 1/2 tr(D dW S dW^T) when its weights change by dW, where S is the second
moment of its inputs and D that of the loss gradient at its output. Removing the columns of block c
and letting all others make up for it costs (Hassibi & Stork 1993; in blocks: Kurtic et al. 2022,
ZipLM 2023)

    harm(c) = 1/2 tr(D W_c ([S^-1]_cc)^-1 W_c^T),

after which W -= W_c ([S^-1]_cc)^-1 [S^-1]_c: and S^-1 is downdated. The greedy order removes the
cheapest block, updates, and goes on; several consumers of one group add their harms up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.statistics.gram import Gram

_LOOSE = 1 / 8  # share of columns that are gone when the matrices are made smaller


@dataclass(frozen=True)
class Removal:
    """In which order the indices of a group go, and what each one costs more.

    Attributes:
        order: int64 `[size]`, first to go first.
        harm: float64 `[size]`, what each costs when those before it are gone.
    """

    order: Tensor
    harm: Tensor

    def kept(self, count: int) -> Tensor:
        """The `count` indices that stay longest, ascending."""
        return self.order[len(self.order) - count :].sort().values


def by_score(score: Tensor) -> Removal:
    """The order of independent scores `[size]`: the smallest first."""
    score = score.double().cpu()
    order = score.argsort(stable=True)
    return Removal(order, score[order])


class Consumer:
    """One linear map that reads a group: its weights, inverse moments and blocks of columns."""

    def __init__(
        self,
        gram: Gram,
        weight: Tensor,
        metric: Tensor,
        blocks: Tensor,
        *,
        ridge: float = 1e-3,
        bias: bool = True,
    ) -> None:
        """Prepare the elimination.

        Args:
            gram: moments of the input rows.
            weight: `[out, columns]`.
            metric: `[out, out]`, second moment of the loss gradient at the output, summed over
                the positions of a sample and averaged over samples.
            blocks: int64 `[size, width]`, the columns of every index of the group.
            ridge: damping, in units of the mean variance of the columns.
            bias: the map has a bias that makes up for the means.
        """
        moments = gram if bias else gram.raw()
        covariance = moments.covariance.clone()
        level = max(float(covariance.diagonal().mean()), 1e-30)
        covariance.diagonal().add_(ridge * level)
        self.inverse = torch.linalg.inv(covariance)
        weight = weight.to(self.inverse)
        self.rooted = _root(metric.to(self.inverse)) @ weight  # D^(1/2) W
        self.blocks = blocks.to(weight.device)
        self._gone = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)

    def harms(self, alive: Tensor) -> Tensor:
        """float64 `[alive]`: what removing each of these indices costs now."""
        columns = self.blocks[alive]
        inner = self.inverse[columns[:, :, None], columns[:, None, :]]
        rows = self.rooted.T[columns]  # [alive, width, out]
        energy = rows @ rows.mT
        return 0.5 * torch.linalg.solve(inner, energy).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, indices: Tensor) -> None:
        """Take indices out; the remaining columns make up for them."""
        columns = self.blocks[indices].flatten()
        rows = self.inverse[columns]
        step = torch.linalg.solve(rows[:, columns], rows)
        self.rooted.addmm_(self.rooted[:, columns], step, alpha=-1)
        self.inverse.addmm_(rows.T, step, alpha=-1)
        self._gone[columns] = True
        if int(self._gone.count_nonzero()) > _LOOSE * len(self._gone):
            self._compact()

    def _compact(self) -> None:
        """Let go of what belongs to columns that are gone: the rest does not depend on them."""
        left = (~self._gone).nonzero()[:, 0]
        self.inverse = self.inverse[left[:, None], left]
        self.rooted = self.rooted[:, left]
        self.blocks = ((~self._gone).cumsum(0) - 1).clamp(min=0)[self.blocks]
        self._gone = self._gone[left]


def eliminate(consumers: Sequence[Consumer], size: int, *, exact: int = 128) -> Removal:
    """Remove one index after the other, always the one that costs least.

    Args:
        consumers: every linear map that reads the group.
        size: of the group.
        exact: groups larger than this lose `size / exact` indices at a time, the cheapest ones.

    Returns:
        The whole order; the last index has infinite harm, a group never becomes empty.
    """
    alive, chunk = torch.arange(size), -(-size // exact)
    order: list[Tensor] = []
    harm: list[Tensor] = []
    while len(alive) > 1:
        total = torch.stack([c.harms(alive).cpu() for c in consumers]).sum(0).clamp(min=0)
        chosen = total.argsort(stable=True)[: min(chunk, len(alive) - 1)]
        order.append(alive[chosen])
        harm.append(total[chosen])
        for consumer in consumers:
            consumer.remove(alive[chosen])
        left = torch.ones(len(alive), dtype=torch.bool)
        left[chosen] = False
        alive = alive[left]
    infinite = torch.full((len(alive),), torch.inf, dtype=torch.float64)
    return Removal(torch.cat([*order, alive]), torch.cat([*harm, infinite]))


def _root(metric: Tensor) -> Tensor:
    """A matrix R with R^T R = metric, for a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh((metric + metric.T) / 2)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T
