"""Batch norm statistics measured anew on calibration data, front to back.

After pruning or quantisation the inputs of a batch norm have other means and variances than those
stored in it. Measuring them again needs no gradients and repairs a large part of the damage
(Sun et al. 2019 "Hybrid 8-bit", Li et al. 2020 "EagleEye"). Statistics are those of all samples
together, each layer measured behind layers already corrected: what one training-mode pass over one
single huge batch would give.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from laconic.core.progress import SILENT, Progress
from laconic.program.equations import arguments, operator_name
from laconic.program.program import Program
from laconic.statistics.convoy import Convoy
from laconic.statistics.moments import Moments


@dataclass(frozen=True)
class Norm:
    """A batch norm with running statistics; names of its tensors, None where it has none."""

    node: fx.Node
    source: fx.Node
    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float
    shared: bool = False

    def affine(self, program: Program) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel in eval mode, float64 `[channels]`."""
        variance = program.tensor(self.variance).detach().double()
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * program.tensor(self.weight).detach().double()
        shift = -program.tensor(self.mean).detach().double() * scale
        if self.bias is not None:
            shift = shift + program.tensor(self.bias).detach().double()
        return scale, shift

    def measure(self, program: Program, mean: Tensor, variance: Tensor) -> None:
        """Store new statistics `[channels]`, in place of the old tensors."""
        for name, value in ((self.mean, mean), (self.variance, variance)):
            program.set_tensor(name, value.to(program.tensor(name)))

    def express(
        self, program: Program, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor
    ) -> None:
        """Be `scale * x + shift` in eval mode, with statistics that are true of the input.

        Needs a weight and a bias of its own; all arguments float64 `[channels]`.
        """
        assert self.weight is not None and self.bias is not None
        self.measure(program, mean, variance)
        deviation = (program.tensor(self.variance).double() + self.eps).sqrt()
        stored = program.tensor(self.mean).double()
        for name, value in ((self.weight, scale * deviation), (self.bias, shift + scale * stored)):
            program.set_tensor(name, value.to(program.tensor(name)))


def norms(program: Program) -> list[Norm]:
    """Every batch norm that has running statistics, in graph order."""
    found = [norm for node in program.graph.nodes if (norm := _norm(program, node))]
    uses: dict[str, int] = {}
    for norm in found:
        uses[norm.mean] = uses.get(norm.mean, 0) + 1
    return [norm if uses[norm.mean] == 1 else replace(norm, shared=True) for norm in found]


@torch.no_grad()
def recalibrate(
    program: Program,
    batches: Iterable[Sequence[Tensor]],
    progress: Progress = SILENT,
) -> list[str]:
    """Measure all batch norm statistics anew, in place.

    Args:
        program: in eval mode; its running statistics are replaced (not written into: tensors that
            a clone shares stay as they are).
        batches: flat inputs; all of them are under way at once (`convoy.affordable` says how many
            samples that may be).
        progress: moved on by one for each norm.

    Returns:
        Names of the running means that were replaced.
    """
    convoy, done = Convoy(program, batches), []
    for norm in progress.track(norms(program), "batch norm statistics"):
        convoy.before(norm.node)
        if not norm.shared:
            remeasure(program, norm, convoy)
            done.append(norm.mean)
    return done


def remeasure(program: Program, norm: Norm, convoy: Convoy) -> None:
    """Measure one batch norm; the convoy stands just before it."""
    moments = Moments(axis=1)
    for walk in convoy:
        moments.update(walk.values[norm.source])
    old = program.tensor(norm.variance).double()
    dead = moments.variance <= 0  # a constant channel says nothing about its spread
    norm.measure(program, moments.mean, torch.where(dead, old, moments.variance))


def _norm(program: Program, node: fx.Node) -> Norm | None:
    if node.op != "call_function" or operator_name(node) != "aten.batch_norm":
        return None
    a = arguments(node)
    names: list[str | None] = []
    for slot in ("weight", "bias", "running_mean", "running_var"):
        held = a[slot]
        if held is None:
            names.append(None)
            continue
        if not isinstance(held, fx.Node) or held.op != "get_attr":
            return None
        names.append(program.aliases.get(str(held.target), str(held.target)))
    weight, bias, mean, variance = names
    if mean is None or variance is None or not isinstance(a["input"], fx.Node):
        return None
    return Norm(node, a["input"], weight, bias, mean, variance, float(a["eps"]))
