"""Second-order pruning of a whole network: each layer behind those already pruned.

Plain layers go through `compensate`: refitted against the network before, pruned by what the refit
and its moments say, batch norm rewritten. Grouped convolutions and weights that several layers read
have no single refit; they are pruned before from the moments of their own inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.solvers.channels.compensate import compensate
from laconic.solvers.least_squares import Fit
from laconic.solvers.portions import MOMENTS, portions
from laconic.solvers.weights import obs_weights
from laconic.solvers.weights.obs_weights import Rows, Solver, Wanted
from laconic.solvers.weights.weight_masks import Pruning
from laconic.solvers.weights.weight_scores import INPUT_BATCH, Calibration, input_place
from laconic.statistics.base import Statistic, finite
from laconic.statistics.batches import Flat
from laconic.statistics.collect import collect
from laconic.statistics.convoy import affordable
from laconic.statistics.gram import Gram
from laconic.statistics.layers import Layer, pick

RIDGE = 1e-3
"""Damping of the moments of layers without a refit, in units of their mean."""


class GroupGrams(Statistic):
    """Second moments of the inputs of each group of a layer; fed with the layer's input.

    Attributes:
        grams: one for each group; one for a layer without groups.
    """

    def __init__(self, layer: Layer, batches: int = 1, seed: int = 0) -> None:
        """`batches`: how many updates share the rows that are worth taking."""
        self.grams = [Gram() for _ in range(layer.groups)]
        self._layer, self._batches, self._seed = layer, batches, seed

    def update(self, tensor: Tensor) -> None:
        """Take the input of the layer for one batch in."""
        layer = self._layer
        columns = tensor.shape[layer.channel_axis(tensor)] * layer.taps // layer.groups
        chosen = pick(layer.input_positions(tensor), columns, self._batches, self._seed)
        parts = layer.rows_in(finite(tensor), chosen).chunk(layer.groups, 1)
        for gram, part in zip(self.grams, parts, strict=True):
            gram.update(part)

    def merge(self, other: "GroupGrams") -> None:
        """Take in what another one has seen."""
        for gram, more in zip(self.grams, other.grams, strict=True):
            gram.merge(more)


class Surgeon:
    """What prunes the layers of one opened Program."""

    def __init__(
        self,
        work: Pruning,
        data: Calibration,
        readers: Mapping[str, Sequence[Layer]],
        solver: Solver = "auto",
    ) -> None:
        """`readers`: weight → the layers of `work.bare` that read it."""
        self.work, self.readers = work, readers
        self.solver: Solver = solver
        self.data = data
        self.done: set[str] = set()

    @torch.no_grad()
    def prune(self, wanted: Mapping[str, Wanted]) -> Program:
        """Prune as wanted; the program in the state it was opened in.

        Raises:
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        work = self.work
        if not wanted:
            return work.finish()
        batches = self._batches()
        small = work.bare.clone()
        self._prune_apart(small, wanted, batches)
        report = compensate(
            work.bare,
            small,
            {},
            batches,
            consumers_only=True,
            seed=self.data.seed,
            progress=self.data.progress,
            holds={name: partial(self._hold, name, aim) for name, aim in wanted.items()},
        )
        work.notes += [note for note in report.notes if "keeps its weights" not in note]
        for name, aim in wanted.items():
            if name not in self.done:
                self._by_magnitude(small, name, aim)
        self._take_over(small, wanted)
        work.figures["refit_error"] = report.errors
        return work.finish()

    def _batches(self) -> list[Flat]:
        bare, data = self.work.bare, self.data
        room = affordable(bare, walks=2)
        if room < data.samples:
            self.work.notes.append(f"calibration was held to {room} samples: no more fit")
        return list(replace(data, samples=min(room, data.samples)).batches(bare, INPUT_BATCH))

    def _hold(self, name: str, aim: Wanted, fit: Fit, gram: Gram, bias: bool, scale: Tensor) -> Fit:
        """The sparse part of a refit: its weights on the columns that stay, and its bias."""
        seen = gram if bias else gram.raw()
        importance = scale.square().expand(len(fit.weight)).to(fit.weight)
        moments = obs_weights.damped(seen.covariance, fit.ridge)
        self.done.add(name)
        weight = self._solve(self.readers[name][0], name, aim, fit.weight, moments, importance)
        return obs_weights.refitted(fit, gram, bias, weight)

    def _solve(
        self,
        layer: Layer,
        name: str,
        aim: Wanted,
        weight: Tensor,
        moments: Tensor,
        importance: Tensor,
    ) -> Tensor:
        held = self._held(layer, name)
        order = columns_for(layer, weight.shape[1], aim.m)
        rows = Rows(weight[:, order], moments[order][:, order], importance, held[:, order])
        solved = obs_weights.prune(rows, aim, self.solver)
        return solved[:, order.argsort()]

    def _held(self, layer: Layer, name: str) -> Tensor:
        """The zeros of a weight that is sparse already."""
        weight = layer.matrix(self.work.bare.tensor(name).detach())
        return (weight == 0) if name in self.work.bare.sparse else torch.zeros_like(weight).bool()

    def _prune_apart(
        self, small: Program, wanted: Mapping[str, Wanted], batches: Sequence[Flat]
    ) -> None:
        """Grouped convolutions and shared weights, from the moments of their own inputs."""
        apart = [n for n in wanted if len(self.readers[n]) > 1 or self._is_odd(self.readers[n][0])]

        def needed(name: str) -> int:
            layers, columns = self.readers[name], _columns(self.work.bare, self.readers[name][0])
            return 8 * sum(layer.groups * columns**2 for layer in layers)

        for some in portions(apart, needed, MOMENTS):
            self._prune_portion(small, some, wanted, batches)

    def _prune_portion(
        self,
        small: Program,
        apart: Sequence[str],
        wanted: Mapping[str, Wanted],
        batches: Sequence[Flat],
    ) -> None:
        """Weights whose moments fit into memory together."""
        held = {
            layer.node.name: GroupGrams(layer, len(batches), self.data.seed)
            for name in apart
            for layer in self.readers[name]
        }
        requests = {
            layer.node.name: (layer.node.name, input_place(layer), held[layer.node.name])
            for name in apart
            for layer in self.readers[name]
        }
        collect(self.work.bare, batches, requests, self.data.progress, total=len(batches))
        for name in apart:
            first, *others = self.readers[name]
            merged = held[first.node.name]
            if any(other.in_dim != first.in_dim for other in others):
                continue  # read transposed as well: no one set of columns, so by magnitude
            for other in others:
                merged.merge(held[other.node.name])
            self._solve_groups(small, first, wanted[name], merged)

    @staticmethod
    def _is_odd(layer: Layer) -> bool:
        return layer.groups != 1 or layer.shared

    def _solve_groups(self, small: Program, layer: Layer, aim: Wanted, moments: GroupGrams) -> None:
        old = small.tensor(layer.weight).detach()
        matrix = layer.matrix(old).double()
        if not any(float(gram.raw().scatter.diagonal().sum()) > 0 for gram in moments.grams):
            return
        score = torch.cat([
            part.square() * gram.raw().covariance.diagonal()
            for part, gram in zip(matrix.chunk(layer.groups), moments.grams, strict=True)
        ])  # fmt: skip
        held = self._held(layer, layer.weight)
        order = columns_for(layer, matrix.shape[1], aim.m)
        keep = aim.keep(score[:, order], held[:, order])[:, order.argsort()]
        solved: list[Tensor] = []
        for part, stays, gram in zip(
            matrix.chunk(layer.groups), keep.chunk(layer.groups), moments.grams, strict=True
        ):
            damped = obs_weights.damped(gram.raw().covariance, RIDGE)
            solved.append(obs_weights.onto(Rows(part, damped, torch.ones_like(part[:, 0]), ~stays)))
        small.set_tensor(layer.weight, layer.weight_from(torch.cat(solved), old))
        self.done.add(layer.weight)

    def _by_magnitude(self, small: Program, name: str, aim: Wanted) -> None:
        """What neither a refit nor its own moments could prune."""
        layer = self.readers[name][0]
        old = small.tensor(name).detach()
        matrix = layer.matrix(old)
        order = columns_for(layer, matrix.shape[1], aim.m)
        held = self._held(layer, name)
        keep = aim.keep(matrix.abs()[:, order], held[:, order])[:, order.argsort()]
        small.set_tensor(name, layer.weight_from(matrix.masked_fill(~keep, 0.0), old))
        self.work.notes.append(
            f"{name}: pruned by magnitude, its inputs do not vary or it is read transposed as well"
        )

    def _take_over(self, small: Program, wanted: Mapping[str, Wanted]) -> None:
        """What changed in the bare program, in the one that was opened."""
        work = self.work
        for name, tensor in small.tensors():
            if tensor is not work.bare.tensor(name) and tensor.is_floating_point():
                work.program.set_tensor(name, tensor.detach())
        work.program.sparse |= set(wanted)


def _columns(program: Program, layer: Layer) -> int:
    return layer.matrix(program.tensor(layer.weight)).shape[1]


def columns_for(layer: Layer, columns: int, m: int) -> Tensor:
    """The order in which a pattern of every `m` runs over the columns, int64.

    A convolution's pattern runs over input channels at each place of the kernel, which is how
    hardware reads it; a rest that fills no pattern comes last.
    """
    if not m:
        return torch.arange(columns)
    channels = columns // layer.taps
    order = torch.arange(columns).reshape(channels, layer.taps).T
    whole = channels // m * m
    return torch.cat([order[:, :whole].flatten(), order[:, whole:].flatten()])
