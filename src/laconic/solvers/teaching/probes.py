"""How much every place of a network knows of a task: a linear probe per node, in one pass.

A value is pooled to one row a sample (its mean over positions, padded tokens left out) and a linear
map to the targets is fitted by ridge regression from streamed moments, the ridge chosen by the data
(Alain & Bengio, "Understanding intermediate layers using linear classifier probes",
arXiv 1610.01644). One pass over the training data fits all probes, one over the validation data
scores them, cut points and costs side by side.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from laconic.core.errors import DataError, RecipeError
from laconic.core.progress import SILENT, Progress
from laconic.core.suggest import nearest
from laconic.core.task import Task, to_device
from laconic.program.cost import cost
from laconic.program.equations import operator_name
from laconic.program.program import Program
from laconic.solvers import least_squares
from laconic.solvers.least_squares import Fit
from laconic.statistics.batches import check_inputs, count, flat_inputs, padding_mask
from laconic.statistics.gram import Gram
from laconic.statistics.walk import Order, Walk
from laconic.training.evaluation import labelled
from laconic.training.feed import Feed, forked

MOST = 4096
"""Widest row that is probed: its second moments are the square of that."""
_FIRST = ("conv", "pool", "batch_norm", "group_norm", "instance_norm")
_LAST = ("linear", "addmm", "layer_norm", "rms_norm", "embedding")


@dataclass(frozen=True)
class Spot:
    """A node at which a network could be cut.

    Attributes:
        node: its name.
        origin: module path it came from.
        axis: the dimension of features; the mean is taken over all others but the first.
        width: how many features.
        macs: share of the program's multiply-adds that it takes to get there.
    """

    node: str
    origin: str
    axis: int
    width: int
    macs: float


@dataclass(frozen=True)
class Answer:
    """What is to be said about a sample.

    Attributes:
        task: has the metric.
        program: says how outputs nest.
        shape: of the answer of one sample.
    """

    task: Task
    program: Program
    shape: tuple[int, ...]

    def wanted(self, targets: Any, rows: int, where: str) -> Tensor:
        """Targets as rows to regress on, `[rows, values]`: classes one-hot, numbers as they are.

        Raises:
            DataError: no targets, or targets that are neither.
        """
        size = prod(self.shape)
        if targets is None:
            raise DataError(
                "the batch has no labels",
                where=where,
                hint="a head is fitted to labels; without them take transfer.weights or distill.*",
            )
        if isinstance(targets, Tensor) and not targets.is_floating_point():
            if targets.shape == (rows,) and rows and int(targets.min()) >= 0:
                if int(targets.max()) < size:
                    return F.one_hot(targets.long(), size).float()
                raise DataError(
                    f"label {int(targets.max())} in a task of {size} classes", where=where,
                    hint="give classes",
                )  # fmt: skip
        elif isinstance(targets, Tensor) and targets.numel() == rows * size:
            return targets.reshape(rows, size)
        found = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise DataError(
            f"targets {found} are neither one class a sample nor {list(self.shape)} numbers",
            where=where,
        )

    def scores(self, answers: Tensor, targets: Any) -> Tensor:
        """The task's metric, one number a sample, of answers `[rows, values]`."""
        given = answers.reshape(len(answers), *self.shape).float()
        outputs = self.program.signature.arrange([given])
        return self.task.metric(outputs, to_device(targets, given.device))


@dataclass(frozen=True)
class Probe:
    """A fitted probe: where, the map, and its mean score on validation data (the metric's)."""

    spot: Spot
    fit: Fit
    score: float


def spots(program: Program) -> list[Spot]:
    """Every node that can be cut at, in graph order; shapes have to be propagated.

    Of nodes that cost the same to reach the last one is taken.
    """
    site, found = _Site(program), dict[float, Spot]()
    for node in site.axes:
        if site.reason(node) is None:
            spot = site.spot(node)
            found.pop(spot.macs, None)
            found[spot.macs] = spot
    return list(found.values())


def spot_at(program: Program, name: str) -> Spot:
    """The node `name` as a place to cut.

    Raises:
        RecipeError: there is none (names the nearest), or its value cannot be pooled (says why).
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
    if name not in nodes:
        raise RecipeError(f"no node {name!r}", where="node", hint=nearest(name, nodes))
    site = _Site(program)
    why = site.reason(nodes[name])
    if why is not None:
        raise RecipeError(
            f"the output of {name} cannot be pooled to one row a sample: {why}",
            where="node",
            hint=nearest(name, [spot.node for spot in spots(program)]),
        )
    return site.spot(nodes[name])


def pooled(value: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """`[batch, features]`: the mean over all other dimensions, of real tokens where a mask fits."""
    over = [dim for dim in range(1, value.ndim) if dim != axis]
    if not over:
        return value
    if mask is not None and value.ndim == 3 and over == [1] and mask.shape == value.shape[:2]:
        weight = mask.to(value.dtype).unsqueeze(-1)
        return (value * weight).sum(1) / weight.sum(1).clamp(min=1)
    return value.mean(over)


@torch.no_grad()
def probe(
    program: Program,
    places: Sequence[Spot],
    answer: Answer,
    *,
    samples: int,
    seed: int,
    device: torch.device,
    progress: Progress = SILENT,
) -> list[Probe]:
    """Fit and score a probe at every place.

    Args:
        program: in eval mode, on `device`.
        places: where.
        answer: what is asked for; the training data are fitted, the validation data (without
            labels the training data again) scored.
        samples: at most so many of either.
        seed: of the order of the training data.
        device: where the program runs.
        progress: moved on by samples.

    Raises:
        DataError: data that are missing, unlabelled, or do not fit.
    """
    task, halves = answer.task, {spot: (Gram(), Gram()) for spot in places}
    held = (samples, device, progress)
    train = _some(task, "train", seed)
    for where, rows, targets in _rows(program, places, task, train, *held):
        wanted = answer.wanted(targets, len(rows[places[0]]), where)
        middle = len(wanted) // 2
        for spot, (first, second) in halves.items():
            row, aim = rows[spot], wanted.to(rows[spot])
            first.update(row[:middle], aim[:middle])
            second.update(row[middle:], aim[middle:])
    size = prod(answer.shape)
    fits = {
        spot: least_squares.refit(half, torch.zeros(size, spot.width, dtype=torch.float64))
        for spot, half in halves.items()
    }
    totals, seen = dict.fromkeys(places, 0.0), 0
    judged = _some(task, "validation", seed)
    for _, rows, targets in _rows(program, places, task, judged, *held):
        for spot, fit in fits.items():
            given = rows[spot].double() @ fit.weight.T.to(device) + fit.bias.to(device)
            totals[spot] += float(answer.scores(given, targets).double().sum())
        seen += len(rows[places[0]])
    return [Probe(spot, fits[spot], totals[spot] / max(seen, 1)) for spot in places]


def cheapest(
    probes: Sequence[Probe], tolerance: float, macs: float | None, higher_is_better: bool
) -> Probe:
    """The probe to take: the cheapest whose score is within `tolerance` of the best affordable one.

    Raises:
        RecipeError: no node is within the share `macs`; says which is the cheapest.
    """
    afford = [one for one in probes if macs is None or one.spot.macs <= macs]
    if not afford:
        least = min(probes, key=lambda one: one.spot.macs)
        raise RecipeError(
            f"no node is reached with {macs:.3g} of the multiply-adds",
            where="macs",
            hint=f"{least.spot.node} takes {least.spot.macs:.3g}",
        )
    sign = 1.0 if higher_is_better else -1.0
    best = max(sign * one.score for one in afford)
    near = [one for one in afford if sign * one.score >= best - tolerance]
    return min(near, key=lambda one: one.spot.macs)


def _some(task: Task, split: str, seed: int) -> Iterator[tuple[str, Any]]:
    """One pass over a split; training data in the order of a seed."""
    if split == "validation" and task.validation is not None and labelled(task):
        for number, batch in enumerate(task.validation):
            yield f"validation batch {number}", batch
        return
    with forked():
        feed = Feed(task.batches("train"), seed)
        for number in range(feed.batches_per_epoch()):
            yield f"training batch {number}", feed.take()


def _rows(
    program: Program,
    places: Sequence[Spot],
    task: Task,
    batches: Iterator[tuple[str, Any]],
    samples: int,
    device: torch.device,
    progress: Progress,
) -> Iterator[tuple[str, Mapping[Spot, Tensor], Any]]:
    """For every batch its pooled values and its targets, until there were enough samples."""
    order = Order(program)
    named = {node.name: node for node in order.nodes}
    nodes = {named[spot.node]: spot for spot in places}
    end = max(order.place[node] for node in nodes) + 1
    seen = 0
    with progress.task("probing", None) as bar:
        for where, batch in batches:
            inputs, targets = task.split(batch)
            flat = flat_inputs(program, inputs, where)
            check_inputs(program, flat, where)
            mask = padding_mask(program, flat)
            found: dict[Spot, Tensor] = {}

            def keep(node: fx.Node, value: Any) -> Any:
                if node in nodes:
                    spot = nodes[node]
                    found[spot] = pooled(value, spot.axis, mask)  # noqa: B023 - used at once
                return value

            Walk(program, [t.to(device) for t in flat], order).run(end, keep)
            yield where, found, targets
            seen += count(program, flat)
            bar.advance(count(program, flat))
            if seen >= samples:
                return


class _Site:
    """A program as a place to cut: axes of features, costs, and what depends on an input."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.axes: dict[fx.Node, int | None] = {}
        self._reach = _reach(program)
        self._fed: set[fx.Node] = set(program.placeholders)
        for node in program.graph.nodes:
            if any(source in self._fed for source in node.all_input_nodes):
                self._fed.add(node)
            if node.op == "call_function" and isinstance(node.meta.get("dtype"), torch.dtype):
                self.axes[node] = _axis(node, self.axes)

    def spot(self, node: fx.Node) -> Spot:
        axis = self.axes[node]
        assert axis is not None
        origin, width = str(node.meta.get("origin", "")), int(node.meta["shape"][axis])
        return Spot(node.name, origin, axis, width, self._reach[node])

    def reason(self, node: fx.Node) -> str | None:
        """Why the value of a node cannot be pooled; None if it can."""
        shape: Any = node.meta.get("shape")
        dtype = node.meta.get("dtype")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            return "it is not one float tensor"
        if len(shape) < 2 or shape[0] != self.program.batch_size() or node not in self._fed:
            return f"its shape {list(shape)} does not begin with the batch"
        axis = self.axes[node]
        if axis is None:
            return f"which dimension of {list(shape)} holds the features is not known"
        if shape[axis] > MOST:
            return f"it has {shape[axis]} features, more than {MOST}"
        if node in self.program.output_node.all_input_nodes:
            return "it is the output itself"
        return None


def _reach(program: Program) -> dict[fx.Node, float]:
    """Share of the multiply-adds that each node's value needs."""
    prices = {row.node: row.macs for row in cost(program).rows}
    total = max(sum(prices.values()), 1)
    behind: dict[fx.Node, frozenset[fx.Node]] = {}
    reach: dict[fx.Node, float] = {}
    for node in program.graph.nodes:
        own = frozenset({node} if prices.get(node.name) else ())
        behind[node] = own.union(*(behind[source] for source in node.all_input_nodes))
        reach[node] = sum(prices[one.name] for one in behind[node]) / total
    return reach


def _axis(node: fx.Node, known: Mapping[fx.Node, int | None]) -> int | None:
    """The dimension of features of an operator's value, where it is known."""
    shape, name = node.meta["shape"], operator_name(node).removeprefix("aten.")
    if any(part in name for part in _FIRST):
        return 1
    if name in _LAST:
        return len(shape) - 1
    same = [known.get(s) for s in node.all_input_nodes if s.meta.get("shape") == shape]
    axis = next((one for one in same if one is not None), None)
    if axis is not None and name not in ("permute", "transpose"):
        return axis
    return 1 if len(shape) == 2 else None
