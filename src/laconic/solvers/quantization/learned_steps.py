"""Steps of grids that train: where they begin, what scales their gradients, how they end.

Learned steps (LSQ, Esser et al., arXiv 1902.08153): the step of a grid is a parameter whose
gradient is that of `laconic.fake_quantize`, scaled by `1 / sqrt(n qmax)` with n the values that
share it. Learned clipping (PACT, Choi et al., arXiv 1805.06085): only values beyond the upper end
of the grid move it. The end is `alpha = step * qmax`, so the step's gradient is that of alpha times
`qmax`; scaled by `1 / qmax^2` the step moves as alpha would.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from laconic.program.program import FAKE_QUANTIZE, Program
from laconic.solvers.quantization import insertion, ranges
from laconic.solvers.quantization.placement import Place
from laconic.solvers.quantization.ranges import Grid
from laconic.solvers.quantization.weight_sites import WeightSite
from laconic.statistics.histogram import Histogram

Initial = Literal["lsq", "mse"]
Clipping = Literal["lsq", "pact"]
Ends = tuple[int, int]
_SHARES = 40  # tried steps of a weight, from its largest value down to a tenth of it
_CLAMP = torch.ops.aten.clamp.Tensor
_DETACH = torch.ops.aten.detach.default
_TIMES = torch.ops.aten.mul.Scalar


@dataclass(frozen=True, kw_only=True)
class LearnedStep:
    """A quantisation node whose step trains.

    Attributes:
        node: its name in the graph.
        scale: name of the tensor of steps.
        weight: name of the master weight; None for an activation.
        gradient: the factor of the gradient of the step, for each stage.
        ends: lowest and highest code, for each stage.
        factors: of an activation: what its step is multiplied by when a stage begins.
        clipping: which gradient it has.
    """

    node: str
    scale: str
    weight: str | None
    gradient: tuple[float, ...]
    ends: tuple[Ends, ...]
    factors: tuple[float, ...] = ()
    clipping: Clipping = "lsq"


# grids ------------------------------------------------------------------------------------


def weight_ends(bits: int, *, ternary: bool = False) -> Ends:
    """Codes of a weight: all that the bits give; at 8 without -128, as integer kernels want.

    >>> weight_ends(8), weight_ends(2), weight_ends(2, ternary=True)
    ((-127, 127), (-2, 1), (-1, 1))
    """
    half = 2 ** (bits - 1)
    lowest = 1 - half if bits >= 8 or ternary else -half
    return lowest, half - 1


def weight_grid(weight: Tensor, axis: int | None, ends: Ends, initial: Initial) -> Grid:
    """The grid a weight begins with: one step for each index of `axis`, or one (None).

    "lsq": `2 mean |w| / sqrt(qmax)`; "mse": the least squared error. A slice of zeros takes the
    largest step of the others.
    """
    low, high = ends
    rows = weight.detach().float()
    rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).flatten(1)
    if initial == "lsq":
        step = 2 * rows.abs().mean(1) / math.sqrt(high)
    else:
        step = _least_error(rows, low, high)
    largest = step.max() if bool(step.max() > 0) else torch.ones((), device=step.device)
    step = torch.where(step > 0, step, largest).clamp(min=torch.finfo(torch.float32).tiny)
    step = step.reshape(() if axis is None else (-1,))
    return Grid(step, torch.zeros_like(step, dtype=torch.int32), low, high)


def _least_error(rows: Tensor, low: int, high: int) -> Tensor:
    widest = rows.abs().amax(1) / high
    best, found = torch.full_like(widest, torch.inf), widest.clone()
    for power in range(_SHARES):
        step = widest * 0.1 ** (power / (_SHARES - 1))
        side = step.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        off = torch.round(rows / side).clamp_(low, high).mul_(side).sub_(rows)
        error = off.square_().sum(1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, step, found)
    return found


def activation_grid(histogram: Histogram, bits: int, initial: Initial) -> Grid:
    """The grid an activation begins with: one step, unsigned where nothing is negative."""
    low, high = ranges.choose(histogram, "mse", symmetric=True, bits=bits)
    made = ranges.grid(low, high, symmetric=True, bits=bits)
    if initial == "mse":
        return made
    magnitude = (histogram.centres.abs() * histogram.counts).sum() / max(histogram.total, 1)
    step = float(2 * magnitude) / math.sqrt(made.qmax)
    tiny = float(torch.finfo(torch.float32).tiny)
    return Grid(made.scale.new_tensor(max(step, tiny)), made.zero_point, made.qmin, made.qmax)


# nodes ------------------------------------------------------------------------------------


def insert_weight(
    program: Program, site: WeightSite, axis: int | None, stages: Sequence[Ends], initial: Initial
) -> LearnedStep:
    """Put a weight on the grid of the first stage, with steps that train."""
    weight = program.tensor(site.name)
    grid = weight_grid(weight, axis, stages[0], initial)
    node = insertion.quantize_weight(program, site, axis, grid)
    return adopted(program, node, stages)


def insert_activation(
    program: Program, place: Place, grids: Sequence[Grid], clipping: Clipping
) -> LearnedStep:
    """Put an activation on the first of its grids, with a step that trains.

    "pact" needs a grid from 0 upwards; others learn as "lsq" does.
    """
    node = insertion.quantize_activation(program, place, grids[0])
    if clipping == "pact" and grids[0].qmin == 0:
        _clip(program, node)
    else:
        clipping = "lsq"
    scales = [float(grid.scale) for grid in grids]
    ends = [(grid.qmin, grid.qmax) for grid in grids]
    factors = [new / old for old, new in zip([scales[0], *scales], scales, strict=False)]
    return adopted(program, node, ends, tuple(factors), clipping)


def adopted(
    program: Program,
    node: fx.Node,
    stages: Sequence[Ends] | None = None,
    factors: tuple[float, ...] = (),
    clipping: Clipping = "lsq",
) -> LearnedStep:
    """Let the step of a quantisation node train; without `stages` its grid stays as it is."""
    source: Any = node.args[0]
    name = scale_name(node)
    held = program.tensor(name)
    program.set_tensor(name, nn.Parameter(held.detach().clone()))
    ends = tuple(stages) if stages else ((int(node.args[4]), int(node.args[5])),)  # type: ignore[arg-type]
    stored = isinstance(source, fx.Node) and source.op == "get_attr"
    if stored:
        sharing = program.tensor(str(source.target)).numel() / held.numel()
    else:
        sharing = math.prod(source.meta["shape"]) / program.batch_size() / held.numel()
    gradient = [1 / math.sqrt(sharing * max(high, 1)) for _, high in ends]
    if clipping == "pact":
        gradient = [1 / high**2 for _, high in ends]
    return LearnedStep(
        node=node.name,
        scale=name,
        weight=str(source.target) if stored else None,
        gradient=tuple(gradient),
        ends=ends,
        factors=factors,
        clipping=clipping,
    )


def scale_name(node: fx.Node) -> str:
    """Name of the stored steps of a quantisation node, also of one that is clipped before."""
    side: Any = node.args[1]
    return str(side.args[0].target if side.target is _DETACH else side.target)


def learnable(node: fx.Node) -> bool:
    """Whether a node quantises with stored steps."""
    return node.target is FAKE_QUANTIZE and all(
        isinstance(side, fx.Node) and side.op == "get_attr" for side in node.args[1:3]
    )


def set_ends(node: fx.Node, ends: Ends) -> None:
    """Give a quantisation node other lowest and highest codes; recompile afterwards."""
    low, high = ends
    source: Any = node.args[0]
    if source.target is _CLAMP and source.args[2].target is _TIMES:
        source.args[2].update_arg(1, high)
        high += 1
    node.args = (*node.args[:4], low, high)


def _clip(program: Program, node: fx.Node) -> None:
    """Clip in front of a node, so that its step learns from what is clipped alone.

    What is clipped stands on the uppermost code, up to rounding: one more code is allowed, so that
    the gradient passes there.
    """
    source: Any = node.args[0]
    scale: Any = node.args[1]
    high: Any = node.args[5]
    graph = program.graph
    with graph.inserting_before(node):
        end = graph.call_function(_TIMES, (scale, high))
        clipped = graph.call_function(_CLAMP, (source, None, end))
        fixed = graph.call_function(_DETACH, (scale,))
    for made, like in ((end, scale), (clipped, source), (fixed, scale)):
        made.meta = dict(like.meta)
    node.args = (clipped, fixed, *node.args[2:5], high + 1)


def settle(program: Program, steps: Sequence[LearnedStep]) -> None:
    """Steps become buffers again and clipping leaves the graph: same values, bit for bit."""
    nodes = {node.name: node for node in program.graph.nodes}
    for step in steps:
        node = nodes[step.node]
        clipped: Any = node.args[0]
        if step.clipping == "pact":
            side: Any = node.args[1]
            high: Any = node.args[5]
            node.args = (clipped.args[0], side.args[0], *node.args[2:5], high - 1)
        as_buffer(program, step.scale)
    program.graph.eliminate_dead_code()
    program.recompile()


def as_buffer(program: Program, name: str) -> None:
    """Let a parameter be a buffer of the same name."""
    path, _, leaf = name.rpartition(".")
    owner = program.get_submodule(path)
    value = program.tensor(name).detach()
    delattr(owner, leaf)
    owner.register_buffer(leaf, value)
