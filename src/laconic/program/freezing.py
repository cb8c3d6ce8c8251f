"""Weights as integers and back: the two states of a form in a graph, equal bit for bit.

Training, a quantised weight is a float master copy behind `laconic.fake_quantize` (on a uniform
grid) or `laconic.fake_levels` (on fixed levels); frozen, it is the integer codes behind
`laconic.dequantize` or `laconic.levels`. What no runtime computes with (codebooks, shared
bases, vectors, buckets) has one state only and passes unchanged. The grid of a frozen weight stands
in the node's `meta["grid"]` as `(qmin, qmax)`; where it is missing (an older file) the smallest
signed grid that is symmetric and holds the codes is taken.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.core.errors import StorageError
from laconic.forms import affine, levels
from laconic.forms.affine import Affine
from laconic.forms.base import Form
from laconic.forms.basis import Basis
from laconic.forms.codebook import Codebook
from laconic.forms.dense import Dense
from laconic.forms.hashed import Hashed
from laconic.forms.levels import Levels
from laconic.forms.vectors import Vectors
from laconic.program.program import (
    COMBINE,
    DEQUANTIZE,
    FAKE_LEVELS,
    FAKE_QUANTIZE,
    FAKES,
    HASHED,
    LEVELS,
    LOOKUP,
    STORED,
    VECTORS,
    Program,
)

_STORED: dict[Any, Any] = {
    LEVELS: Levels,
    LOOKUP: Codebook,
    COMBINE: Basis,
    VECTORS: Vectors,
    HASHED: Hashed,
}


def freeze(program: Program) -> Program:
    """A Program whose fake-quantised weights are stored as integer codes; same outputs, bitwise.

    A weight that is also read without its quantisation node, or through different grids, stays a
    float master copy. Activations keep their fake quantisation.

    Raises:
        StorageError: a weight holds NaN or infinite values; names it.
    """
    made = program.clone()
    for name, nodes in _quantised(made, FAKE_QUANTIZE, FAKE_LEVELS).items():
        first = nodes[0]
        if any((node.target, node.args[1:]) != (first.target, first.args[1:]) for node in nodes):
            continue
        held = _gridded(made, first, name)
        made.set_tensor(name, held.codes)
        for node in nodes:
            if isinstance(held, Affine):
                node.target = DEQUANTIZE
                node.args = node.args[:4]
                node.meta["grid"] = (held.qmin, held.qmax)
            else:
                node.target = LEVELS
            _retype(node, held.codes)
    made.recompile()
    return made


def thaw(program: Program) -> Program:
    """The inverse of `freeze`: float master copies again; same outputs, bitwise."""
    made = program.clone()
    for name, nodes in _quantised(made, DEQUANTIZE, LEVELS).items():
        held = _gridded(made, nodes[0], name)
        made.set_tensor(name, nn.Parameter(held.decode()))
        for node in nodes:
            if isinstance(held, Affine):
                node.target = FAKE_QUANTIZE
                node.args = (*node.args[:4], held.qmin, held.qmax)
            else:
                node.target = FAKE_LEVELS
            _retype(node, held.scale)
    made.recompile()
    return made


def plain(program: Program) -> Program:
    """A copy whose weights reach their operators as dense floats, under their own names.

    For scores and statistics: quantisation nodes of weights are passed by, codebooks looked up.
    Codes that several operators read stay as they are.
    """
    made = thaw(program)
    for node in list(made.graph.nodes):
        held = node.args[0] if node.args else None
        if not isinstance(held, fx.Node) or held.op != "get_attr":
            continue
        if node.target is LOOKUP and len(held.users) == 1:
            given = [made.tensor(str(a.target)) if isinstance(a, fx.Node) else a
                     for a in node.args]  # fmt: skip
            made.set_tensor(str(held.target), nn.Parameter(node.target(*given).detach()))
        elif node.target not in FAKES:
            continue
        node.replace_all_uses_with(held)
        made.graph.erase_node(node)
    made.propagate()
    made.recompile()
    return made


def is_frozen(program: Program) -> bool:
    """Whether any weight is stored as integer codes."""
    return any(node.target in (DEQUANTIZE, LEVELS) for node in program.graph.nodes)


def form_of(program: Program, name: str) -> Form:
    """How the tensor `name` is written down: the form of the node behind it, else dense.

    A codebook is found by the name of its codes, a basis by that of its coefficients, vectors by
    that of their codes.

    Raises:
        SurgeryError: the program has no such tensor.
    """
    tensor = program.tensor(name)
    name = program.aliases.get(name, name)
    for kind in (*FAKES, DEQUANTIZE):
        nodes = _quantised(program, kind).get(name)
        if nodes and all(node.args[1:] == nodes[0].args[1:] for node in nodes):
            return _gridded(program, nodes[0], name)
    for node in program.graph.nodes:
        if node.target not in STORED:
            continue
        sources: Any = node.all_input_nodes
        if all(s.op == "get_attr" for s in sources) and str(sources[0].target) == name:
            parts: Any = [program.tensor(str(s.target)).detach() for s in sources]
            rest: Any = node.args[len(parts) :]
            return _STORED[node.target](*parts, *rest)
    return Dense(tensor.detach())


def _quantised(program: Program, *kinds: Any) -> dict[str, list[fx.Node]]:
    """Stored tensor → its nodes of these kinds; only tensors that nothing else reads."""
    found: dict[str, list[fx.Node]] = {}
    mixed: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        for user in node.users:
            if user.target in kinds and user.args[0] is node and _has_stored_grid(user):
                found.setdefault(str(node.target), []).append(user)
            else:
                mixed.add(str(node.target))
    return {name: nodes for name, nodes in found.items() if name not in mixed}


def _has_stored_grid(node: fx.Node) -> bool:
    sides = node.args[1:2] if node.target in (FAKE_LEVELS, LEVELS) else node.args[1:3]
    return all(isinstance(side, fx.Node) and side.op == "get_attr" for side in sides)


def _gridded(program: Program, node: fx.Node, name: str) -> Affine | Levels:
    """The form that a quantisation node of the stored tensor `name` stands for.

    Raises:
        StorageError: the tensor holds NaN or infinite values.
    """
    try:
        return (
            _affine(program, node)
            if node.target in (FAKE_QUANTIZE, DEQUANTIZE)
            else _levels(program, node)
        )
    except StorageError as error:
        raise StorageError(error.message, where=name, hint=error.hint) from error


def _levels(program: Program, node: fx.Node) -> Levels:
    sources: Any = node.args[:2]
    tensor, scale = (program.tensor(str(source.target)).detach() for source in sources)
    rest: Any = node.args[2:]
    if node.target is FAKE_LEVELS:
        tensor = levels.encode(tensor, scale, *rest)
    return Levels(tensor, scale, *rest)


def _affine(program: Program, node: fx.Node) -> Affine:
    sources: Any = node.args[:3]
    tensor, scale, zero = (program.tensor(str(source.target)).detach() for source in sources)
    axis: Any = node.args[3]
    if node.target is FAKE_QUANTIZE:
        qmin, qmax = _whole(node.args[4]), _whole(node.args[5])
        tensor = affine.encode(tensor, scale, zero, axis, qmin, qmax)
    else:
        qmin, qmax = node.meta.get("grid") or _smallest_grid(tensor)
    return Affine(tensor, scale, zero, axis, int(qmin), int(qmax))


def _whole(value: Any) -> int:
    return int(value)


def _smallest_grid(codes: Tensor) -> tuple[int, int]:
    low, high = (int(v) for v in torch.aminmax(codes)) if codes.numel() else (0, 0)
    bits = 2
    while not (1 - 2 ** (bits - 1) <= low and high < 2 ** (bits - 1)):
        bits += 1
    return 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1


def _retype(node: fx.Node, tensor: Tensor) -> None:
    source: Any = node.args[0]
    if "dtype" in source.meta:
        source.meta["dtype"] = tensor.dtype
