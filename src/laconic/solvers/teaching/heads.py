"""A network cut at a node, with a new head on what is known there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from laconic.core.errors import DataError
from laconic.core.task import Task, to_device
from laconic.program import surgery
from laconic.program.program import Program
from laconic.solvers.least_squares import Fit
from laconic.solvers.teaching.probes import Spot
from laconic.statistics.batches import check_inputs, count, flat_inputs
from laconic.training.job import Forward, Loss
from laconic.training.precision import in_float32, laid_out, wants_channels_last

_aten: Any = torch.ops.aten
_SCALES = tuple(2.0**power for power in range(8))


@dataclass(frozen=True)
class Head:
    """A head that stands in a program: names of its tensors, layer by layer.

    Attributes:
        layers: (weight, bias) of each linear layer; rectifiers stand between.
        shape: of the answer of one sample.
    """

    layers: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]

    def __call__(self, program: Program, features: Tensor) -> Tensor:
        """The answers `[batch, *shape]` to features `[batch, width]`."""
        value = features
        for number, (weight, bias) in enumerate(self.layers):
            value = F.linear(
                value.relu() if number else value, program.tensor(weight), program.tensor(bias)
            )
        return value.reshape(-1, *self.shape)


def cut_at(program: Program, spot: Spot) -> Program:
    """A copy that gives the pooled value of a node and nothing else; what is dead is gone."""
    made = program.clone()
    named = {node.name: node for node in made.graph.nodes}
    with made.graph.inserting_before(made.output_node):
        value = _pool(made, named[spot.node], spot.axis)
    made.output_node.args = ((value,),)
    surgery.remove_dead(made)
    made.propagate()
    made.recompile()
    return made


def crowned(body: Program, weights: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, ...]) \
        -> tuple[Program, Head]:  # fmt: skip
    """A copy of a cut program with linear layers behind it; `weights`: (weight, bias) of each."""
    made = body.clone()
    (value,) = made.output_node.all_input_nodes
    names: list[tuple[str, str]] = []
    with made.graph.inserting_before(made.output_node):
        for number, (weight, bias) in enumerate(weights):
            held = f"head.{number}" if len(weights) > 1 else "head"
            pair = [made.add_tensor(f"{held}.{leaf}", nn.Parameter(tensor.contiguous()))
                    for leaf, tensor in (("weight", weight), ("bias", bias))]  # fmt: skip
            if number:
                value = _call(made, _aten.relu.default, (value,))
            stored = [made.graph.get_attr(name) for name in pair]
            value = _call(made, _aten.linear.default, (value, *stored))
            names.append((pair[0], pair[1]))
        if len(shape) > 1:
            value = _call(made, _aten.reshape.default, (value, [-1, *shape]))
    made.output_node.args = ((value,),)
    made.propagate()
    made.recompile()
    return made, Head(tuple(names), shape)


def closed(fit: Fit, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The one layer that a probe found."""
    return [(fit.weight.to(like), fit.bias.to(like))]


def drawn(
    width: int, hidden: int, size: int, like: Tensor, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Two layers to be trained: weights as He et al. (2015) draw them, the last ones small."""
    found: list[tuple[Tensor, Tensor]] = []
    for rows, columns, gain in ((hidden, width, 2.0), (size, hidden, 0.01)):
        noise = torch.randn(rows, columns, generator=generator) * (gain / columns) ** 0.5
        found.append((noise.to(like), torch.zeros(rows).to(like)))
    return found


@dataclass(frozen=True)
class Supervised:
    """The task's own loss on labels.

    Attributes:
        task: says what a batch is, and the loss.
        program: the Program in training.
        head: with `body`, what is trained, on features that `body` gives in eval mode.
        body: the part that is frozen; None trains all.
        device: where training runs.
    """

    task: Task
    program: Program
    device: torch.device
    head: Head
    body: Program | None = None

    def __call__(self, forward: Forward, batch: Any, number: int) -> Loss:
        """The loss of batch `number`.

        Raises:
            DataError: inputs that do not fit or are not finite, or no labels.
        """
        where = f"training batch {number}"
        inputs, targets = self.task.split(batch)
        if targets is None:
            raise DataError("the batch has no labels", where=where)
        flat = flat_inputs(self.program, inputs, where)
        check_inputs(self.program, flat, where)
        samples = count(self.program, flat)
        flat = laid_out(flat, self.device, wants_channels_last(self.program))
        if self.body is None:
            given = forward(*flat)
        else:
            with torch.no_grad():
                (features,) = in_float32(self.body.run_flat(*flat))
            given = (self.head(self.program, features),)
        outputs = self.program.signature.arrange(in_float32(given))
        return Loss(self.task.loss(outputs, to_device(targets, self.device)), samples)


@torch.no_grad()
def scaled(program: Program, head: Head, loss: Callable[[], float]) -> float:
    """Scale the last layer so that `loss` is least, in place; the power of two that was best.

    Least squares on one-hot targets gives the right order of classes and far too little certainty.
    """
    weight, bias = (program.tensor(name) for name in head.layers[-1])
    first = weight.clone(), bias.clone()
    found: dict[float, float] = {}
    for scale in _SCALES:
        _put(weight, bias, first, scale)
        found[scale] = loss()
    best = min(found, key=found.__getitem__)
    _put(weight, bias, first, best)
    return best


def _put(weight: Tensor, bias: Tensor, first: tuple[Tensor, Tensor], scale: float) -> None:
    weight.copy_(first[0] * scale)
    bias.copy_(first[1] * scale)


def answers(program: Program, classes: int | None) -> tuple[int, ...]:
    """The shape of one sample's answer: the program's output, or one number a class."""
    (node,) = program.output_node.all_input_nodes
    return tuple(int(size) for size in node.meta["shape"][1:]) if classes is None else (classes,)


def _pool(program: Program, node: fx.Node, axis: int) -> fx.Node:
    """The graph of `probes.pooled`."""
    shape = node.meta["shape"]
    over = [dim for dim in range(1, len(shape)) if dim != axis]
    if not over:
        return node
    masks = [p for p in program.placeholders if "mask" in p.name and len(p.meta["shape"]) == 2]
    fits = len(masks) == 1 and len(shape) == 3 and over == [1]
    if not fits or tuple(masks[0].meta["shape"]) != tuple(shape[:2]):
        return _call(program, _aten.mean.dim, (node, over))
    real = _call(program, _aten.to.dtype, (masks[0], node.meta["dtype"]))
    weight = _call(program, _aten.unsqueeze.default, (real, -1))
    weighted = _call(program, _aten.mul.Tensor, (node, weight))
    total = _call(program, _aten.sum.dim_IntList, (weighted, [1]))
    counted = _call(program, _aten.sum.dim_IntList, (weight, [1]))
    safe = _call(program, _aten.clamp.default, (counted, 1))
    return _call(program, _aten.div.Tensor, (total, safe))


def _call(program: Program, target: Any, args: tuple[Any, ...]) -> fx.Node:
    made = program.graph.call_function(target, args)
    made.meta = {"origin": "head"}
    return made
