"""How much each single weight matters: the diagonal of the curvature, from calibration data.

`input_squares` is the Hessian of a layer's own squared output error, `E[x^2]` of the input that a
weight multiplies (as in Hassibi & Stork 1993; Choi et al. 2017, arXiv 1612.01543, weight clusters
by it). `fisher` is the mean squared gradient of a weight over samples, with targets drawn from the
model's own prediction: the curvature of the loss itself.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from laconic.core.progress import SILENT, Progress
from laconic.program.program import Program
from laconic.solvers.setting import Setting
from laconic.statistics.base import Statistic, finite
from laconic.statistics.batches import Batches, count
from laconic.statistics.collect import collect
from laconic.statistics.gradients import Loss, sampled_loss, sensitivities
from laconic.statistics.layers import Layer, layers, pick

_BATCH = 32
_ELEMENTS = 1 << 24  # of the weight gradients that are held at once


class Weighted(BaseModel):
    """Options of a method that finds the closest values to a weight: what an error counts.

    Attributes:
        weighted: what a squared error counts: "none" all alike, "hessian" the mean square of the
            input that the weight multiplies, "fisher" the mean squared gradient of the weight.
        samples: calibration samples, for `weighted`.
        temperature: the predictions' logits are divided by it before `fisher` samples from them.
    """

    weighted: Literal["none", "hessian", "fisher"] = "none"
    samples: int = Field(default=256, ge=1)
    temperature: float = Field(default=4.0, gt=0)

    def counted(
        self, program: Program, names: Sequence[str], context: Setting
    ) -> dict[str, Tensor]:
        """Weight → what an error of each element counts, of its shape; {} where all count alike.

        Weights of which the data say nothing are left out, or all zero.

        Raises:
            DataError: calibration data that are missing or do not fit.
        """
        if self.weighted == "none" or not names:
            return {}
        held = program.clone().to(context.device)
        batches = Batches(held, context.task, self.samples, context.device, _BATCH)
        if self.weighted == "hessian":
            return input_squares(held, names, batches, context.progress)
        loss = sampled_loss(context.task, context.generator(), self.temperature)
        return fisher(held, names, batches, loss, context.progress)


class ColumnSquares(Statistic):
    """Mean square of every column that a layer's weight multiplies; fed with the layer's input.

    Attributes:
        rows: rows seen.
        total: float64 `[columns]`, sum of squares.
    """

    def __init__(self, layer: Layer, seed: int = 0) -> None:
        self.rows = 0
        self.total = torch.zeros((), dtype=torch.float64)
        self._layer, self._seed = layer, seed

    def update(self, tensor: Tensor) -> None:
        """Take the input of the layer for one batch in."""
        layer = self._layer
        columns = tensor.shape[layer.channel_axis(tensor)] * layer.taps
        chosen = pick(layer.input_positions(tensor), columns, 1, self._seed)
        rows = layer.rows_in(finite(tensor), chosen)
        self.total = self.total + rows.double().square().sum(0).cpu()
        self.rows += len(rows)

    def merge(self, other: "ColumnSquares") -> None:
        """Take in what another one has seen."""
        self.total, self.rows = self.total + other.total, self.rows + other.rows

    @property
    def mean(self) -> Tensor:
        """float64 `[columns]`."""
        return self.total / max(self.rows, 1)


def input_squares(
    program: Program,
    names: Sequence[str],
    batches: Iterable[Sequence[Tensor]],
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Weight → float64 of its shape; weights without a linear map from their input are left out."""
    found = [layer for layer in layers(program) if layer.weight in set(names)]
    requests = {layer.node.name: (layer.node.name, "input 0", ColumnSquares(layer))
                for layer in found}  # fmt: skip
    if requests:
        collect(program, batches, requests, progress)
    made: dict[str, Tensor] = {}
    for layer in found:
        weight = program.tensor(layer.weight)
        squares = requests[layer.node.name][2].mean.reshape(layer.groups, 1, -1)
        outputs = layer.matrix(weight).shape[0] // layer.groups
        _add(made, layer, weight, squares.expand(-1, outputs, -1).flatten(0, 1))
    return made


def fisher(
    program: Program,
    names: Sequence[str],
    batches: Iterable[Sequence[Tensor]],
    loss: Loss,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Weight → float64 of its shape: the squared gradient, mean over samples.

    Of a weight that several operators read, the squares are added, not the gradients.
    """
    found = [layer for layer in layers(program) if layer.weight in set(names)]
    held = progress.track(batches, "gradients of the weights", None)
    total: dict[str, Tensor] = {}
    seen = 0
    nodes = [layer.node for layer in found]
    for sensed in sensitivities(program, held, nodes, loss, lambda b: count(program, tuple(b))):
        seen += sensed.samples
        for layer in found:
            if layer.node in sensed.inputs:
                x, grad = sensed.inputs[layer.node][0], sensed.outputs[layer.node][1]
                squares = _squared_gradients(layer, x, grad, sensed.samples)
                _add(total, layer, program.tensor(layer.weight), squares)
    return {name: tensor / max(seen, 1) for name, tensor in total.items()}


def _squared_gradients(layer: Layer, x: Tensor, grad: Tensor, samples: int) -> Tensor:
    """float64 `[out, columns]`, the squared gradient of each weight, summed over samples."""
    rows = layer.rows_in(x, None)
    rows = rows.reshape(samples, -1, layer.groups, rows.shape[-1] // layer.groups)
    back = layer.rows_out(grad, None)
    back = back.reshape(samples, -1, layer.groups, back.shape[-1] // layer.groups)
    step = max(1, _ELEMENTS // (rows.shape[-1] * back.shape[-1] * layer.groups))
    total = torch.zeros((), dtype=torch.float64)
    for inside, outside in zip(rows.split(step), back.split(step), strict=True):
        each = torch.einsum("spgo,spgc->sgoc", outside, inside)
        total = total + each.square().sum(0).double().cpu()
    return total.flatten(0, 1)


def _add(into: dict[str, Tensor], layer: Layer, weight: Tensor, matrix: Tensor) -> None:
    shaped = layer.weight_from(matrix, torch.empty(0, dtype=torch.float64)).reshape(weight.shape)
    into[layer.weight] = into[layer.weight] + shaped if layer.weight in into else shaped
