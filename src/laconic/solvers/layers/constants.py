"""Work in a graph that does not depend on the input: computed once, or left out.

What depends on stored constants only is computed and stored; operators that give their input back
(additions of zero, copies, views to the same shape) go away.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from laconic.core.errors import SurgeryError
from laconic.program.program import Program

_LARGEST_GROWTH = 4096  # values that a folded constant may hold more than its inputs do

aten = torch.ops.aten
_COPIES = {
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.lift_fresh_copy.default,
}  # fmt: skip
_SAME_SHAPE = {
    aten.view.default, aten.reshape.default, aten.expand.default, aten.flatten.using_ints,
    aten.to.dtype, aten._to_copy.default, aten.permute.default, aten.repeat.default,
}  # fmt: skip
_NEUTRAL: dict[Any, float] = {
    aten.add.Tensor: 0.0, aten.sub.Tensor: 0.0, aten.mul.Tensor: 1.0, aten.div.Tensor: 1.0,
    aten.add.Scalar: 0.0, aten.sub.Scalar: 0.0, aten.mul.Scalar: 1.0, aten.div.Scalar: 1.0,
    aten.pow.Tensor_Scalar: 1.0,
}  # fmt: skip
_DROPOUT = {
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}  # fmt: skip
_Shapes = dict[str, Any]
_RANDOM = {"rand", "randn", "randint", "randperm", "bernoulli", "normal", "multinomial"}


def operators(program: Program) -> int:
    """How many operators the graph has."""
    return sum(node.op == "call_function" for node in program.graph.nodes)


def drop_identities(
    program: Program, *, identities: bool = True, dropout: bool = True
) -> tuple[int, int]:
    """Take out operators that give their input back; shapes are those `propagate` wrote.

    Returns:
        how many went, and how many of them were dropout, which does nothing in eval mode.
    """
    dropped = dropouts = 0
    elsewhere = _other_shapes(program)
    for node in list(program.graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, fx.Node):
            continue
        is_dropout = node.target in _DROPOUT
        same = identities and _is_identity(node, source, elsewhere)
        if same or (dropout and is_dropout):
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
            dropped += 1
            dropouts += is_dropout
    return dropped, dropouts


def _is_identity(node: fx.Node, source: fx.Node, elsewhere: _Shapes) -> bool:
    if not isinstance(source.meta.get("dtype"), torch.dtype):
        return False
    if node.meta["dtype"] != source.meta["dtype"] or node.meta["shape"] != source.meta["shape"]:
        return False
    if node.target in _COPIES:
        return True
    if node.target in _NEUTRAL:
        plain = not node.kwargs and len(node.args) == 2
        return plain and _is_number(node.args[1], _NEUTRAL[node.target])
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return [d % len(order) for d in order] == list(range(len(order)))
    known = elsewhere.get(node.name)
    return node.target in _SAME_SHAPE and known is not None and known == elsewhere[source.name]


def _is_number(value: Any, wanted: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == wanted


def _other_shapes(program: Program) -> _Shapes:
    """Node → shape for other sizes of the dynamic dimensions; {} where those are refused.

    A view that happens to keep the example's shape (batch 2, a size of 2) may change another one.
    """
    other = [tensor.clone() for tensor in program.example]
    for position, node in enumerate(program.placeholders):
        for dim in program.dynamic.get(node.name, {}):
            pieces = [other[position]] * 3 + [other[position].narrow(dim, 0, 1)]
            other[position] = torch.cat(pieces, dim)
    probe = program.clone()
    try:
        probe.propagate(other)
    except SurgeryError:
        return {}
    return {node.name: node.meta["shape"] for node in probe.graph.nodes if "shape" in node.meta}


def fold_constants(program: Program, *, parameters: bool = False) -> int:
    """Compute what depends on buffers and numbers only; returns how many operators went.

    Trainable tensors are no constants unless `parameters` says that nothing is trained any more.
    """
    program.graph.eliminate_dead_code()
    constant: dict[fx.Node, Any] = {}
    before = operators(program)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            tensor = program.tensor(str(node.target))
            trains = tensor.requires_grad or isinstance(tensor, torch.nn.Parameter)
            if parameters or not trains:
                constant[node] = tensor.detach()
        elif is_computable(node) and all(source in constant for source in node.all_input_nodes):
            with torch.no_grad():
                constant[node] = run(node, constant.__getitem__)
    for node in list(program.graph.nodes):
        kept = any(user not in constant for user in node.users)
        if node.op == "call_function" and node in constant and kept:
            _store(program, node, constant[node])
    program.graph.eliminate_dead_code()
    return before - operators(program)


def is_computable(node: fx.Node) -> bool:
    """Whether a node gives the same whenever its inputs are the same, and changes nothing."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.split("::")
    return name[0] == "aten" and name[1] not in _RANDOM and not target._schema.is_mutable


def run(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """What a node gives for the values of its sources."""
    target: Any = node.target
    args = map_arg(node.args, value)
    kwargs = map_arg(node.kwargs, value)
    return target(*args, **kwargs)


def _store(program: Program, node: fx.Node, value: Any) -> None:
    """Replace a node by a stored tensor, unless that would make the file much larger."""
    if not isinstance(value, Tensor) or not _is_worth_it(program, node, value):
        return
    name = program.add_tensor(f"constants.{node.name}_value", value.clone().contiguous())
    with program.graph.inserting_before(node):
        made = program.graph.get_attr(name)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)


def _is_worth_it(program: Program, node: fx.Node, value: Tensor) -> bool:
    held: set[str] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        if here.op == "get_attr":
            held.add(str(here.target))
        stack += here.all_input_nodes
    inputs = sum(math.prod(program.tensor(name).shape) for name in held)
    return value.numel() <= inputs + _LARGEST_GROWTH
