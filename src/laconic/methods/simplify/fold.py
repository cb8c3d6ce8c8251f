"""Remove work that does not depend on the input, without changing what the model computes.

Batch norm goes into the layer beside it; operators whose inputs are all stored constants are
computed once; operators that give their input back (dropout in eval mode, additions of zero,
copies, views to the same shape) and results that nobody reads go away.

Paper: batch norm folding as in Jacob et al. 2018 (arXiv 1712.05877), section 3.2; the rest is what
every compiler does.

Helps: anything that runs the Program as it is (eager, training of a folded network), files (batch
norm has four vectors a layer), and every later step that looks at weights: a folded network is what
the runtimes run.
Does not: runtimes fold by themselves, so their latency stays. Before training that is to come:
a folded network has no batch statistics any more and, with `dropout`, no dropout.
Cost: milliseconds; no data.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from laconic.core.errors import SurgeryError
from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers import folding

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


class Fold(Method):
    """Options of `simplify.fold`. Sites are names of weights: where batch norm may be folded.

    Attributes:
        batch_norm: fold batch norm into the layer behind or in front of it.
        constants: compute what depends on stored constants only. Trainable tensors are no
            constants.
        identities: remove operators that give their input back.
        dropout: remove dropout, which does nothing in eval mode.
    """

    batch_norm: bool = True
    constants: bool = True
    identities: bool = True
    dropout: bool = True

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """The same function with fewer operators; equal up to float rounding in eval mode."""
        del context
        made = program.clone()
        made.propagate()
        before = _operators(made)
        notes: list[str] = []
        figures: dict[str, Any] = {}
        if self.batch_norm:
            found = folding.fold_batch_norms(made, allow=sites.match)
            notes += found.notes
            figures["batch_norms"] = len(found.folded)
        if self.identities or self.dropout:
            figures["identities"] = self._drop(made, notes)
        if self.constants:
            figures["constants"] = _fold_constants(made)
        made.graph.eliminate_dead_code()
        made.drop_unused()
        made.propagate()
        made.recompile()
        figures["operators"] = [before, _operators(made)]
        if before == _operators(made):
            notes.append("nothing to fold: every operator depends on the input and does something")
        return Outcome(
            program=made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=notes,
            figures=figures,
        )

    def _drop(self, program: Program, notes: list[str]) -> int:
        dropped = dropouts = 0
        elsewhere = _other_shapes(program)
        for node in list(program.graph.nodes):
            source = node.args[0] if node.args else None
            if node.op != "call_function" or not isinstance(source, fx.Node):
                continue
            is_dropout = node.target in _DROPOUT
            same = self.identities and _is_identity(node, source, elsewhere)
            if same or (self.dropout and is_dropout):
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
                dropped += 1
                dropouts += is_dropout
        if dropouts:
            notes.append(f"{dropouts} dropout operators are gone: later training has none")
        return dropped


def _operators(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


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


# constants ------------------------------------------------------------------------------------


def _fold_constants(program: Program) -> int:
    """Compute what depends on buffers and numbers only; returns how many operators went."""
    program.graph.eliminate_dead_code()
    constant: dict[fx.Node, Any] = {}
    before = _operators(program)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            tensor = program.tensor(str(node.target))
            if not tensor.requires_grad and not isinstance(tensor, torch.nn.Parameter):
                constant[node] = tensor
        elif _is_computable(node) and all(source in constant for source in node.all_input_nodes):
            with torch.no_grad():
                constant[node] = _run(node, constant.__getitem__)
    for node in list(program.graph.nodes):
        kept = any(user not in constant for user in node.users)
        if node.op == "call_function" and node in constant and kept:
            _store(program, node, constant[node])
    program.graph.eliminate_dead_code()
    return before - _operators(program)


def _is_computable(node: fx.Node) -> bool:
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.split("::")
    return name[0] == "aten" and name[1] not in _RANDOM and not target._schema.is_mutable


def _run(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    target: Any = node.target
    args = map_arg(node.args, value)
    kwargs = map_arg(node.kwargs, value)
    return target(*args, **kwargs)


def _store(program: Program, node: fx.Node, value: Any) -> None:
    """Replace a node by a stored tensor, unless that would make the file much larger."""
    if not isinstance(value, Tensor) or not _is_worth_it(program, node, value):
        return
    name = program.add_tensor(f"constants.{node.name}", value.clone().contiguous())
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
