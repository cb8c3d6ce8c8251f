"""Gates in front of residual units: for every sample, whether a unit runs.

A gate takes the mean of the stream in front of its unit (over positions; padding does not count),
normalises it, and a linear layer gives one score. In training the unit's part is multiplied by 1
or 0, and gradients pass as if by the sigmoid of the score (straight-through, Bengio et al. 2013,
arXiv 1308.3432). Afterwards `laconic.choose` takes the place of the product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.program.choices import CHOOSE
from laconic.program.cost import cost
from laconic.program.equations import operator_name
from laconic.program.program import Program
from laconic.program.surgery import remove_dead
from laconic.solvers.dynamic.token_layers import hides_padding_only, made_of, mask_input
from laconic.solvers.dynamic.token_merging import Writer, logarithm
from laconic.solvers.layers.attentions import attentions
from laconic.solvers.layers.residual import Branch, branches
from laconic.training.attendant import Attendant
from laconic.training.job import Forward, Loss, Objective
from laconic.training.plan import Plan

_ATEN: Any = torch.ops.aten
_EPSILON = 1e-5
_CLOSED_BEFORE = 1.0  # a gate begins with this score: open, and near enough to close


@dataclass(frozen=True)
class Unit:
    """What runs or is left out as a whole.

    Attributes:
        name: of its branches, joined.
        start: the stream in front of it, `[batch, ...]`.
        end: the stream behind it, of the same shape.
        share: its part of the multiply-adds of all units.
    """

    name: str
    start: fx.Node
    end: fx.Node
    share: float = 0.0


@dataclass
class Gate:
    """A unit with its gate in a graph.

    Attributes:
        unit: what it stands in front of.
        score: `[batch]`: above its threshold the unit runs.
        open: `[batch]` of 0 and 1 while it trains.
        mixed: what stands in the place of the unit's end.
        threshold: name of the stored limit.
    """

    unit: Unit
    score: fx.Node
    open: fx.Node
    mixed: fx.Node
    threshold: str


# units --------------------------------------------------------------------------------------


def units(program: Program, names: Sequence[str], size: int) -> tuple[list[Unit], list[str]]:
    """Branches of these names in runs of `size`, and sentences about those that cannot be left out.

    Shapes have to be propagated.
    """
    every = branches(program)
    chosen, streams = [one for one in every if one.name in names], {one.stream for one in every}
    runs = [chosen[i : i + size] for i in range(0, len(chosen) - size + 1, size)]
    macs = {row.node: row.macs for row in cost(program).rows}
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    found: list[Unit] = []
    spent: list[int] = []
    notes: list[str] = []
    for run in runs:
        name = " + ".join(branch.name for branch in run)
        start, end = run[0].stream, _end(run, streams)
        alike = all(start.meta.get(key) == end.meta.get(key) for key in ("shape", "dtype"))
        inner = _between(start, end, order)
        joined = all(_end([one], streams) is two.stream for one, two in pairwise(run))
        if not alike or not joined or len(start.meta["shape"]) < 2 or _leaves(inner, end):
            notes.append(f"{name}: always runs: what is behind it is no stream of its own")
            continue
        found.append(Unit(name, start, end))
        spent.append(sum(macs.get(node.name, 0) for node in inner))
    total = max(1, sum(spent))
    made = [Unit(u.name, u.start, u.end, s / total) for u, s in zip(found, spent, strict=True)]
    return made, notes


def _end(run: Sequence[Branch], streams: set[fx.Node]) -> fx.Node:
    """The last sum; where it is normalised or cut off at zero before it goes on, what is behind.

    That is the one operator behind it whose value is the next stream, or, at the end of the
    network, which is of the kind that the stream in front came out of.
    """
    total, start = run[-1].total, run[0].stream
    while operator_name(start) == "aten.dropout":
        held: Any = start.args[0]
        start = held
    behind = next(iter(total.users))
    like = start.op == behind.op == "call_function" and start.target is behind.target
    if len(total.users) == 1 and behind.all_input_nodes[0] is total and (
        like or behind in streams
    ):  # fmt: skip
        return behind
    return total


def _between(start: fx.Node, end: fx.Node, order: Mapping[fx.Node, int]) -> set[fx.Node]:
    """What `end` needs that comes of `start`, itself included."""
    back: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node not in back and node is not start and order[node] > order[start]:
            back.add(node)
            stack += node.all_input_nodes
    inner: set[fx.Node] = set()
    for node in sorted(back, key=order.__getitem__):
        if any(source is start or source in inner for source in node.all_input_nodes):
            inner.add(node)
    return inner


def _leaves(inner: set[fx.Node], end: fx.Node) -> bool:
    """Whether anybody else reads what is computed in a unit."""
    return any(user not in inner for node in inner if node is not end for user in node.users)


# in the graph -------------------------------------------------------------------------------


def mask_for_itself(program: Program) -> None:
    """Let every attention make what hides padding from the mask `[batch, tokens]`, in place.

    A mask `[batch, 1, tokens, tokens]` that all layers share would have to be handed to each of
    them row by row. Where a mask says anything else it stays; shapes have to be propagated.
    """
    known: dict[fx.Node, bool] = {}
    found = [(one, held.value, held.reader) for one in attentions(program) for held in one.masks]
    for one, shared, reader in found:
        mask = mask_input(program, one.sizes[1])
        if mask is None or len(one.core.meta["shape"]) != 4:
            continue
        if shared not in known:
            known[shared] = shared in made_of(program, mask) and hides_padding_only(
                program, shared, mask
            )
        if known[shared]:
            write = Writer(program, reader, str(reader.meta.get("origin", "")))
            real = write(_ATEN.to.dtype, mask, reader.meta["dtype"])
            own = logarithm(write, real, 4)  # as numbers: OpenVINO fuses them better than bools
            reader.replace_input_with(shared, own)
    remove_dead(program)


def insert(program: Program, found: Sequence[Unit]) -> list[Gate]:
    """Put a gate in front of every unit, in place, as training wants it; recompiles."""
    mask_for_itself(program)
    made: list[Gate] = []
    for unit in found:
        for before in made:  # the stream in front is what a gate before it has let through
            if unit.start is before.unit.end:
                unit = replace(unit, start=before.mixed)
        made.append(_insert(program, unit))
    program.propagate()
    program.recompile()
    return made


def _insert(program: Program, unit: Unit) -> Gate:
    graph = program.graph

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {"origin": unit.end.meta.get("origin", "")}
        return node

    users = list(unit.end.users)
    with graph.inserting_after(unit.end):
        anchor = graph.call_function(_ATEN.alias.default, (unit.end,))
    with graph.inserting_before(anchor):
        score = _score(program, unit, call)
        share = call(_ATEN.sigmoid.default, score)
        hard = call(_ATEN.to.dtype, call(_ATEN.gt.Scalar, score, 0.0), unit.start.meta["dtype"])
        apart = call(_ATEN.detach.default, call(_ATEN.sub.Tensor, hard, share))
        opened = call(_ATEN.add.Tensor, share, apart)
        shape = [-1, *[1] * (len(unit.end.meta["shape"]) - 1)]
        column = call(_ATEN.reshape.default, opened, shape)
        change = call(_ATEN.sub.Tensor, unit.end, unit.start)
        mixed = call(_ATEN.add.Tensor, unit.start, call(_ATEN.mul.Tensor, change, column))
    graph.erase_node(anchor)
    mixed.meta = dict(unit.end.meta)
    for user in users:
        user.replace_input_with(unit.end, mixed)
    stored = program.add_tensor(f"gates.{_path(unit)}.threshold", torch.tensor(0.0))
    return Gate(unit, score, opened, mixed, stored)


def _path(unit: Unit) -> str:
    return unit.name.split(" + ")[0].replace("~", "_")


def _score(program: Program, unit: Unit, call: Any) -> fx.Node:
    """`[batch]`: a linear layer of the normalised mean of the stream."""
    shape, stream = unit.start.meta["shape"], unit.start
    if len(shape) == 3:
        pooled, width = _mean_of_tokens(program, unit, call), shape[2]
    else:
        places = list(range(2, len(shape)))
        pooled, width = call(_ATEN.mean.dim, stream, places) if places else stream, shape[1]
    plain = call(_ATEN.layer_norm.default, pooled, [width], None, None, _EPSILON)
    like = next((t for _, t in program.tensors() if t.is_floating_point()), torch.zeros(()))
    start = torch.full((1,), _CLOSED_BEFORE, dtype=like.dtype, device=like.device)
    nodes: list[fx.Node] = []
    for leaf, tensor in (("weight", start.new_zeros(1, width)), ("bias", start)):
        name = program.add_tensor(f"gates.{_path(unit)}.{leaf}", nn.Parameter(tensor))
        nodes.append(program.graph.get_attr(name))
        nodes[-1].meta = {"origin": unit.end.meta.get("origin", "")}
    return call(_ATEN.squeeze.dim, call(_ATEN.linear.default, plain, *nodes), -1)


def _mean_of_tokens(program: Program, unit: Unit, call: Any) -> fx.Node:
    """Mean over the second dimension; where there is a padding mask, of what is real."""
    mask = mask_input(program, unit.start.meta["shape"][1])
    if mask is None:
        return call(_ATEN.mean.dim, unit.start, [1])
    real = call(_ATEN.to.dtype, call(_ATEN.unsqueeze.default, mask, -1), unit.start.meta["dtype"])
    total = call(_ATEN.sum.dim_IntList, call(_ATEN.mul.Tensor, unit.start, real), [1])
    count = call(_ATEN.clamp_min.default, call(_ATEN.sum.dim_IntList, real, [1]), 1.0)
    return call(_ATEN.div.Tensor, total, count)


def decide(program: Program, gates: Sequence[Gate]) -> None:
    """Replace what gates do in training by choices, in place."""
    for gate in gates:
        with program.graph.inserting_before(gate.mixed):
            held = program.graph.get_attr(gate.threshold)
            rows = program.graph.call_function(_ATEN.gt.Tensor, (gate.score, held))
            start: Any = gate.mixed.args[0]  # a gate before it may have become a choice
            pair = gate.unit.end, start
            made = program.graph.call_function(CHOOSE, (rows, *pair))
        origin = {"origin": gate.unit.end.meta.get("origin", "")}
        held.meta, rows.meta, made.meta = dict(origin), dict(origin), dict(origin)
        gate.mixed.replace_all_uses_with(made)
        gate.open = rows
    remove_dead(program)
    program.propagate()
    program.recompile()


def set_thresholds(program: Program, gates: Sequence[Gate], limit: float) -> None:
    """One limit for the scores of all gates."""
    for gate in gates:
        held = program.tensor(gate.threshold)
        program.set_tensor(gate.threshold, torch.full_like(held, limit))


# training -----------------------------------------------------------------------------------


class Spending:
    """An objective, and a penalty on what the gates spend beyond their share.

    The gates' values are read from a second graph over the same tensors.

    Attributes:
        target: the share of the units' multiply-adds that may be spent.
        strength: of the penalty, in units of the loss.
    """

    def __init__(
        self, inner: Objective, program: Program, gates: Sequence[Gate], target: float,
        strength: float,
    ) -> None:  # fmt: skip
        self._inner, self._program, self._gates = inner, program, gates
        self.target, self.strength = target, strength
        self._watched: fx.GraphModule | None = None

    def __call__(self, forward: Forward, batch: Any, number: int) -> Loss:
        """The inner loss of a batch, and the penalty."""
        del forward
        if self._watched is None:
            self._watched = _watched(self._program, [gate.open for gate in self._gates])
        run, count, opened = self._watched, len(self._gates), list[Tensor]()

        def seen(*flat: Tensor) -> tuple[Tensor, ...]:
            given = run(*flat)
            opened.extend(given[-count:])
            return given[:-count]

        loss = self._inner(seen, batch, number)
        spent = sum(
            (gate.unit.share * value.float().mean()
             for gate, value in zip(self._gates, opened, strict=True)),
            torch.zeros((), device=loss.value.device),
        )  # fmt: skip
        beyond = (spent - self.target).clamp(min=0) / max(1 - self.target, _EPSILON)
        return Loss(loss.value + self.strength * beyond.square(), loss.samples)


def _watched(program: Program, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """The graph as it is now over the same tensors, with further outputs."""
    module = program.as_graph_module()
    copies = dict(zip(program.graph.nodes, module.graph.nodes, strict=True))
    end = module.graph.output_node()
    held: Any = end.args[0]
    end.args = ((*held, *(copies[node] for node in nodes)),)
    module.recompile()
    return module


class LastState(Attendant):
    """Keeps the end of a run: what was before spends more and therefore scores better."""

    def begin(self, program: Program, plan: Plan) -> None:
        """Take the length."""
        del program
        self._steps = plan.steps or 1

    def judged(self, step: int) -> bool:
        """Only the last state counts."""
        return step >= self._steps
