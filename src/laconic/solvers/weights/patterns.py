"""N:M patterns over weights of any shape: of every M neighbouring inputs of an output, N stay."""

from collections.abc import Mapping

import torch
from torch import Tensor

from laconic.solvers.weights.obs_layers import columns_for
from laconic.solvers.weights.obs_weights import Wanted
from laconic.solvers.weights.weight_masks import Keep, Pruning
from laconic.statistics.layers import Layer


def room(layer: Layer, weight: Tensor, m: int) -> int:
    """How many of a weight's columns fill patterns of `m`; 0 where it has fewer inputs."""
    columns = layer.matrix(weight).shape[1]
    return columns // layer.taps // m * m * layer.taps


def kept(layer: Layer, score: Tensor, aim: Wanted) -> Tensor:
    """The weights that stay by their score, which has the weight's shape; bool.

    A convolution's pattern runs over input channels at each place of the kernel.
    """
    rows = layer.matrix(score)
    order = columns_for(layer, rows.shape[1], aim.m)
    keep = aim.keep(rows[:, order], torch.zeros_like(rows, dtype=torch.bool))
    return layer.weight_from(keep[:, order.argsort()], keep)


class Patterns:
    """N of every M for the weights of a Program that have room for it.

    Attributes:
        m: neighbours that share a pattern.
    """

    def __init__(self, work: Pruning, m: int) -> None:
        """Find the layers of `work.names`; weights without room leave the names and are noted."""
        self.m = m
        self._layers: dict[str, Layer] = {}
        self._widths: dict[str, int] = {}
        for name, (layer, *_) in work.layers().items():
            width = room(layer, work.bare.tensor(name), m)
            if width:
                self._layers[name], self._widths[name] = layer, width
            else:
                work.notes.append(f"{name}: stays, fewer than {m} inputs an output")
        work.names = list(self._layers)

    def kept(self, scores: Mapping[str, Tensor], n: int) -> Keep:
        """Which weights stay, when `n` of every `m` do."""
        return {
            name: kept(self._layers[name], score, Wanted(n=n, m=self.m, width=self._widths[name]))
            for name, score in scores.items()
        }
