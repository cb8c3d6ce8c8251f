"""Residual branches of a graph: what is added to a stream that goes past it unchanged.

A branch is found from its sum alone: one operand is computed from the other one, has its shape, and
nobody else reads what lies between. Other inputs of the branch (masks, the encoder's output) do not
matter. Taking a branch away leaves the stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from laconic.program.equations import arguments, operator_name
from laconic.program.program import Program


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    Attributes:
        name: the longest module path that all its weights share, else the sum's own; with ~2, ~3
            behind it where a branch before has the same, as in layers that share their weights.
        total: the node that adds it to the stream.
        stream: the other operand of the sum, which is also what the branch is computed from.
        end: the branch's own operand of the sum.
        place: which operand of the sum the stream is, 0 or 1.
        inner: every operator between stream and sum.
        tensors: names of the stored tensors that only this branch reads, or, where there is none,
            of those that it shares with others.
    """

    name: str
    total: fx.Node
    stream: fx.Node
    end: fx.Node
    place: int
    inner: tuple[fx.Node, ...]
    tensors: tuple[str, ...]


def branches(program: Program) -> list[Branch]:
    """All residual branches that have weights, in graph order; shapes have to be propagated."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    readers = _readers(program)
    found: list[Branch] = []
    taken: dict[str, int] = {}
    for node in program.graph.nodes:
        pair = _operands(node)
        if pair is None:
            continue
        for place in (0, 1):
            stream, end = pair[place], pair[1 - place]
            inner = _between(stream, end, order)
            tensors = _tensors(readers, inner) if inner else ()
            if inner and tensors and _is_closed(inner, node):
                name = _name(tensors, node)
                taken[name] = taken.get(name, 0) + 1
                name = name if taken[name] == 1 else f"{name}~{taken[name]}"
                found.append(Branch(name, node, stream, end, place, inner, tensors))
                break
    return found


def is_size(node: fx.Node) -> bool:
    """Whether a node gives a number; sizes are those of every value of the stream."""
    return isinstance(node.meta.get("shape"), int)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both operands of a plain sum of two different values of the sum's own shape."""
    if node.op != "call_function" or operator_name(node) != "aten.add" or len(node.args) < 2:
        return None
    first: Any = node.args[0]
    second: Any = node.args[1]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return None
    if arguments(node).get("alpha") not in (None, 1):
        return None
    alike = all(
        one.op != "get_attr"
        and one.meta.get("shape") == node.meta["shape"]
        and one.meta.get("dtype") == node.meta["dtype"]
        for one in (first, second)
    )
    return (first, second) if alike else None


def _between(stream: fx.Node, end: fx.Node, order: dict[fx.Node, int]) -> tuple[fx.Node, ...]:
    """What `end` needs that depends on `stream`, `end` included; () if it does not depend on it."""
    back: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node not in back and node is not stream and order[node] > order[stream]:
            back.add(node)
            stack += [source for source in node.all_input_nodes if not is_size(source)]
    inner: set[fx.Node] = set()
    for node in sorted(back, key=order.__getitem__):
        if any(source is stream or source in inner for source in node.all_input_nodes):
            inner.add(node)
    return tuple(sorted(inner, key=order.__getitem__)) if end in inner else ()


def _is_closed(inner: Sequence[fx.Node], total: fx.Node) -> bool:
    held = {*inner, total}
    return all(user in held for node in inner for user in node.users)


def _tensors(readers: Mapping[str, set[fx.Node]], inner: Sequence[fx.Node]) -> tuple[str, ...]:
    """Names of stored tensors that only these operators read, else of all that they read."""
    held = set(inner)
    own = tuple(name for name, users in readers.items() if users and users <= held)
    return own or tuple(name for name, users in readers.items() if users & held)


def _readers(program: Program) -> dict[str, set[fx.Node]]:
    """Stored tensors → the operators on activations that each of them reaches."""
    stored = _stored(program)
    readers: dict[str, set[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            name = program.aliases.get(str(node.target), str(node.target))
            readers.setdefault(name, set()).update(_final(node, stored))
    return readers


def _final(node: fx.Node, stored: set[fx.Node]) -> set[fx.Node]:
    """Operators on activations that a stored tensor reaches, through operators on it alone."""
    found: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in stored and user.users:
            stack += list(user.users)
        else:
            found.add(user)
    return found


def _stored(program: Program) -> set[fx.Node]:
    """Stored tensors, and what is computed from them alone."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        computed = node.op == "call_function" and sources and all(n in found for n in sources)
        if node.op == "get_attr" or computed:
            found.add(node)
    return found


def _name(tensors: Sequence[str], node: fx.Node) -> str:
    shared = tensors[0].split(".")[:-1]
    for name in tensors:
        parts = name.split(".")
        while parts[: len(shared)] != shared:
            shared.pop()
    return ".".join(shared) or str(node.meta.get("origin") or node.name)
