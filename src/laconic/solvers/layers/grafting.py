"""One Program put into the graph of another one, reading values of it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from laconic.program.program import Program


def graft(
    program: Program, other: Program, inputs: Sequence[fx.Node], prefix: str = ""
) -> list[fx.Node]:
    """Compute `other` inside `program`; the nodes of its outputs, which nothing reads yet.

    `program` is changed; recompile and propagate it afterwards. The tensors are copies.

    Args:
        program: what it is put into, before its output.
        other: left as it is.
        inputs: nodes of `program` that stand for the placeholders of `other`, in order.
        prefix: of the tensors' names.
    """
    copied: dict[fx.Node, fx.Node] = dict(zip(other.placeholders, inputs, strict=True))
    names: dict[str, str] = {}
    with program.graph.inserting_before(program.output_node):
        for node in other.graph.nodes:
            if node.op == "get_attr":
                kept = other.aliases.get(str(node.target), str(node.target))
                if kept not in names:
                    names[kept] = program.add_tensor(prefix + kept, _copy(other.tensor(kept)))
                copied[node] = program.graph.get_attr(names[kept])
                copied[node].meta = dict(node.meta)
            elif node.op == "call_function":
                copied[node] = program.graph.node_copy(node, copied.__getitem__)
    program.sparse |= {names[name] for name in other.sparse if name in names}
    results: Any = other.output_node.args[0]
    return [copied[node] for node in results]


def _copy(tensor: Tensor) -> Tensor:
    value = tensor.detach().clone()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
