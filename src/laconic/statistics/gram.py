"""Second moments of rows, and of rows with targets: all that least squares needs to know."""

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.statistics.base import Statistic, finite
from laconic.statistics.layers import Layer, pick


class Gram(Statistic):
    """Means and centred products of a stream of rows, in float64 (Chan et al. 1979).

    Products within one update are in the rows' own dtype on centred rows, sums over updates in
    float64, so a large mean costs no precision.

    Attributes:
        count: rows seen.
        mean: `[columns]`.
        scatter: `[columns, columns]`, sum of centred outer products.
        target_mean: `[targets]`.
        cross: `[targets, columns]`, sum of centred products of target and row.
        target_scatter: `[targets]`, sum of squared distances of the targets from their mean.
    """

    def __init__(self) -> None:
        empty = torch.zeros(0, dtype=torch.float64)
        self.count = 0
        self.mean, self.target_mean, self.target_scatter = empty, empty, empty
        self.scatter, self.cross = empty[None], empty[None]

    @property
    def covariance(self) -> Tensor:
        """`[columns, columns]`, the mean centred product."""
        return self.scatter / max(self.count, 1)

    def update(self, tensor: Tensor, targets: Tensor | None = None) -> None:
        """Take rows `[n, columns]` in, with targets `[n, targets]` if there are any."""
        if not len(tensor):
            return
        rows = _wide(finite(tensor.flatten(0, -2)))
        wanted = rows[:, :0] if targets is None else _wide(finite(targets.flatten(0, -2)))
        made = Gram()
        made.count = len(rows)
        made.mean = rows.mean(0, dtype=torch.float64)
        made.target_mean = wanted.mean(0, dtype=torch.float64)
        rows = rows - made.mean.to(rows.dtype)
        wanted = wanted - made.target_mean.to(wanted.dtype)
        made.scatter = (rows.T @ rows).double()
        made.cross = (wanted.T @ rows).double()
        made.target_scatter = wanted.square().sum(0, dtype=torch.float64)
        self.merge(made)

    def merge(self, other: "Gram") -> None:
        """Take in what another one has seen."""
        if not other.count:
            return
        if not self.count:
            vars(self).update(vars(other))
            return
        if self.cross.shape != other.cross.shape:
            found, had = list(other.cross.shape), list(self.cross.shape)
            raise DataError(f"[targets, columns] is {found} after {had}")
        total = self.count + other.count
        weight = self.count * other.count / total
        away, aim = other.mean - self.mean, other.target_mean - self.target_mean
        self.scatter = (self.scatter + other.scatter).addr_(away, away, alpha=weight)
        self.cross = (self.cross + other.cross).addr_(aim, away, alpha=weight)
        self.target_scatter = self.target_scatter + other.target_scatter + weight * aim.square()
        self.mean = self.mean + away * (other.count / total)
        self.target_mean = self.target_mean + aim * (other.count / total)
        self.count = total

    def raw(self) -> "Gram":
        """The same moments about zero instead of the mean, for maps without a bias."""
        made = Gram()
        made.count = self.count
        made.mean, made.target_mean = (
            torch.zeros_like(self.mean),
            torch.zeros_like(self.target_mean),
        )
        made.scatter = self.scatter + self.count * torch.outer(self.mean, self.mean)
        made.cross = self.cross + self.count * torch.outer(self.target_mean, self.mean)
        made.target_scatter = self.target_scatter + self.count * self.target_mean.square()
        return made


class InputGram(Statistic):
    """Second moments of the rows that a layer's weight multiplies; fed with the layer's input.

    Attributes:
        gram: the moments.
    """

    def __init__(self, layer: Layer, batches: int = 1, seed: int = 0) -> None:
        """`batches`: how many updates share the rows that are worth taking."""
        self.gram = Gram()
        self._layer, self._batches, self._seed = layer, batches, seed

    def update(self, tensor: Tensor) -> None:
        """Take the input of the layer for one batch in."""
        layer = self._layer
        columns = tensor.shape[layer.channel_axis(tensor)] * layer.taps
        chosen = pick(layer.input_positions(tensor), columns, self._batches, self._seed)
        self.gram.update(layer.rows_in(tensor, chosen))

    def merge(self, other: "InputGram") -> None:
        """Take in what another one has seen."""
        self.gram.merge(other.gram)


def _wide(rows: Tensor) -> Tensor:
    """At least float32: products of half-precision rows would lose the sum."""
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
