"""What has to run when, in a graph with choices: which nodes always, which for chosen rows only.

Three kinds of nodes: *values* depend on what the inputs hold; a *choice* picks values row by row;
everything else (weights, constants, sizes and what follows from them) is *free*: each piece that
needs it computes it anew. The body of a choice is what feeds only its `there` side.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from laconic.core.errors import SurgeryError
from laconic.program.choices import CHOOSE
from laconic.program.program import Program, is_getitem

_SIZE = torch.ops.aten.sym_size.int


@dataclass
class Run:
    """Nodes that run together; or a choice: `members` of the same rows, and the body for them.

    Attributes:
        nodes: the nodes that this run makes values of, in the graph's order.
        takes: values it reads that it does not make.
        members: the `choose` nodes; none for a plain run.
        body: what runs for the chosen rows.
    """

    nodes: list[fx.Node]
    takes: list[fx.Node]
    members: list[fx.Node] = field(default_factory=list[fx.Node])
    body: "list[Run]" = field(default_factory=list["Run"])

    @staticmethod
    def operand(member: fx.Node, place: int) -> fx.Node:
        """Rows (0), `there` (1) or `otherwise` (2) of a choice."""
        found = member.args[place]
        assert isinstance(found, fx.Node)
        return found

    def operands(self) -> list[fx.Node]:
        """What a choice reads besides what its body takes."""
        return [self.operand(member, place) for member in self.members for place in (0, 2)]


class Flow:
    """The order of work in a Program with choices.

    Attributes:
        dims: value → {dimension: name}, those that follow the free dimensions of the inputs.
    """

    def __init__(self, program: Program) -> None:
        """Find shapes, dimensions that may change, and what depends on input values."""
        program.propagate()
        self._program = program
        self._place = {node: place for place, node in enumerate(program.graph.nodes)}
        self.dims = _free_dimensions(program)
        results: Any = program.output_node.args[0]
        self._results: list[fx.Node] = list(results)
        self._values = self._find_values()
        self._readers = {node: self._values_behind(node) for node in self._values}

    def _find_values(self) -> set[fx.Node]:
        """Nodes that depend on input values, and whatever choices and outputs read directly."""
        found: set[fx.Node] = {*self._program.placeholders, *self._results}
        for node in self._program.graph.nodes:
            if node.target is CHOOSE:
                found.update(node.all_input_nodes)
        for node in self._program.graph.nodes:
            tensor = node.op == "call_function" and node.meta.get("dtype") is not None
            if tensor and any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def _values_behind(self, node: fx.Node) -> set[fx.Node]:
        """Values (and the output) that read a node, directly or through its size."""
        found: set[fx.Node] = set()
        stack = list(node.users)
        while stack:
            user = stack.pop()
            if user in self._values or user.op == "output":
                found.add(user)
            else:
                stack.extend(user.users)
        return found

    def has_rows(self, node: fx.Node) -> bool:
        """Whether the first dimension of a value is the batch."""
        return self.dims.get(node, {}).get(0) == "batch"

    # what is read -------------------------------------------------------------------------

    def free(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes that are no values and that `nodes` need, directly or not."""
        found: set[fx.Node] = set()
        stack = [source for node in nodes for source in node.all_input_nodes]
        while stack:
            node = stack.pop()
            if node in self._values or node in found:
                continue
            found.add(node)
            stack.extend(node.all_input_nodes)
        return found

    def takes(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Values that a run of `nodes` reads and does not make, in the graph's order.

        A size is read off whichever value has it, so that no value is kept for its shape alone.
        """
        own, free = {*nodes}, self.free(nodes)
        sizes = [node for node in free if node.target is _SIZE]
        readers = [*nodes, *(node for node in free if node.target is not _SIZE)]
        found = {s for node in readers for s in node.all_input_nodes if s in self._values} - own
        for node in sorted(sizes, key=self._place.__getitem__):
            source = node.all_input_nodes[0]
            if source in self._values and source not in own and not self.measured(node, found):
                found.add(source)
        return sorted(found, key=self._place.__getitem__)

    def measured(self, node: fx.Node, takes: Iterable[fx.Node]) -> tuple[fx.Node, int] | None:
        """A value among `takes`, and its dimension, of the size that `node` asks for."""
        if node.target is not _SIZE:
            return None
        source, dim = node.all_input_nodes[0], int(str(node.args[1]))
        name = self.dims.get(source, {}).get(dim % max(len(source.meta["shape"]), 1))
        for take in takes:
            for place, other in self.dims.get(take, {}).items():
                if name is not None and other == name:
                    return take, place
        return None

    # what runs ----------------------------------------------------------------------------

    def steps(self) -> list[Run]:
        """The order of work of the whole graph."""
        level = [
            node
            for node in self._program.graph.nodes
            if node in self._values and node.op != "placeholder"
        ]
        return self._level(level, self._results)

    def _level(self, level: Sequence[fx.Node], results: Sequence[fx.Node]) -> list[Run]:
        """Runs of a set of nodes: what each choice needs first, then the choice, then the rest."""
        groups = self._choices(level)
        order = _Order(self, level, groups)
        for members, body in groups:
            order.choose(members, body)
        order.need(results)
        return order.runs

    def _choices(self, level: Sequence[fx.Node]) -> list[tuple[list[fx.Node], list[fx.Node]]]:
        """The outermost choices of a level, those of the same rows together, with their bodies."""
        left, found = dict.fromkeys(level), list[tuple[list[fx.Node], list[fx.Node]]]()
        for node in reversed(level):
            if node.target is not CHOOSE or node not in left:
                continue
            members = [node]
            before = _ancestors(node)
            for other in reversed(level[: level.index(node)]):
                same = other.target is CHOOSE and other.args[0] is node.args[0]
                if same and other in left and other not in before:
                    members.append(other)
                    before |= _ancestors(other)
            body = self._body(members, [n for n in left if n not in members])
            if not all(map(self._compact, self.takes(body))):
                continue
            if not all(self.has_rows(Run.operand(m, place)) for m in members for place in (0, 1)):
                continue
            found.append((members[::-1], body))
            for gone in (*members, *body):
                del left[gone]
        return found[::-1]

    def _compact(self, node: fx.Node) -> bool:
        """Whether rows can be taken out of a value, or it is the same for all of them."""
        named = self.dims.get(node, {}).values()
        return self.has_rows(node) or not any(name.startswith("batch") for name in named)

    def _body(self, members: Sequence[fx.Node], among: Sequence[fx.Node]) -> list[fx.Node]:
        """Nodes that feed nothing but the `there` operand of `members`, in order."""
        found: set[fx.Node] = set()
        allowed = {*among}

        def inside(user: fx.Node, node: fx.Node) -> bool:
            if user in found:
                return True
            return user in members and node not in (user.args[0], user.args[2])

        for node in reversed(among):
            readers = self._readers[node]
            if readers and all(inside(user, node) for user in readers):
                found.add(node)
        for node in among:  # several outputs of one operator stay where it is
            if is_getitem(node) and node.args[0] in allowed and node.args[0] not in found:
                found.discard(node)
        return [node for node in among if node in found]


class _Order:
    """Puts the runs of one level into an order in which everything is there when it is read."""

    def __init__(
        self,
        flow: Flow,
        level: Sequence[fx.Node],
        groups: Sequence[tuple[list[fx.Node], list[fx.Node]]],
    ) -> None:
        self.runs: list[Run] = []
        self._flow = flow
        self._groups = {member: group for group in groups for member in group[0]}
        bodies = {node for _, body in groups for node in body}
        self._level = {node for node in level if node not in bodies}
        self._done: set[fx.Node] = set()
        self._open: set[fx.Node] = set()

    def choose(self, members: list[fx.Node], body: list[fx.Node]) -> None:
        """Run a choice, and before it whatever it needs."""
        if members[0] in self._done:
            return
        if members[0] in self._open:
            raise SurgeryError("choices wait for each other", where=members[0].name)
        self._open.add(members[0])
        there = [Run.operand(member, 1) for member in members]
        inner = self._flow._level(body, there)
        made = {*body}
        takes = {take for run in inner for take in (*run.takes, *run.operands())} | {*there}
        outside = sorted(takes - made, key=self._flow._place.__getitem__)
        run = Run(nodes=members, takes=outside, members=members, body=inner)
        self.need([*outside, *run.operands()])
        self._done.update(members)
        self.runs.append(run)

    def need(self, values: Iterable[fx.Node]) -> None:
        """Run what `values` follow from and has not run yet."""
        wanted: set[fx.Node] = set()
        stack = list(values)
        while stack:
            node = stack.pop()
            if node not in self._level or node in self._done or node in wanted:
                continue
            if node in self._groups:
                self.choose(*self._groups[node])
                continue
            wanted.add(node)
            stack.extend(self._flow.takes([node]))
            if not is_getitem(node):
                stack.extend(user for user in node.users if is_getitem(user))
        nodes = sorted(wanted - self._done, key=self._flow._place.__getitem__)
        if nodes:
            self._done.update(nodes)
            self.runs.append(Run(nodes=nodes, takes=self._flow.takes(nodes)))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        source = stack.pop()
        if source not in found:
            found.add(source)
            stack.extend(source.all_input_nodes)
    return found


def _free_dimensions(program: Program) -> dict[fx.Node, dict[int, str]]:
    """Node → {dimension: name}: the dimensions that change when an input's free one does."""
    found: dict[fx.Node, dict[int, str]] = {node: {} for node in program.graph.nodes}
    names = dict.fromkeys(name for dims in program.dynamic.values() for name in dims.values())
    for name in names:
        other = program.clone()
        size, changed = _changed(other, name)
        for node, moved in zip(program.graph.nodes, other.graph.nodes, strict=True):
            shapes = node.meta.get("shape"), moved.meta.get("shape")
            if node.meta.get("dtype") is None or isinstance(node.meta["dtype"], tuple):
                continue
            for dim, (before, after) in enumerate(zip(*shapes, strict=True)):
                if before != after:
                    exact = before == size and after == changed
                    found[node][dim] = name if exact else f"{name}_{node.name}_{dim}"
    return found


def _changed(program: Program, name: str) -> tuple[int, int]:
    """Propagate with the free dimension `name` of another size; the old and the new one."""
    size = 0
    for node, tensor in zip(program.placeholders, program.example, strict=True):
        for dim, held in program.dynamic.get(node.name, {}).items():
            size = tensor.shape[dim] if held == name else size
    for other in (size + 1, size - 1):
        try:
            program.propagate([
                _resized(tensor, program.dynamic.get(node.name, {}), name, other)
                for node, tensor in zip(program.placeholders, program.example, strict=True)
            ])  # fmt: skip
        except SurgeryError:
            continue  # a table of positions is no longer than this
        return size, other
    program.propagate()
    return size, size


def _resized(tensor: Tensor, dims: dict[int, str], name: str, size: int) -> Tensor:
    for dim, held in dims.items():
        if held == name:
            tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
    return tensor
