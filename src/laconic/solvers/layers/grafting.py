"""One Program put into the graph of another one, reading values of it."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from laconic.program.program import Program


def graft(
    program: Program, other: Program, inputs: Mapping[fx.Node, fx.Node], prefix: str = ""
) -> list[fx.Node]:
    """Compute `other`'s outputs inside `program`; their nodes, which nothing reads yet.

    `program` is changed; recompile and propagate it afterwards. The tensors are copies.

    Args:
        program: what it is put into, before its output.
        other: left as it is. Only what lies between `inputs` and its outputs is computed.
        inputs: node of `other` → node of `program` that stands for it: all placeholders that the
            outputs depend on other than through the rest of `inputs`.
        prefix: of the tensors' names.
    """
    results: Any = other.output_node.args[0]
    needed = between(inputs, results)
    copied, names = dict(inputs), dict[str, str]()
    with program.graph.inserting_before(program.output_node):
        for node in other.graph.nodes:
            if node not in needed or node in copied:
                continue
            if node.op == "get_attr":
                kept = other.aliases.get(str(node.target), str(node.target))
                if kept not in names:
                    names[kept] = program.add_tensor(prefix + kept, _copy(other.tensor(kept)))
                copied[node] = program.graph.get_attr(names[kept])
                copied[node].meta = dict(node.meta)
            else:
                copied[node] = program.graph.node_copy(node, copied.__getitem__)
    program.sparse |= {names[name] for name in other.sparse if name in names}
    return [copied[node] for node in results]


def between(first: Collection[fx.Node], last: Iterable[fx.Node]) -> set[fx.Node]:
    """`last` and all they are computed from, up to and with `first`."""
    found: set[fx.Node] = set()
    stack = list(last)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [] if node in first else node.all_input_nodes
    return found


def _copy(tensor: Tensor) -> Tensor:
    value = tensor.detach().clone()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
