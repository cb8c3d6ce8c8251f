"""A learned predictor: the score of a member from the choices it makes.

Ridge regression on which choice each knob stands at, as zeros and ones, its penalty chosen by
leaving one out, which has a closed form. A few dozen evaluations are enough to rank a space of
nested sub-networks, whose scores are nearly additive in the knobs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from laconic.solvers.search.search_space import Member, Space

_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


class ScoreModel:
    """Ridge regression on the choices of members.

    Attributes:
        correlation: Spearman's between scores and what the model says of each without having
            seen it.
    """

    def __init__(self, space: Space, members: Sequence[Member], scores: Sequence[float]) -> None:
        """Fit to evaluated members, two at least."""
        self._space = space
        x = torch.stack([self._features(member) for member in members])
        y = torch.tensor(list(scores), dtype=torch.float64)
        self._x_mean, self._y_mean = x.mean(0), y.mean()
        x, y = x - self._x_mean, y - self._y_mean
        best = float("inf")
        self._weights, unseen = torch.zeros(x.shape[1], dtype=torch.float64), y
        for penalty in _PENALTIES:
            kernel = x @ x.T
            inverse = torch.linalg.inv(kernel + penalty * torch.eye(len(y), dtype=torch.float64))
            dual = inverse @ y
            left_out = y - dual / inverse.diagonal()
            error = float((left_out - y).square().sum())
            if error < best:
                best, self._weights, unseen = error, x.T @ dual, left_out
        self.correlation = _spearman(unseen, y)

    def __call__(self, member: Member) -> float:
        """The score that is foretold."""
        return float((self._features(member) - self._x_mean) @ self._weights + self._y_mean)

    def _features(self, member: Member) -> Tensor:
        """Which choice each knob stands at, and how far down it is: float64."""
        parts: list[Tensor] = []
        for knob, gene in zip(self._space.knobs, self._space.genes(member), strict=True):
            one = torch.zeros(len(knob.choices) + 1, dtype=torch.float64)
            one[gene] = 1.0
            one[-1] = gene / max(len(knob.choices) - 1, 1)
            parts.append(one)
        return torch.cat(parts)


def _spearman(one: Tensor, two: Tensor) -> float:
    ranks = torch.stack([t.argsort().argsort().double() for t in (one, two)])
    return float(torch.corrcoef(ranks)[0, 1].nan_to_num())
