"""Milliseconds of every layer as a function of its widths, filled by measuring the runtime.

The time of a layer depends on its inputs and on its outputs, and not smoothly: kernels work on
blocks of channels. For every distinct shape of layer (kernel, stride, positions, batch 1) small
programs of that layer alone are timed over a grid of the sizes that its axes may have; between the
points of the grid it is interpolated, and a smaller layer never counts as slower than a larger one.
What a layer shares with no group, and what stands between the layers, is not in the table: it is
what remains of the whole network's time (`latency_budget` measures that).

A probe holds a few copies of the layer with weights of their own, each added to the one before, so
that the cost of a call weighs little and no runtime can merge them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.fx.node import map_arg

from laconic.core.errors import LaconicError
from laconic.core.progress import SILENT, Progress
from laconic.program import axes, rewrites
from laconic.program.axes import Atom, Sum, Term
from laconic.program.equations import Equations, operator_name
from laconic.program.groups import Groups
from laconic.program.program import Program
from laconic.program.signature import Signature
from laconic.solvers.channels.allocate import Choice, Costs
from laconic.solvers.search.stopwatch import Timer

Floats = NDArray[np.float64]
Sizes = NDArray[np.int64]
_POINTS = {1: 5, 2: 3}  # points along each axis of a table, by the number of its axes; else 2
_COPIES = 4
_LARGE = 1 << 20  # elements of a weight from which on one copy takes long enough to be timed
_NANOSECONDS = 1e6  # per millisecond: costs are whole numbers


@dataclass(frozen=True)
class Kind:
    """Layers of one shape, and how long one of them takes.

    Attributes:
        nodes: their names in the graph.
        columns: of each node and axis, the places (among the choices) of the groups that make up
            that axis; its size is their sum.
        knots: sizes along each axis, ascending.
        milliseconds: of one layer, one dimension for each axis.
    """

    nodes: tuple[str, ...]
    columns: tuple[tuple[tuple[int, ...], ...], ...]
    knots: tuple[Floats, ...]
    milliseconds: Floats

    def of(self, sizes: Sizes) -> Floats:
        """Milliseconds of all these layers: sizes `[choices, groups]` → `[choices]`."""
        total = np.zeros(len(sizes))
        for axes_ in self.columns:
            places = [sizes[:, list(columns)].sum(1).astype(np.float64) for columns in axes_]
            total += interpolate(self.knots, self.milliseconds, places)
        return total

    def figures(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "layers": list(self.nodes),
            "sizes": [knots.astype(int).tolist() for knots in self.knots],
            "milliseconds": np.round(self.milliseconds, 6).tolist(),
        }


class LatencyTable(Costs):
    """The sum of all layers' times in nanoseconds, as a cost of the groups' sizes."""

    uneven = True

    def __init__(self, kinds: Sequence[Kind], full: Sizes) -> None:
        """`full`: the groups' sizes, in the order of the kinds' columns."""
        self.kinds = tuple(kinds)
        self.full = full

    def of(self, sizes: Sizes) -> Sizes:
        """`[choices, groups]` → `[choices]`, nanoseconds."""
        sizes = np.atleast_2d(sizes)
        total = sum((kind.of(sizes) for kind in self.kinds), np.zeros(len(sizes)))
        return np.rint(total * _NANOSECONDS).astype(np.int64)


def interpolate(knots: Sequence[Floats], values: Floats, places: Sequence[Floats]) -> Floats:
    """Multilinear between the points of a grid, going on as a line outside, never below 0.

    Args:
        knots: places along each axis, ascending, at least two each.
        values: of the grid, one dimension for each axis.
        places: of each axis float `[queries]`.

    Returns:
        `[queries]`.
    """
    found = np.broadcast_to(values, (len(places[0]), *values.shape)) if places else values
    rows = np.arange(len(found))
    for along, place in zip(knots, places, strict=True):
        low = np.clip(np.searchsorted(along, place, side="right") - 1, 0, len(along) - 2)
        part = (place - along[low]) / (along[low + 1] - along[low])
        part = part.reshape(-1, *([1] * (found.ndim - 2)))
        found = found[rows, low] * (1 - part) + found[rows, low + 1] * part
    return np.maximum(found, 0.0)


# measuring ------------------------------------------------------------------------------------


@dataclass
class _Shape:
    """Layers that the same probes stand for."""

    node: fx.Node
    atoms: tuple[tuple[Atom, ...], ...]
    nodes: list[str] = field(default_factory=list[str])
    columns: list[tuple[tuple[int, ...], ...]] = field(
        default_factory=list[tuple[tuple[int, ...], ...]]
    )


def measure(
    found: Groups,
    choices: Sequence[Choice],
    timer: Timer,
    *,
    progress: Progress = SILENT,
    notes: list[str] | None = None,
) -> LatencyTable:
    """Fill the table for the layers that read or write one of the groups.

    Args:
        found: groups of the program.
        choices: the sizes that each chosen group may have.
        timer: what measures.
        progress: gets one step a shape.
        notes: gets a sentence about each shape that could not be measured; it counts for nothing.
    """
    order = {found.find(c.name).atom: place for place, c in enumerate(choices) if len(c.counts) > 1}
    shapes = _shapes(found.equations, order)
    single = _batch_of_one(found.equations)
    kinds: list[Kind] = []
    with progress.task("latency of layers", len(shapes)) as bar:
        for shape in shapes:
            try:
                kinds.append(_measured(found.equations, shape, choices, order, single, timer))
            except LaconicError as error:
                if notes is not None:
                    notes.append(f"{shape.node.name} is not in the latency table: {error.message}")
            bar.advance(1, shape.node.name)
    return LatencyTable(kinds, np.array([c.size for c in choices], dtype=np.int64))


def _shapes(equations: Equations, order: Mapping[Atom, int]) -> list[_Shape]:
    shapes: dict[Any, _Shape] = {}
    for node in equations.multiply_adds:
        if isinstance(node.meta["dtype"], tuple) or not node.meta["dtype"].is_floating_point:
            continue
        held = _axes(equations, node, order)
        if held:
            shape = shapes.setdefault(_key(equations, node, held), _Shape(node, held))
            shape.nodes.append(node.name)
            shape.columns.append(tuple(tuple(order[atom] for atom in atoms) for atoms in held))
    return list(shapes.values())


def _axes(
    equations: Equations, node: fx.Node, order: Mapping[Atom, int]
) -> tuple[tuple[Atom, ...], ...]:
    """The sets of chosen atoms whose sizes decide a layer's time, disjoint.

    The parts of a concatenation are one axis; factors of a product are several.
    """
    sets: list[dict[Atom, None]] = []
    for source in node.all_input_nodes:
        for term in equations.dims(source):
            for part in _parts(axes.resolve(term)):
                together = {atom: None for atom in axes.atoms(part) if atom in order}
                if together:
                    for other in [held for held in sets if held.keys() & together.keys()]:
                        sets.remove(other)
                        together = other | together
                    sets.append(together)
    return tuple(tuple(held) for held in sets)


def _parts(term: Term) -> Sequence[Term]:
    """What stands for an axis of its own: an atom or a concatenation."""
    if isinstance(term, (Atom, Sum)):
        return (term,)
    return [part for factor in term.factors for part in _parts(factor)]


def _key(equations: Equations, node: fx.Node, held: tuple[tuple[Atom, ...], ...]) -> Any:
    """Equal for layers that take the same time whatever the sizes along their axes."""
    owner = {atom: place for place, atoms in enumerate(held) for atom in atoms}

    def spelled(term: Term) -> str:
        term = axes.resolve(term)
        if isinstance(term, Atom):
            return f"{owner.get(term, '')}:{term.size}"
        inner = term.parts if isinstance(term, Sum) else term.factors
        return f"{type(term).__name__}({','.join(map(spelled, inner))})"

    def argument(value: fx.Node) -> Any:
        dims = tuple(spelled(term) for term in equations.dims(value))
        return dims, str(value.meta["dtype"]), _is_stored(value)

    return operator_name(node), str(map_arg((node.args, node.kwargs), argument))


def _is_stored(node: fx.Node) -> bool:
    """Whether a node is a weight, or computed from weights only."""
    if node.op != "call_function":
        return node.op == "get_attr"
    return all(_is_stored(source) for source in node.all_input_nodes)


def _batch_of_one(equations: Equations) -> dict[Atom, int]:
    """The atoms of the dimension named "batch", with size 1."""
    program = equations.program
    return {
        atom: 1
        for node in program.placeholders
        for dim, name in program.dynamic.get(node.name, {}).items()
        if name == "batch"
        for atom in axes.atoms(equations.dims(node)[dim])
    }


def _measured(
    equations: Equations,
    shape: _Shape,
    choices: Sequence[Choice],
    order: Mapping[Atom, int],
    single: Mapping[Atom, int],
    timer: Timer,
) -> Kind:
    points = _POINTS.get(len(shape.atoms), 2)
    grids = [_grid([choices[order[a]] for a in atoms], points) for atoms in shape.atoms]
    extents = tuple(len(grid) for grid in grids)
    probes: dict[str, Program] = {}
    copies = _copies(shape.node)
    for place in np.ndindex(extents):
        sizes = dict(single)
        for atoms, grid, at in zip(shape.atoms, grids, place, strict=True):
            sizes |= dict(zip(atoms, grid[at], strict=True))
        probes[str(place)] = probe(equations, shape.node, sizes, copies)
    times = timer(probes)
    values = np.array([times[str(place)] / copies for place in np.ndindex(extents)])
    knots = tuple(np.array([sum(row) for row in grid], dtype=np.float64) for grid in grids)
    values = _rising(values.reshape(extents))
    return Kind(tuple(shape.nodes), tuple(shape.columns), knots, values)


def _grid(choices: Sequence[Choice], points: int) -> list[tuple[int, ...]]:
    """Sizes of the groups of one axis, ascending, from the smallest to the whole."""
    rows: dict[tuple[int, ...], None] = {}
    for part in np.linspace(1.0, 0.0, points):
        rows[tuple(int(c.counts[round(part * (len(c.counts) - 1))]) for c in choices)] = None
    return list(rows)


def _rising(values: Floats) -> Floats:
    """Noise out: a smaller layer takes at most as long as each larger one."""
    for axis in range(values.ndim):
        values = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
    return values


# probes ---------------------------------------------------------------------------------------


def _copies(node: fx.Node) -> int:
    sizes = [int(np.prod(n.meta["shape"])) for n in node.all_input_nodes if _is_stored(n)]
    return 1 if max(sizes, default=0) >= _LARGE else _COPIES


def probe(equations: Equations, node: fx.Node, sizes: Mapping[Atom, int], copies: int) -> Program:
    """A program of some copies of one operator, at other sizes of its axes.

    Args:
        equations: of the program that `node` belongs to.
        node: the operator.
        sizes: of atoms; the others keep theirs.
        copies: how many; each result is added to the one before.
    """
    generator = torch.Generator().manual_seed(0)
    graph = fx.Graph()
    inputs: dict[fx.Node, fx.Node] = {}
    example: list[Tensor] = []
    tensors: dict[str, Tensor] = {}

    def value(source: fx.Node) -> Tensor:
        shape = [axes.new_size(term, sizes) for term in equations.dims(source)]
        dtype = source.meta["dtype"]
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.ones(shape, dtype=dtype)

    for source in node.all_input_nodes:
        if not _is_stored(source):
            inputs[source] = graph.placeholder(f"x{len(inputs)}")
            example.append(value(source))
    calls: list[fx.Node] = []
    total: fx.Node | None = None
    for number in range(copies):
        call = _copy(graph, node, inputs, number, lambda s: _stored(graph, tensors, value(s)))
        calls.append(call)
        if total is not None:
            total = graph.call_function(torch.ops.aten.add.Tensor, (call, total))
            total = graph.call_function(torch.ops.aten.relu.default, (total,))
        total = total or call
    graph.output((total,))
    names = [f"x{number}" for number in range(len(inputs))]
    arguments = {name: {"tensor": number} for number, name in enumerate(names)}
    signature = Signature(arguments, {"tensor": 0}, len(inputs), tuple(names))
    made = Program(graph, tensors, signature, example)
    for rewrite in equations.rewrites:
        if rewrite.node is node:
            for call in calls:
                rewrite.apply(rewrites.Cut(made, lambda _, call=call: call, {}, sizes))
    made.recompile()
    made.propagate()
    return made


def _copy(
    graph: fx.Graph, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], number: int, store: Any
) -> fx.Node:
    """One more copy of the operator, with weights of its own; without any, of a scaled input."""
    held: dict[fx.Node, fx.Node] = dict(inputs)
    stored = [source for source in node.all_input_nodes if _is_stored(source)]
    for source in stored:
        held[source] = store(source)
    if not stored and inputs:
        first = next(iter(inputs))
        scaled = (inputs[first], 1 - number / 16)
        held[first] = graph.call_function(torch.ops.aten.mul.Tensor, scaled)
    target: Any = node.target
    args: Any = map_arg(node.args, held.__getitem__)
    kwargs: Any = map_arg(node.kwargs, held.__getitem__)
    return graph.call_function(target, args, kwargs)


def _stored(graph: fx.Graph, tensors: dict[str, Tensor], tensor: Tensor) -> fx.Node:
    name = f"weight{len(tensors)}"
    tensors[name] = torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor
    return graph.get_attr(name)
