"""Layers of a transformer that may lose tokens: their attention, their stream, their padding mask.

A layer is a residual branch with self-attention in it. Its stream is the sum behind that branch,
`[batch, tokens, channels]`: what comes behind it can do with fewer tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from laconic.program.equations import arguments, operator_name
from laconic.program.program import Program
from laconic.program.surgery import remove_dead
from laconic.solvers.layers.attentions import Attention, Mask, attentions
from laconic.solvers.layers.residual import Branch, branches

_SIZE = "aten.sym_size"
_PROBES = 3
_HIDDEN = -1e4  # an additive mask of at most this hides a key


@dataclass(frozen=True)
class Layer:
    """One layer with self-attention.

    Attributes:
        name: of its branch.
        total: the stream behind its attention, `[batch, tokens, channels]`.
        tokens: how many there are.
        queries: `[batch, heads, tokens, size]`, or None where they are not found.
        keys: as queries; of fewer heads where queries share them.
        scale: what products of queries and keys are multiplied by.
    """

    name: str
    total: fx.Node
    tokens: int
    queries: fx.Node | None
    keys: fx.Node | None
    scale: float


def layers(program: Program) -> list[Layer]:
    """All layers that could lose tokens, in graph order; shapes have to be propagated."""
    batch = program.batch_size()
    if not any(program.dynamic.values()):  # all shapes are fixed
        batch = next((held.shape[0] for held in program.example if held.ndim), 1)
    known = {one.core: one for one in attentions(program)}
    found = (_layer(branch, batch, known) for branch in branches(program))
    return [layer for layer in found if layer is not None]


def _layer(branch: Branch, batch: int, known: Mapping[fx.Node, Attention]) -> Layer | None:
    shape = branch.total.meta["shape"]
    if len(shape) != 3 or shape[0] != batch or shape[1] < 2:
        return None
    for one in (known[node] for node in branch.inner if node in known):
        if one.sizes != (shape[1], shape[1]) or one.key not in (None, *branch.inner):
            continue  # not all to all, or keys of somebody else: not self-attention
        query, key = (
            held if _is_stack(held, batch, shape[1], branch) else None
            for held in (one.query, one.key)
        )
        if query is not None and (key is None or query.meta["shape"] != key.meta["shape"]):
            query = None  # several queries share a key
        return Layer(branch.name, branch.total, shape[1], query, key, one.scale)
    return None


def _is_stack(node: fx.Node | None, batch: int, tokens: int, branch: Branch) -> bool:
    shape = () if node is None else node.meta["shape"]
    return len(shape) == 4 and shape[0] == batch and shape[2] == tokens and node in branch.inner


# padding ------------------------------------------------------------------------------------


def mask_input(program: Program, tokens: int) -> fx.Node | None:
    """The one input called a mask, `[batch, tokens]`, of zeros and ones: as `padding_mask`."""
    named = zip(program.placeholders, program.example, strict=True)
    masks = [node for node, held in named if "mask" in node.name and held.ndim == 2]
    if len(masks) != 1 or masks[0].meta["shape"][1] != tokens:
        return None
    return masks[0]


def made_of(program: Program, mask: fx.Node | None) -> set[fx.Node]:
    """Nodes computed from the mask, constants and sizes of inputs (the batch's) alone."""
    if mask is None:
        return set()
    found, other = {mask}, {node for node in program.placeholders if node is not mask}
    for node in program.graph.nodes:
        if operator_name(node) == _SIZE:
            continue
        if any(source in other for source in node.all_input_nodes):
            other.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def take_idle_masks(program: Program) -> None:
    """Take masks that hide nothing from attentions, in place: constants that some models make.

    Only where the batch alone is free: a window may hide nothing at one length and much at another.
    Shapes have to be propagated.
    """
    if any(name != "batch" for dims in program.dynamic.values() for name in dims.values()):
        return
    fed = set(program.placeholders)
    for node in program.graph.nodes:
        if operator_name(node) != _SIZE and any(source in fed for source in node.all_input_nodes):
            fed.add(node)
    found = [mask for one in attentions(program) for mask in one.masks if mask.value not in fed]
    idle = [mask for mask in found if _is_idle(program, mask)]
    for mask in idle:
        mask.take()
    if idle:
        remove_dead(program)


def _is_idle(program: Program, mask: Mask) -> bool:
    with torch.no_grad():
        value = _value(program, mask.value, {})
    return bool((value if value.dtype == torch.bool else value == 0).all())


def hides_padding_only(program: Program, node: fx.Node, mask: fx.Node) -> bool:
    """Whether what an attention is masked with lets real keys pass and hides padded ones.

    It is tried on a few random masks: `node` is computed from the mask and constants alone.
    """
    shape = tuple(mask.meta["shape"])
    generator = torch.Generator().manual_seed(0)
    dtype, device = mask.meta["dtype"], next((t.device for _, t in program.tensors()), None)
    for _ in range(_PROBES):
        real = torch.rand(shape, generator=generator) < 0.5
        real[:, 0] = True
        with torch.no_grad():
            found = _value(program, node, {mask: real.to(device=device, dtype=dtype)}).cpu()
        wanted = real[:, None, None, :].expand(shape[0], 1, found.shape[-2], shape[1])
        if found.ndim != 4 or found.shape[-1] != shape[1]:
            return False
        if found.dtype != torch.bool:
            clear = bool((found[wanted.expand(found.shape)] == 0).all())
            found = found > _HIDDEN
            if not clear:
                return False
        if not torch.equal(found, wanted.expand(found.shape)):
            return False
    return True


def _value(program: Program, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What a node gives that needs only `known` inputs, stored tensors, and sizes of others."""
    if node not in known:
        if node.op == "get_attr":
            known[node] = program.tensor(str(node.target))
        elif operator_name(node) == _SIZE:
            sized: Any = node.args[0]
            known[node] = sized.meta["shape"][arguments(node)["dim"]]
        else:

            def fetch(source: fx.Node) -> Any:
                return _value(program, source, known)

            args: Sequence[Any] = map_arg(node.args, fetch)  # type: ignore[assignment]
            options: Mapping[str, Any] = map_arg(node.kwargs, fetch)  # type: ignore[assignment]
            run: Any = node.target
            known[node] = run(*args, **options)
    return known[node]
