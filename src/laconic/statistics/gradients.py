"""A backward pass over calibration data: how the model's own prediction depends on its activations.

No labels are needed. The loss is the negative log-likelihood of a label drawn from the model's own
prediction, whose expected squared gradient is the Fisher information, the curvature of the
KL divergence to the original (Amari 1998); for outputs that are not a distribution, a unit Gaussian
around the output takes its place, which gives the curvature of the squared error relative to the
outputs' mean square.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from laconic.core.errors import DataError
from laconic.core.task import Task
from laconic.program.program import Program
from laconic.statistics.walk import Order, Walk

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """What one batch tells about some nodes.

    Attributes:
        samples: how many samples the batch had.
        inputs: node → its first tensor argument, with the gradient that came through this node.
        outputs: node → its output, with its gradient.
    """

    samples: int
    inputs: dict[fx.Node, tuple[Tensor, Tensor]]
    outputs: dict[fx.Node, tuple[Tensor, Tensor]]


def sampled_loss(task: Task, generator: torch.Generator, temperature: float = 1.0) -> Loss:
    """Loss of a target drawn from the model's own prediction, summed over samples.

    A network that has seen the calibration data is almost sure of every answer, and gradients of a
    sure answer are noise; logits divided by a `temperature` above 1 bring the rest back in.

    Raises:
        DataError: the outputs are not finite.
    """
    distribution = task.binary or task.name in ("classification", "language modelling")

    def loss(outputs: Any) -> Tensor:
        logits = task.logits(outputs).float()
        if not bool(torch.isfinite(logits).all()):
            raise DataError("the model gives NaN or infinite outputs", where="calibration")
        if distribution and logits.ndim > 1 and logits.shape[-1] > 1:
            rows = logits.flatten(0, -2) / temperature
            chances = rows.detach().softmax(-1).cpu()
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
            return F.cross_entropy(rows, drawn.to(rows.device), reduction="sum")
        noise = torch.randn(logits.shape, generator=generator).to(logits.device)
        scale = logits.detach().square().mean().sqrt().clamp(min=1e-12)
        return (logits * noise).sum() / scale

    return loss


def sensitivities(
    program: Program,
    batches: Iterable[Sequence[Tensor]],
    nodes: Sequence[fx.Node],
    loss: Loss,
    samples: Callable[[Sequence[Tensor]], int],
) -> Iterator[Sensitivity]:
    """One backward pass per batch; gradients at the first input and the output of `nodes`.

    The gradient of an input is the part that flows through the node in question, whoever else
    reads the same value. Parameters get no gradients.
    """
    work = program.clone()
    order, watched = Order(work), set(nodes)
    pairs = zip(program.graph.nodes, work.graph.nodes, strict=True)
    twin = {new: old for old, new in pairs if old in watched}
    for _, tensor in work.tensors():
        tensor.requires_grad_(False)
    for batch in batches:
        yield _one_batch(work, order, batch, twin, loss, samples(batch))


def _one_batch(
    work: Program,
    order: Order,
    batch: Sequence[Tensor],
    twin: dict[fx.Node, fx.Node],
    loss: Loss,
    samples: int,
) -> Sensitivity:
    inputs: dict[fx.Node, Tensor] = {}
    outputs: dict[fx.Node, Tensor] = {}

    def tracked(value: Tensor) -> Tensor:
        held = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        held.retain_grad()
        return held

    def enter(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        place = next((i for i, a in enumerate(args) if _watchable(node, i, a)), None)
        if node not in twin or place is None:
            return args
        inputs[node] = tracked(args[place])
        return (*args[:place], inputs[node], *args[place + 1 :])

    def visit(node: fx.Node, value: Any) -> Any:
        if node in twin and isinstance(value, Tensor):
            value.retain_grad()
            outputs[node] = value
        return value

    with torch.enable_grad():
        walk = Walk(work, batch, order, enter=enter)
        walk.run(len(order.nodes), visit, hold=[work.output_node])
        result = walk.values[work.output_node]
        loss(work.signature.arrange(result)).backward()
    return Sensitivity(samples, _with_gradients(inputs, twin), _with_gradients(outputs, twin))


def _watchable(node: fx.Node, place: int, value: Any) -> bool:
    source = node.args[place]
    stored = isinstance(source, fx.Node) and source.op == "get_attr"
    return isinstance(value, Tensor) and value.is_floating_point() and not stored


def _with_gradients(
    values: dict[fx.Node, Tensor], twin: dict[fx.Node, fx.Node]
) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    found: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    for node, value in values.items():
        gradient = value.grad if value.grad is not None else torch.zeros_like(value)
        found[twin[node]] = (value.detach(), gradient)
    return found
