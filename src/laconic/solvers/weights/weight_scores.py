"""What single weights are worth: scores of the weights' own shape, higher stays.

| score | of a weight w | needs |
|---|---|---|
| `l1`, `l2` | its magnitude, or its square | nothing |
| `taylor` | mean of abs(gradient x w): first order (Molchanov et al. 2019) | gradients |
| `fisher` | w^2 x E[gradient^2] / 2: the loss it costs, in nats (Theis et al. 2018) | gradients |
| `wanda` | abs(w) x norm of the inputs it meets (Sun et al. 2023) | inputs |

Gradients are those of targets drawn from the model's own prediction (`statistics.gradients`), so no
labels are needed. Such gradients have mean zero, hence the squared gradient of a batch is in
expectation the sum of the squared gradients of its samples: small batches give the Fisher
information without a gradient for each sample.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from laconic.core.errors import DataError
from laconic.core.progress import SILENT, Progress
from laconic.core.task import Task
from laconic.program.program import Program
from laconic.solvers.setting import Setting
from laconic.solvers.weights.weight_masks import Pruning
from laconic.statistics.base import Statistic, finite
from laconic.statistics.batches import Batches, Flat, count
from laconic.statistics.collect import collect
from laconic.statistics.gradients import Loss, sampled_loss
from laconic.statistics.layers import Layer, pick

Kind = Literal["l1", "l2", "taylor", "fisher", "wanda"]
GRADIENT_BATCH = 16
"""Samples a backward pass: fewer estimate the Fisher information better and cost more."""
INPUT_BATCH = 64
"""Samples a forward pass."""


@dataclass(frozen=True)
class Calibration:
    """Where scores that look at data get them from.

    Attributes:
        task: its calibration data, else its training data.
        samples: so many at most.
        seed: of targets drawn from the model's prediction and of rows chosen from its activations.
        device: where the program is.
        progress: moved on by one for each batch.
        temperature: the predictions' logits are divided by it before drawing and scoring.
    """

    task: Task
    samples: int
    seed: int
    device: torch.device
    progress: Progress = SILENT
    temperature: float = 4.0

    def batches(self, program: Program, size: int) -> Batches:
        """Flat inputs of `program`, at most `size` samples at once."""
        return Batches(program, self.task, self.samples, self.device, size)

    def loss(self) -> Loss:
        """Of a target drawn from the model's own prediction."""
        generator = torch.Generator().manual_seed(self.seed)
        return sampled_loss(self.task, generator, self.temperature)


class Sampled(BaseModel):
    """Options of a method whose scores look at data, unlabelled.

    Attributes:
        samples: calibration samples at most.
        temperature: the predictions' logits are divided by it before targets are drawn from them.
    """

    samples: int = Field(default=1024, ge=1)
    temperature: float = Field(default=4.0, gt=0)

    def calibration(self, context: Setting) -> Calibration:
        """These options in a method's context."""
        return Calibration(
            context.task, self.samples, context.seed, context.device, context.progress,
            self.temperature,
        )  # fmt: skip


def scored(kind: Kind, work: Pruning, data: Calibration) -> dict[str, Tensor]:
    """The scores of `work.names`; weights that cannot be scored are noted and leave the names.

    Raises:
        DataError: calibration data that are missing, do not fit, or are not finite.
    """
    if kind == "l1" or kind == "l2" or not work.names:
        return magnitudes(work.weights(), "l1" if kind == "l1" else "l2")
    if kind == "wanda":
        readers = work.layers()
        batches = list(data.batches(work.bare, INPUT_BATCH)) if readers else []
        if not readers:
            return {}
        return wanda(work.bare, readers, batches, data.seed, data.progress, work.notes)
    batches = data.batches(work.bare, GRADIENT_BATCH)
    found = from_gradients(work.bare, work.names, batches, data.loss(), kind, data.progress)
    work.notes += [
        f"{name}: its gradients are all zero, the data say that none of it matters"
        for name, score in found.items() if not bool(score.any())
    ]  # fmt: skip
    return found


def magnitudes(
    weights: Mapping[str, Tensor], norm: Literal["l1", "l2"], *, relative: bool = False
) -> dict[str, Tensor]:
    """abs(w) for l1, w^2 for l2; `relative` divides by the mean of the tensor."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        score = weight.float().abs() if norm == "l1" else weight.float().square()
        mean = float(score.mean()) if score.numel() else 0.0
        found[name] = score / mean if relative and mean > 0 else score
    return found


def from_gradients(
    program: Program,
    names: Sequence[str],
    batches: Iterable[Flat],
    loss: Loss,
    kind: Literal["taylor", "fisher"],
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Taylor or Fisher scores, one backward pass for each batch.

    Args:
        program: in eval mode; left as it is.
        names: the weights.
        batches: flat inputs, `GRADIENT_BATCH` samples or fewer each.
        loss: of the outputs, summed over samples.
        kind: which of the two.
        progress: moved on by one for each batch.

    Raises:
        DataError: no batch came, or a gradient is not finite.
    """
    work = program.clone()
    for _, tensor in work.tensors():
        tensor.requires_grad_(False)
    leaves = {name: work.tensor(name).requires_grad_(True) for name in names}
    sums = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
    samples = 0
    for batch in progress.track(batches, f"{kind} scores"):
        samples += count(work, batch)
        with torch.enable_grad():
            loss(work.signature.arrange(work.run_flat(*batch))).backward()
        for name, leaf in leaves.items():
            sums[name] += _contribution(name, leaf, kind)
            leaf.grad = None
    if not samples:
        raise DataError("there was no batch to score weights with", where="calibration")
    if kind == "taylor":
        return {name: total / samples for name, total in sums.items()}
    return {
        name: total * leaves[name].detach().float().square() / (2 * samples)
        for name, total in sums.items()
    }


def _contribution(name: str, leaf: Tensor, kind: str) -> Tensor:
    if leaf.grad is None:
        return torch.zeros_like(leaf, dtype=torch.float32)
    try:
        gradient = finite(leaf.grad).float()
    except DataError as error:
        raise DataError(f"its gradient: {error.message}", where=name) from None
    return (gradient * leaf.detach().float()).abs() if kind == "taylor" else gradient.square()


class InputNorms(Statistic):
    """Mean squares of the columns that a layer's weight multiplies; fed with the layer's input.

    Attributes:
        count: rows seen.
        squares: float64 `[columns]` over all groups: sums of squares.
    """

    def __init__(self, layer: Layer, batches: int = 1, seed: int = 0) -> None:
        """`batches`: how many updates share the rows that are worth taking."""
        self.count = 0
        self.squares = torch.zeros(0, dtype=torch.float64)
        self._layer, self._batches, self._seed = layer, batches, seed

    def update(self, tensor: Tensor) -> None:
        """Take the input of the layer for one batch in."""
        layer = self._layer
        columns = tensor.shape[layer.channel_axis(tensor)] * layer.taps
        chosen = pick(layer.input_positions(tensor), columns, self._batches, self._seed)
        rows = layer.rows_in(finite(tensor), chosen)
        if len(rows):
            squares = rows.double().square().sum(0)
            self.squares = squares if not self.count else self.squares + squares
            self.count += len(rows)

    def merge(self, other: "InputNorms") -> None:
        """Take in what another one has seen."""
        if other.count:
            self.squares = other.squares if not self.count else self.squares + other.squares
            self.count += other.count

    def spread(self, weight: Tensor) -> Tensor:
        """Mean squares in the shape of the weight, float64."""
        layer = self._layer
        matrix = layer.matrix(weight)
        columns = (self.squares / max(self.count, 1)).reshape(layer.groups, 1, matrix.shape[1])
        rows = columns.expand(layer.groups, len(matrix) // layer.groups, matrix.shape[1])
        return layer.weight_from(rows.reshape(matrix.shape), rows)


def input_squares(
    program: Program,
    readers: Mapping[str, Sequence[Layer]],
    batches: Sequence[Flat],
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Weight → mean square of the inputs that each of its weights meets, in all its readers.

    Raises:
        DataError: there are no calibration data, or they are not finite.
    """
    held = {
        layer.node.name: InputNorms(layer, len(batches), seed)
        for several in readers.values()
        for layer in several
    }
    requests = {
        layer.node.name: (layer.node.name, input_place(layer), held[layer.node.name])
        for several in readers.values()
        for layer in several
    }
    collect(program, batches, requests, progress, total=len(batches))
    found: dict[str, Tensor] = {}
    for name, several in readers.items():
        weight = program.tensor(name).detach()
        found[name] = torch.stack([held[r.node.name].spread(weight) for r in several]).sum(0)
    return found


def input_place(layer: Layer) -> str:
    """Which argument of the layer's node is its input, as `collect` names it."""
    return f"input {layer.node.args.index(layer.source)}"


def wanda(
    program: Program,
    readers: Mapping[str, Sequence[Layer]],
    batches: Sequence[Flat],
    seed: int = 0,
    progress: Progress = SILENT,
    notes: list[str] | None = None,
) -> dict[str, Tensor]:
    """Weight → abs(w) times the root mean square of its inputs.

    A layer that saw nothing but zeros is scored by magnitude, and noted.

    Raises:
        DataError: there are no calibration data, or they are not finite.
    """
    squares = input_squares(program, readers, batches, seed, progress)
    found: dict[str, Tensor] = {}
    for name, mean in squares.items():
        weight = program.tensor(name).detach().float()
        if float(mean.sum()) <= 0.0:
            if notes is not None:
                notes.append(f"{name}: its inputs are all zero, scored by magnitude")
            mean = torch.ones_like(mean)
        found[name] = weight.abs() * mean.sqrt().float()
    return found
