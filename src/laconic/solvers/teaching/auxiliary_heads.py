"""Heads on inner nodes of a graph that give what its output gives, while it trains.

A head brings its node's value to the width and the resolution of the deepest features, pools it
(padded tokens left out), and maps it to the outputs; it is trained beside the network and thrown
away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.core.task import Task
from laconic.program.normalize import base_name
from laconic.program.program import Program
from laconic.solvers.teaching.beside import Beside

_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_ACTIVATIONS = ("relu", "relu6", "gelu", "silu", "hardswish", "hardtanh", "leaky_relu", "elu",
                "mish", "tanh", "sigmoid", "prelu")  # fmt: skip

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """Heads that were put on a graph.

    Attributes:
        nodes: what they stand on.
        taps: nodes of their outputs, then of their pooled features, then of the deepest features.
        notes: why there are none, or fewer.
    """

    nodes: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def heads_on(
    program: Program, made: Beside, task: Task, number: int, nodes: Sequence[str] | None
) -> Heads:
    """Put `number` heads, evenly spaced, on a program, or one on each of `nodes`.

    Raises:
        RecipeError: a node that does not exist, or whose value cannot be pooled to the output.
    """
    program.propagate()
    wanted = _wanted(program, task)
    known = _candidates(program, wanted)
    if nodes is not None:
        every = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
        for name in nodes:
            if name not in every:
                raise RecipeError(f"no node {name!r}", where="nodes", hint=nearest(name, every))
            if not _pools(every[name], wanted):
                raise RecipeError(
                    f"{name} gives {list(every[name].meta['shape'])}, which cannot be pooled to "
                    f"outputs {list(wanted)}",
                    where="nodes",
                )
        chosen = [every[name] for name in nodes]
    else:
        count = min(number, max(0, len(known) - 1))
        places = [(i + 1) * len(known) // (count + 1) - 1 for i in range(count)]
        chosen = [known[place] for place in places]
    notes: tuple[str, ...] = ()
    if nodes is None and len(chosen) < number:
        notes = (
            f"{len(chosen)} of {number} heads: {len(known)} ends of blocks or activations can be "
            f"pooled to outputs {list(wanted)}, and the last of them needs none",
        )
    if not chosen:
        return Heads(notes=notes)
    masks = [p for p in program.placeholders if "mask" in p.name and len(p.meta["shape"]) == 2]
    mask = masks[0] if len(masks) == 1 else None
    made_of = _put(made, chosen, known[-1] if known else chosen[-1], wanted, mask)
    return replace(made_of, notes=notes)


def _wanted(program: Program, task: Task) -> Shape:
    """Shape of what the task compares, on the example."""
    copy = program.clone()
    home = next((t.device for _, t in copy.tensors()), torch.device("cpu"))
    with torch.no_grad():
        leaves = copy.run_flat(*(tensor.to(home) for tensor in copy.example))
    return tuple(task.logits(copy.signature.arrange(leaves)).shape)


def _candidates(program: Program, wanted: Shape) -> list[fx.Node]:
    """Ends of blocks, and where there are not two of them activations, that can be pooled."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and _pools(n, wanted)]
    sums = [n for n in nodes if n.target in _SUMS]
    return sums if len(sums) > 1 else [n for n in nodes if base_name(n) in _ACTIVATIONS]


def _pools(node: fx.Node, wanted: Shape) -> bool:
    """Whether a value has something for each sample, and for each position if outputs do."""
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    if not isinstance(shape, tuple) or not isinstance(dtype, torch.dtype):
        return False
    if not dtype.is_floating_point or shape[:1] != wanted[:1] or len(shape) < 2:
        return False
    if len(wanted) == 2:
        return len(shape) <= 5
    return len(wanted) == 3 and len(shape) == 3 and shape[1] == wanted[1]


def _put(
    made: Beside,
    chosen: Sequence[fx.Node],
    deepest: fx.Node,
    wanted: Shape,
    mask: fx.Node | None,
) -> Heads:
    last, width = _pooled(made, deepest, wanted, mask)
    logits: list[str] = []
    points: list[str] = []
    for node in chosen:
        value = _like(made, node, deepest, width)
        pooled, _ = _pooled(made, value, wanted, mask, node)
        points.append(pooled.name)
        logits.append(made.linear(pooled, width, wanted[-1]).name)
    return Heads(tuple(node.name for node in chosen), (*logits, *points, last.name))


def _pooled(
    made: Beside,
    value: fx.Node,
    wanted: Shape,
    mask: fx.Node | None,
    like: fx.Node | None = None,
) -> tuple[fx.Node, int]:
    """`[batch, features]`, or `[batch, tokens, features]` if outputs are by token; the width."""
    shape: Shape = (like or value).meta["shape"]
    width = shape[1] if len(shape) != 3 else shape[2]
    if len(wanted) == 3 or len(shape) == 2:
        return value, width
    if len(shape) == 3 and mask is not None and tuple(mask.meta["shape"]) == shape[:2]:
        return made.mean_of_tokens(value, mask), width
    dims = [1] if len(shape) == 3 else list(range(2, len(shape)))
    return made.mean(value, dims), width


def _like(made: Beside, node: fx.Node, deepest: fx.Node, width: int) -> fx.Node:
    """The node's value at the deepest one's width, of images at its resolution too."""
    shape: Shape = node.meta["shape"]
    value, channels = node, shape[1] if len(shape) != 3 else shape[2]
    target: Shape = deepest.meta["shape"]
    if len(shape) == 4 and len(target) == 4:
        size = shape[2]
        while size > target[2]:
            wider = min(2 * channels, width) if channels < width else width
            value = made.halved(value, channels, wider)
            channels, size = wider, (size + 1) // 2
    if len(shape) in (2, 3):
        return made.relu(made.linear(value, channels, width))
    return made.relu(made.pointwise(value, channels, width, len(shape)))
