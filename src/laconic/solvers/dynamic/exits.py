"""Exits: where a network can be left early, and small heads that give its output there.

A place is a value on which everything later depends: what was computed before is needed through it
alone (ends of residual blocks, outputs of layers). A head pools it and maps it to the output's
shape; its width is what a share of the network's multiply-adds allows. Of tokens those are pooled
that the network's padding mask lets through.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.program.surgery import remove_dead
from laconic.solvers.dynamic.token_layers import mask_input
from laconic.solvers.layers.grafting import between, graft

_FIRST = {"conv1d", "conv_transpose1d", "batch_norm", "max_pool1d", "avg_pool1d"}
_LAST = {"linear", "layer_norm", "embedding", "matmul", "bmm", "scaled_dot_product_attention"}
_SMALLEST = 8  # pixels of a side at which a convolutional head stops halving


@dataclass(frozen=True)
class Place:
    """A value at which a network can be left.

    Attributes:
        name: the module path it comes from where that is unambiguous, else the node's name.
        node: name of the node.
        shape: of the value on the example inputs.
        first: whether features are dimension 1; otherwise they are the last one.
        share: of the multiply-adds, what it takes to get there.
        mask: the input that hides padding among the tokens of the value; "" where there is none.
    """

    name: str
    node: str
    shape: tuple[int, ...]
    first: bool
    share: float
    mask: str = ""


def places(program: Program) -> list[Place]:
    """All places of a program whose shapes are known, in order; between 5 % and 95 % of the work.

    Of several with nothing to multiply between them the last one counts.
    """
    work = Work(program)
    found: dict[int, fx.Node] = {}
    for node in _narrow(program, work):
        if not obstacle(program, node) and 0.05 <= work.until(node) / max(work.total, 1) <= 0.95:
            found[work.until(node)] = node
    origins = [str(node.meta.get("origin") or "") for node in found.values()]
    return [
        _place(program, node, macs / work.total, origin if origins.count(origin) == 1 else "")
        for (macs, node), origin in zip(found.items(), origins, strict=True)
    ]


def named(program: Program, names: Sequence[str]) -> list[Place]:
    """The places of given names: nodes, or module paths, whose last value is meant.

    Raises:
        RecipeError: there is none of a name, or its value cannot be pooled.
    """
    work = Work(program)
    values = [node for node in program.graph.nodes if node in work.values]
    found: list[Place] = []
    for name in names:
        same = [node for node in values if node.name == name] or [
            node for node in values if f"{node.meta.get('origin') or ''}.".startswith(f"{name}.")
        ]
        if not same:
            paths = {str(node.meta.get("origin") or "") for node in values} - {""}
            known = sorted(paths | {node.name for node in values})
            raise RecipeError(f"no value {name!r}", where="at", hint=nearest(name, known))
        wrong = obstacle(program, same[-1])
        if wrong:
            raise RecipeError(
                f"an exit needs a value that can be pooled: {wrong}",
                where=f"at {name}",
                hint="take the end of a block or a layer, float of [batch, features, ...]",
            )
        share = work.until(same[-1]) / max(work.total, 1)
        found.append(_place(program, same[-1], share, name))
    return found


def spread(found: Sequence[Place], count: int) -> list[Place]:
    """`count` of the places, evenly spaced by work."""
    left, chosen = list(found), list[Place]()
    for number in range(min(count, len(found))):
        wanted = (number + 1) / (count + 1)
        best = min(left, key=lambda place: abs(place.share - wanted))
        left.remove(best)
        chosen.append(best)
    return sorted(chosen, key=lambda place: place.share)


def obstacle(program: Program, node: fx.Node) -> str | None:
    """Why a value cannot be pooled to one row of features per sample; None if it can."""
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    if not isinstance(dtype, torch.dtype) or not isinstance(shape, tuple):
        return f"{node.name} is no tensor"
    if not dtype.is_floating_point:
        return f"{node.name} is {dtype}, expected float"
    if not 2 <= len(shape) <= 5 or shape[0] != program.batch_size():
        return f"{node.name} is {list(shape)}, expected [batch, features, ...]"
    return None


class Work:
    """Multiply-adds up to any node, and of any."""

    def __init__(self, program: Program) -> None:
        rows = cost(program)
        self.total = rows.macs
        self.macs = {row.node: row.macs for row in rows.rows}
        self.values: set[fx.Node] = set(program.placeholders)
        for node in program.graph.nodes:
            tensor = node.op == "call_function" and node.meta.get("dtype") is not None
            if tensor and any(source in self.values for source in node.all_input_nodes):
                self.values.add(node)

    def until(self, *nodes: fx.Node) -> int:
        """Of everything that `nodes` need."""
        return sum(self.macs.get(node.name, 0) for node in between((), nodes))


def macs_until(program: Program, names: Sequence[str]) -> int:
    """Multiply-adds per sample of everything that the named nodes need."""
    by_name = {node.name: node for node in program.graph.nodes}
    return Work(program).until(*(by_name[name] for name in names))


def _narrow(program: Program, work: Work) -> list[fx.Node]:
    """Values that are alone in being needed later, but for inputs and what is free of work."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    ends = {node: max((order[user] for user in node.users), default=-1) for node in order}
    costly = [n for n in program.graph.nodes if n in work.values and n.op != "placeholder"]
    costly = [node for node in costly if work.until(node)]
    found: list[fx.Node] = []
    for place, node in enumerate(costly):
        if not any(ends[other] > order[node] for other in costly[:place]):
            found.append(node)
    return found


def _place(program: Program, node: fx.Node, share: float, name: str) -> Place:
    shape, first = tuple(node.meta["shape"]), _features_first(node)
    mask = mask_input(program, shape[1]) if len(shape) == 3 and not first else None
    hides = "" if mask is None else mask.name
    return Place(name or node.name, node.name, shape, first, share, hides)


def _features_first(node: fx.Node) -> bool:
    """Of `[batch, a, b]`: whether features are `a` (convolutions) or `b` (tokens)."""
    if len(node.meta["shape"]) != 3:
        return True
    seen: fx.Node | None = node
    while seen is not None:
        name = getattr(seen.target, "__name__", "").split(".")[0]
        if name in _FIRST or name in _LAST:
            return name in _FIRST
        seen = next((n for n in seen.all_input_nodes if n.op != "get_attr"), None)
    return False


# heads --------------------------------------------------------------------------------------


class Head(nn.Module):
    """Pools a value and maps it to `outputs` numbers.

    Images go through stages of `depth` convolutions first, each stage halving the resolution, down
    to 8 pixels; everything else through one hidden layer after pooling. They are as wide as
    `budget` multiply-adds allow; where that is not wider than the output, there is a single linear
    layer. A depth of 0 has that in any case.
    """

    def __init__(self, place: Place, outputs: int, depth: int, budget: float) -> None:
        super().__init__()
        shape, self.masked = place.shape, bool(place.mask)
        self.dims = [1] if not place.first else list(range(2, len(shape)))
        features = shape[1] if place.first else shape[-1]
        self.body: nn.Module = nn.Identity()
        self.hidden: nn.Module = nn.Identity()
        if depth and len(shape) == 4:
            width = _widest(lambda w: _convolution_macs(shape, w, depth), budget, 8 * features)
            if width:
                self.body, features = _convolutions(shape, width, depth), width
        elif depth:
            width = _widest(lambda w: w * (features + outputs), budget, 4 * features)
            if width > outputs:
                self.hidden = nn.Sequential(nn.Linear(features, width), nn.ReLU())
                features = width
        self.out = nn.Linear(features, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, ...]`, and for tokens a mask `[batch, tokens]` → `[batch, outputs]`."""
        x = self.body(x)
        if self.masked and mask is not None:
            real = mask.to(x.dtype).unsqueeze(-1)
            x = (x * real).sum(1) / real.sum(1).clamp(min=1)
        elif self.dims:
            x = x.mean(self.dims)
        return self.out(self.hidden(x))


def _widest(macs: Any, budget: float, most: int) -> int:
    """The largest multiple of 8 up to `most` that keeps within the budget; 0 if none does."""
    fitting = [width for width in range(8, max(most, 8) + 1, 8) if macs(width) <= budget]
    return max(fitting, default=0)


def _halvings(shape: Sequence[int]) -> list[int]:
    """Sides after each convolution of a head: one at the least, down to 8 pixels."""
    sides = [(shape[2] + 1) // 2]
    while sides[-1] > _SMALLEST:
        sides.append((sides[-1] + 1) // 2)
    return sides


def _convolution_macs(shape: Sequence[int], width: int, depth: int) -> float:
    features, total = shape[1], 0.0
    for side in _halvings(shape):
        pixels = 9 * side * side * shape[3] / shape[2]
        total += pixels * width * (features + (depth - 1) * width)
        features = width
    return total


def _convolutions(shape: Sequence[int], width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    features = shape[1]
    for _ in _halvings(shape):
        for number in range(depth):
            stride = 2 if number == 0 else 1
            layers.append(nn.Conv2d(features, width, 3, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            features = width
    return nn.Sequential(*layers)


class _Heads(nn.Module):
    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.exits = nn.ModuleList(heads)

    def forward(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask = values[-1] if len(values) > len(self.exits) else None
        return tuple(head(value, mask) for head, value in zip(self.exits, values, strict=False))


@dataclass(frozen=True)
class Heads:
    """Heads of all exits, apart from the network.

    Attributes:
        program: values of `sources` → `[batch, outputs]` of each exit.
        sources: nodes of the network.
    """

    program: Program
    sources: tuple[str, ...]


def heads(found: Sequence[Place], outputs: int, depth: int, budget: float, seed: int) -> Heads:
    """New heads, which read the values at the places and the padding mask if there is one.

    Args:
        found: the places.
        outputs: numbers per sample.
        depth: of a head, see `Head`.
        budget: multiply-adds per sample that a head may take.
        seed: of the first weights; the global generator is left as it was.
    """
    masks = [place.mask for place in found if place.mask][:1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _Heads([Head(place, outputs, depth, budget) for place in found])
        values = tuple(torch.randn(place.shape) for place in found)
        values += tuple(torch.ones(place.shape[:2]) for place in found if place.mask)[:1]
    made = capture(module.eval(), (values,))
    return Heads(made, tuple([place.node for place in found] + masks))


def up_to(program: Program, names: Sequence[str]) -> Program:
    """A copy that gives the values of these nodes and computes nothing that they do not need."""
    made = program.clone()
    by_name = {node.name: node for node in made.graph.nodes}
    made.output_node.args = (tuple(by_name[name] for name in names),)
    remove_dead(made)
    return made


def attach(program: Program, made: Heads) -> list[str]:
    """Put the heads into a program's graph, unread; names of the nodes of their outputs.

    The program is changed; recompile and propagate it afterwards.
    """
    by_name = {node.name: node for node in program.graph.nodes}
    read = [by_name[name] for name in made.sources]
    inputs = dict(zip(made.program.placeholders, read, strict=True))
    return [node.name for node in graft(program, made.program, inputs)]
