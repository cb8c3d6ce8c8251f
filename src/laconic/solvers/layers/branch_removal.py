"""Take residual branches out of a graph; what stays, or a linear map, can be fitted to make up."""

import math
from collections.abc import Sequence
from dataclasses import replace as with_changes
from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.core.progress import SILENT, Progress
from laconic.program import surgery
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.solvers import least_squares
from laconic.solvers.channels import compensate
from laconic.solvers.channels.compensate import Report
from laconic.solvers.layers import depth, residual
from laconic.solvers.layers.residual import Branch
from laconic.solvers.least_squares import Fit
from laconic.statistics.gram import Gram
from laconic.statistics.layers import layers
from laconic.statistics.walk import Order, Walk

_ROWS = 16_384  # of one batch; more make no fit of one layer's width better
_CONVOLUTIONS: dict[int, Any] = {
    1: torch.ops.aten.conv1d.default,
    2: torch.ops.aten.conv2d.default,
}


def remove(program: Program, dropped: Sequence[Branch], *, checked: bool = True) -> None:
    """Let the stream go past these branches, in place; later branches of the list are followed.

    Without `checked` the shapes noted in the graph are not worked out anew.
    """
    for branch in dropped:
        stream: Any = branch.total.args[branch.place]  # an earlier one may have replaced it
        branch.total.replace_all_uses_with(stream)
    surgery.remove_dead(program)
    if checked:
        program.propagate()
    program.recompile()


def twins(program: Program, copy: Program, unit: Sequence[Branch]) -> list[Branch]:
    """The same branches in a clone of the program."""
    there = dict(zip(program.graph.nodes, copy.graph.nodes, strict=True))
    return [
        with_changes(
            branch,
            total=there[branch.total],
            stream=there[branch.stream],
            end=there[branch.end],
            inner=tuple(there[node] for node in branch.inner),
        )
        for branch in unit
    ]


@torch.no_grad()
def compensated(
    program: Program,
    dropped: Sequence[Branch],
    batches: Sequence[Sequence[Tensor]],
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Report:
    """Take branches out, in place, and refit those that stay to give what they all gave together.

    The sum that stands before a branch that leaves is to equal the sum behind it, so a norm or an
    activation between the two leaves as well; later sums of the stream make up for what is left.
    Where no layer can do that for the sum before (a stem that is a pooling), the stream goes past.

    Args:
        program: to change.
        dropped: its branches, in graph order.
        batches: flat calibration inputs, all under way at once in both programs.
        seed: of the choice of positions that serve as rows.
        progress: moved on by one for each layer.
    """
    dense, able = program.clone(), compensate.steerable(program)
    goals: dict[fx.Node, fx.Node] = {}
    for chain in depth.chains(program):
        before = stands = depth.entry(chain[0])
        moved = False
        for branch in (branch for layer in chain for branch in layer.branches):
            free = stands in able
            if branch in dropped:
                free, moved = free and _alone(branch, before), True
            else:
                stands, free = branch.total, branch.total in able
            if moved and free:
                goals[stands] = branch.total
            before = branch.total
    past = {goal: stands for stands, goal in goals.items()}
    for branch in dropped:
        stream: Any = past.get(branch.total, branch.total.args[branch.place])
        branch.total.replace_all_uses_with(stream)
    surgery.remove_dead(program)
    program.propagate()
    program.recompile()
    wanted = {stands.name: goal.name for stands, goal in goals.items()}
    return compensate.towards(dense, program, wanted, batches, seed=seed, progress=progress)


def _alone(branch: Branch, before: fx.Node) -> bool:
    """Whether nothing but this branch and its sum reads the stream, from the sum before on."""
    node, readers = branch.stream, {*branch.inner, branch.total}
    while all(user in readers or residual.is_size(user) for user in node.users):
        if node is before:
            return True
        readers = {node}
        node = next(source for source in node.all_input_nodes if source.op != "get_attr")
    return False


@torch.no_grad()
def replace(
    program: Program,
    dropped: Sequence[Branch],
    batches: Sequence[Sequence[Tensor]],
    notes: list[str],
    progress: Progress = SILENT,
) -> dict[str, float]:
    """Put a linear map of the stream in the place of each branch, in place, front to back.

    The map is fitted to what the sum was before anything was dropped, less the stream as it is by
    then, so that each repairs the drift of those before it. A branch that is cheaper than a map
    is dropped without one.

    Args:
        program: to change.
        dropped: its branches, in graph order.
        batches: flat calibration inputs.
        notes: sentences are added about what was not fitted, or on few samples.
        progress: moved on by one for each branch.

    Returns:
        branch → squared error of the fit relative to what it had to give.
    """
    dense = program.clone()
    wanted = {one.name: one for one in twins(program, dense, dropped)}
    prices = {row.node: row.macs for row in cost(program).rows}
    errors: dict[str, float] = {}
    for branch in progress.track(dropped, "fitting linear maps", len(dropped)):
        stream: Any = branch.total.args[branch.place]
        space, channels = _axes(program, branch, stream)
        shape = stream.meta["shape"]
        price = math.prod(shape) * channels // program.batch_size()
        if price >= sum(prices.get(node.name, 0) for node in branch.inner):
            notes.append(f"{branch.name}: cheaper than a linear map of {channels} channels, none "
                         "takes its place")  # fmt: skip
            branch.total.replace_all_uses_with(stream)
            continue
        fit, error, rows = _fit(program, stream, dense, wanted[branch.name].total, batches, space)
        if rows <= channels:
            notes.append(f"{branch.name}: {rows} calibration rows for {channels} channels, fitted "
                         "only as far as they reach; more samples would help")  # fmt: skip
        if fit is None:
            notes.append(f"{branch.name}: calibration data give it a constant stream, or one too "
                         "large to be multiplied, none takes its place")  # fmt: skip
            branch.total.replace_all_uses_with(stream)
            continue
        _insert(program, branch, stream, fit, space)
        errors[branch.name] = error
        program.recompile()
    surgery.remove_dead(program)
    program.propagate()
    program.recompile()
    return errors


def _axes(program: Program, branch: Branch, stream: fx.Node) -> tuple[int, int]:
    """Spatial dimensions behind the channels of a stream, and how many channels it has."""
    spaces = [layer.space for layer in layers(program) if layer.node in branch.inner]
    shape = stream.meta["shape"]
    space = max(spaces or [0])
    space = space if space and len(shape) == space + 2 else 0
    return space, int(shape[len(shape) - 1 - space])


def _fit(
    program: Program,
    stream: fx.Node,
    dense: Program,
    total: fx.Node,
    batches: Sequence[Sequence[Tensor]],
    space: int,
) -> tuple[Fit | None, float, int]:
    """The linear map, its relative squared error, and how many rows it was fitted on."""
    halves = (Gram(), Gram())
    here, there = Order(program), Order(dense)
    for batch in batches:
        behind, ahead = Walk(program, batch, here), Walk(dense, batch, there)
        behind.run(here.place[stream] + 1, hold=[stream])
        ahead.run(there.place[total] + 1, hold=[total])
        x, goal = (_rows(v, space) for v in (behind.values[stream], ahead.values[total]))
        step = max(1, -(-len(x) // _ROWS))
        x, goal = x[::step], (goal - x)[::step]
        middle = len(x) // 2
        halves[0].update(x[:middle], goal[:middle])
        halves[1].update(x[middle:], goal[middle:])
    whole = Gram()
    whole.merge(halves[0])
    whole.merge(halves[1])
    finite = bool(torch.isfinite(whole.scatter).all() & torch.isfinite(whole.cross).all())
    if not finite or float(whole.scatter.diagonal().sum()) <= 0.0:
        return None, 1.0, whole.count
    channels = len(whole.mean)
    fit = least_squares.refit(halves, whole.scatter.new_zeros(channels, channels))
    spread = float(whole.target_scatter.sum()) / whole.count
    return fit, float(fit.error.sum()) / max(spread, 1e-30), whole.count


def _rows(value: Tensor, space: int) -> Tensor:
    return value.movedim(value.ndim - 1 - space, -1).flatten(0, -2)


def _insert(program: Program, branch: Branch, stream: fx.Node, fit: Fit, space: int) -> None:
    """`stream + W stream + b` in place of the sum."""
    like = next(
        (program.tensor(n) for n in branch.tensors if program.tensor(n).is_floating_point()), None
    )
    dtype = stream.meta["dtype"]
    weight = fit.weight.to(dtype).reshape(*fit.weight.shape, *[1] * space).contiguous()
    trains = like is None or like.requires_grad
    nodes: list[Any] = []
    with program.graph.inserting_before(branch.total):
        for leaf, tensor in (("weight", weight), ("bias", fit.bias.to(dtype))):
            name = program.add_tensor(
                f"{branch.name.replace('~', '_')}.linear.{leaf}",
                nn.Parameter(tensor, requires_grad=trains),
            )
            nodes.append(program.graph.get_attr(name))
            nodes[-1].meta = {"origin": branch.name, "shape": tuple(tensor.shape), "dtype": dtype}
        target = _CONVOLUTIONS[space] if space else torch.ops.aten.linear.default
        made = program.graph.call_function(target, (stream, *nodes))
    made.meta = {**branch.total.meta}
    branch.total.update_arg(1 - branch.place, made)
