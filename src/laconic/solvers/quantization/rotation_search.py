"""Which rotations help a quantised network, and better ones: by what rounding does to its outputs.

The probe is the network with its weights on integer grids that follow the rotated weights, and its
activations on grids over their own range. Rotations are learned by steps on the orthogonal group
(`orthogonal.step`), the gradient going straight through the rounding, on the outputs' error or on
the task's loss: Liu et al. 2024, "SpinQuant" (arXiv 2405.16406).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]

from laconic.core.progress import Progress
from laconic.core.task import Task
from laconic.program.program import Program
from laconic.solvers.quantization import insertion, orthogonal, placement, ranges
from laconic.solvers.quantization.rotatable import Turn
from laconic.solvers.quantization.rotation import Rotations, members, rotated
from laconic.solvers.quantization.weight_sites import WeightSite, weight_sites
from laconic.training import losses

Loss = Callable[[Sequence[Tensor]], Tensor]
"""Flat outputs → what is to be small."""
Batch = tuple[tuple[Tensor, ...], Loss]
"""Flat inputs, and what the outputs for them are judged by."""


def distance(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """How far outputs are from what they should be: (found, wanted) of `task.logits` → a scalar.

    The divergence of distributions, one minus the cosine of embeddings, else the squared error over
    the energy.
    """
    if task.binary or task.name in ("classification", "language modelling"):
        return lambda found, wanted: losses.soft_targets(found, wanted, 1.0)
    return losses.cosine if task.metric_name == "cosine" else losses.relative_error


@dataclass(frozen=True)
class Grids:
    """What the rotated network is going to stand on.

    Attributes:
        bits: of the weights' codes.
        activation_bits: of the activations' codes; None: they stay float.
        first_last: bits of the first and of the last weight; None: like the others.
        weight_range: how weights' ranges are chosen.
    """

    bits: int
    activation_bits: int | None
    first_last: int | None
    weight_range: ranges.Rule


class Probe:
    """A network whose tensors are rotated and rounded anew each time it runs."""

    def __init__(self, program: Program, turns: Mapping[str, Turn], grids: Grids) -> None:
        """`program`: prepared; left as it is."""
        self.turns, self.grids = dict(turns), grids
        self._plain = {name: tensor.detach() for name, tensor in program.tensors()}
        self._places = members(self.turns.values())
        made = program.clone()
        every, _ = weight_sites(made)
        layers = [site for site in every if not site.weight_only]
        self._ends = {layers[0].name, layers[-1].name} if layers else set[str]()
        self._sites = [site for site in layers if site.name in self._places]
        if grids.activation_bits is not None:
            for place in placement.places(made, self._sites, []):
                insertion.insert_dynamic(made, place, grids.activation_bits, False)
        self._scales: dict[str, str] = {}
        for site in self._sites:
            node = insertion.quantize_weight(made, site, site.axis, self._grid(site, made))
            self._scales[site.name] = str(node.all_input_nodes[1].target)
        made.recompile()
        self._flat = _Flat(made)

    def _grid(self, site: WeightSite, program: Program) -> ranges.Grid:
        return self._grid_of(site, program.tensor(site.name))

    def _grid_of(self, site: WeightSite, weight: Tensor) -> ranges.Grid:
        rule, bits = self.grids.weight_range, self.grids.bits
        if site.name in self._ends:
            bits = self.grids.first_last or bits
        return ranges.weight_grid(weight.detach(), site.axis, rule, bits)

    def tensors(self, by: Rotations) -> dict[str, Tensor]:
        """The rotated tensors and the scales of the weights; gradients reach the matrices."""
        made = {
            name: rotated(self._plain[name], places, by).to(self._plain[name].dtype)
            for name, places in self._places.items()
            if any(place[0] in by for place in places)
        }
        for site in self._sites:
            if site.name in made:
                made[self._scales[site.name]] = self._grid_of(site, made[site.name]).scale
        return made

    def run(self, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs with some tensors in place of the stored ones."""
        given = {f"program.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(self._flat, given, tuple(inputs))

    @torch.no_grad()
    def value(self, by: Rotations, batches: Iterable[Batch]) -> float:
        """The mean loss over batches."""
        tensors = self.tensors(by)
        found = [float(loss(self.run(tensors, inputs))) for inputs, loss in batches]
        return sum(found) / max(len(found), 1)


class _Flat(nn.Module):
    """A program as a module of flat inputs."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.program.run_flat(*inputs)


def helpful(
    probe: Probe, by: Rotations, batches: Sequence[Batch], progress: Progress
) -> tuple[dict[str, Tensor], list[float]]:
    """The rotations that lower the loss, one tried after the other on top of those kept.

    Returns:
        Those kept, and the loss without any and with all that are kept.
    """
    kept: dict[str, Tensor] = {}
    first = best = probe.value(kept, batches)
    for name in progress.track(list(by), "trying rotations", len(by)):
        value = probe.value({**kept, name: by[name]}, batches)
        if value < best:
            kept, best = {**kept, name: by[name]}, value
    return kept, [first, best]


def learn(
    probe: Probe,
    by: Rotations,
    batches: Sequence[Batch],
    steps: int,
    angle: float,
    progress: Progress,
) -> tuple[dict[str, Tensor], list[float]]:
    """Rotations after `steps` steps, each on one batch; never worse on all batches than at first.

    Args:
        probe: whose turns the matrices belong to.
        by: where to begin.
        batches: gone through over and over.
        steps: how many; after each pass over the batches the state is judged on all of them.
        angle: radians of the first step along the fastest plane; falls to 0.
        progress: one step a step.

    Returns:
        The best matrices seen, and their loss before and after.
    """
    held = {name: matrix.clone() for name, matrix in by.items()}
    first = best = probe.value(held, batches)
    kept = dict(held)
    speed = {name: torch.zeros_like(matrix) for name, matrix in held.items()}
    for number in progress.track(range(steps), "learning rotations", steps):
        inputs, loss = batches[number % len(batches)]
        leaves = {name: matrix.detach().requires_grad_() for name, matrix in held.items()}
        with torch.enable_grad():
            value = loss(probe.run(probe.tensors(leaves), inputs))
        slopes = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        for (name, matrix), slope in zip(held.items(), slopes, strict=True):
            speed[name] = 0.9 * speed[name] + slope.double()
            turn = angle * (1 - number / steps)
            keep = probe.turns[name].keeps_ones
            held[name] = orthogonal.step(matrix, speed[name], turn, keep_ones=keep)
        if (number + 1) % len(batches) == 0 or number + 1 == steps:
            now = probe.value(held, batches)
            if now < best:
                kept, best = dict(held), now
    return kept, [first, best]
