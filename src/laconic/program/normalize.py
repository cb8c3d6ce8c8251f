"""From the graph that `torch.export` gives to the flat graph of a Program.

Guards and assertions go, regions of disabled gradients are inlined, in-place operators become
their functional twins, tied tensors get one name, and operators that do nothing are dropped.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph import CodeGen

from laconic.core.errors import CaptureError
from laconic.program.program import Program

_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
_ASSERTIONS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range"}
_VIEWS = frozenset(
    ("select", "slice", "view", "transpose", "unsqueeze", "squeeze", "permute", "expand", "t")
    + ("as_strided", "narrow", "reshape", "flatten", "split", "chunk", "unbind", "alias")
)

Tensors = dict[str, Tensor]


def flatten_export(
    exported: ExportedProgram, model: nn.Module
) -> tuple[fx.Graph, Tensors, dict[str, str], list[fx.Node]]:
    """The flat graph, its tensors, the aliases of tied ones, and the input nodes in order.

    Raises:
        CaptureError: the model writes into a buffer or an input while it runs.
    """
    module = exported.module(check_guards=False)
    _inline_wrappers(module)
    if _writes_through_a_view(module.graph):
        exported = exported.run_decompositions({})
        module = exported.module(check_guards=False)
        _inline_wrappers(module)
    graph = module.graph
    _set_origins(graph)
    _drop_assertions(graph)
    _make_functional(graph)
    _free_memory_format(graph)
    tensors, aliases = _collect_tensors(module, model)
    _rename_tied(graph, aliases)
    _flat_output(graph)
    graph.set_codegen(CodeGen())
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    persistent = set(model.state_dict())
    tensors = {n: t for n, t in tensors.items() if n in used or n in persistent}
    return graph, tensors, {a: n for a, n in aliases.items() if n in tensors}, inputs


def _set_origins(graph: fx.Graph) -> None:
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        last = next(reversed(stack.values()), ("", ""))
        node.meta = {"origin": last[0]}


def _inline_wrappers(module: fx.GraphModule) -> None:
    """Replace wrapped regions (no_grad, autocast) by their bodies."""
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name not in _WRAPPERS:
            continue
        first = _WRAPPERS[name]
        if name == "wrap_with_autocast" and node.args[2]:
            raise CaptureError(
                "the model switches autocast on while it runs",
                where=node.name,
                hint="capture it in float32, outside of autocast",
            )
        body_node, inputs = node.args[first], node.args[first + 1 :]
        body = cast(fx.GraphModule, module.get_submodule(body_node.target))
        _inline_wrappers(body)
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        mapping: dict[fx.Node, Any] = dict(zip(places, inputs, strict=True))
        for inner in [n for n in body.graph.nodes if n.op == "get_attr"]:
            held = f"{body_node.target}_{inner.target}".replace(".", "_")
            _set_attribute(module, held, _get_attribute(body, inner.target))
            inner.target = held
        with module.graph.inserting_before(node):
            outputs = module.graph.graph_copy(body.graph, mapping)
        _replace_outputs(node, outputs)
        module.graph.erase_node(node)
        if not body_node.users:
            module.graph.erase_node(body_node)


def _replace_outputs(node: fx.Node, outputs: Any) -> None:
    for user in list(node.users):
        user.replace_all_uses_with(outputs[user.args[1]])
        node.graph.erase_node(user)


def _get_attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _set_attribute(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        name = base_name(node)
        guard = node.op == "call_module" and node.target == "_guards_fn"
        if guard or (name in _ASSERTIONS and not node.users):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            mutable = node.op == "call_function" and _is_mutable(node)
            if not mutable:
                graph.erase_node(node)


def base_name(node: fx.Node) -> str:
    """`conv2d` for a node that calls `aten.conv2d.default`; "" for anything but a call."""
    target = node.target
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", "")


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _writes_through_a_view(graph: fx.Graph) -> bool:
    for node in graph.nodes:
        if node.op != "call_function" or not _is_mutable(node):
            continue
        if _functional_twin(node.target) is None:
            return True
        source = node.args[0]
        if (
            isinstance(source, fx.Node)
            and base_name(source) in _VIEWS
            and _is_read_elsewhere(source)
        ):
            return True
    return False


def _is_read_elsewhere(view: fx.Node) -> bool:
    """Whether anybody but this chain of views reads what the view shows."""
    while base_name(view) in _VIEWS and isinstance(view.args[0], fx.Node):
        view = view.args[0]
        if len(view.users) > 1 or view.op != "call_function":
            return True
    return False


def _functional_twin(target: Any) -> Any:
    """`aten.relu.default` for `aten.relu_.default`."""
    space, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, space), name.rstrip("_"), None)
    if packet is None or not name.endswith("_"):
        return None
    overload = target._schema.overload_name or "default"
    return getattr(packet, overload, None)


def _make_functional(graph: fx.Graph) -> None:
    """In-place operators become functional; later readers read the new value."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_mutable(node):
            continue
        twin, source = _functional_twin(node.target), node.args[0]
        if twin is None or (
            isinstance(source, fx.Node) and source.op in ("placeholder", "get_attr")
        ):
            if not node.users and isinstance(source, fx.Node) and source.op == "get_attr":
                graph.erase_node(node)  # a counter nobody reads
                continue
            raise CaptureError(
                f"{node.target} writes into {source}",
                where=node.meta.get("origin") or node.name,
                hint="a Program has no side effects: write the model without in-place updates "
                "of inputs and buffers",
            )
        node.target = twin
        order = {n: i for i, n in enumerate(graph.nodes)}
        if isinstance(source, fx.Node):
            source.replace_all_uses_with(node, lambda user: order[user] > order[node])  # noqa: B023


def _free_memory_format(graph: fx.Graph) -> None:
    """A view becomes a reshape: a Program also runs channels-last, where some views cannot be."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target == torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _collect_tensors(module: fx.GraphModule, model: nn.Module) -> tuple[Tensors, dict[str, str]]:
    """Every tensor under one name, and the other names of tied ones."""
    used = [n.target for n in module.graph.nodes if n.op == "get_attr"]
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    everything: dict[str, Tensor] = {**named, **buffers}
    for name in used:
        if name not in everything:
            everything[name] = _get_attribute(module, name)
    order = [n for n in used if n in everything] + [n for n in everything if n not in set(used)]
    tensors: Tensors = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name in dict.fromkeys(order):
        tensor = everything[name]
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        value = tensor.detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        trains = is_parameter and (tensor.requires_grad or name in named)
        tensors[name] = nn.Parameter(value, tensor.requires_grad) if trains else value
    return tensors, aliases


def _rename_tied(graph: fx.Graph, aliases: dict[str, str]) -> None:
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = aliases.get(node.target, node.target)


def _flat_output(graph: fx.Graph) -> None:
    """The output becomes a flat tuple of the tensors in it."""
    node = graph.output_node()
    flat: list[Any] = []

    def gather(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for item in value:
                gather(item)
        elif isinstance(value, fx.Node):
            flat.append(value)

    gather(node.args[0])
    node.args = (tuple(flat),)


def arrange_placeholders(
    graph: fx.Graph, inputs: Sequence[fx.Node], tensor_inputs: Sequence[int]
) -> None:
    """Keep only tensor inputs, in the order of the example's leaves.

    Raises:
        CaptureError: a constant input is read by the graph.
    """
    kept = [inputs[i] for i in tensor_inputs]
    for node in inputs:
        if node not in kept:
            if node.users:
                raise CaptureError("a plain number as input cannot vary", where=node.name)
            graph.erase_node(node)
    anchor = next(node for node in graph.nodes if node not in kept)
    for node in kept:
        anchor.prepend(node)


def drop_identities(program: Program) -> None:
    """Remove operators that give their input back (no-op slices, casts, aliases)."""
    for node in list(program.graph.nodes):
        name = base_name(node)
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or "shape" not in node.meta:
            continue
        same: bool = node.meta["shape"] == source.meta.get("shape")
        same = same and bool(node.meta["dtype"] == source.meta.get("dtype"))
        if same and (
            name in {"alias", "detach", "detach_", "lift_fresh_copy", "to", "_to_copy"}
            or (name == "slice" and _is_whole_slice(node))
        ):
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)


def _is_whole_slice(node: fx.Node) -> bool:
    start, end, step = (*node.args[2:5], *(None, None, 1)[len(node.args) - 2 :])
    return bool(start in (None, 0) and step == 1 and end in (None, 2**63 - 1))


def lost_in_eval(model: nn.Module, graph: fx.Graph) -> list[str]:
    """What training behaviour an eval capture has lost, in words."""
    kept = {
        str(node.meta.get("origin", ""))
        for node in graph.nodes
        if node.op == "call_function" and "dropout" in base_name(node)
    }
    gone: list[str] = []
    for path, module in model.named_modules():
        kind = type(module).__name__
        rate = getattr(module, "p", getattr(module, "drop_prob", 0.0))
        random = "drop" in kind.lower() and isinstance(rate, float) and rate > 0
        if random and path not in kept:
            gone.append(f"{path}: {kind}({rate}) does nothing in eval mode and is not in the graph")
    attention = [n for n in graph.nodes if base_name(n) == "scaled_dot_product_attention"]
    for node in attention:
        owner = _submodule(model, str(node.meta.get("origin", "")))
        for field in ("attention_dropout", "dropout_prob", "dropout"):
            rate = getattr(owner, field, 0.0)
            if isinstance(rate, float) and rate > 0:
                gone.append(f"{node.meta['origin']}: dropout {rate} inside attention is lost")
                break
    return gone


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model
