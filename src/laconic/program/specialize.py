"""Fix dynamic dimensions of a Program: shape arithmetic becomes numbers.

A Program whose sizes are fixed needs no `sym_size` and no arithmetic on sizes, and what was built
from them (positions, causal masks) depends on nothing but stored tensors any more: it can be
computed once (`solvers.layers.constants`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from laconic.core.errors import DataError, SurgeryError
from laconic.core.suggest import nearest
from laconic.program.program import Program

Sizes = Mapping[str, int]
_PROBE = 3  # how much larger the dimensions that stay dynamic are in the second run


def dimensions(program: Program) -> dict[str, int]:
    """Names of the dynamic dimensions, in order of their inputs → size in the example."""
    found: dict[str, int] = {}
    for node, tensor in zip(program.placeholders, program.example, strict=True):
        for dim, name in sorted(program.dynamic.get(node.name, {}).items()):
            found.setdefault(name, tensor.shape[dim])
    return found


def specialize(program: Program, sizes: Sizes) -> Program:
    """The Program for fixed `sizes` of its dynamic dimensions; those not named stay dynamic.

    Its example inputs are the old ones, repeated or cut to the sizes.

    Raises:
        DataError: no dynamic dimension, a name that is none, a size below 1, or sizes that an
            operator of the graph refuses.
    """
    check_names(program, sizes)
    made = program.clone()
    made.example = resized(program, sizes)
    made.dynamic = _left(program, sizes)
    numbers = _numbers(made, sizes)
    for node in list(made.graph.nodes):
        if node.name in numbers:
            _write(node, numbers[node.name])
    made.graph.eliminate_dead_code()
    made.drop_unused()
    made.propagate()
    made.recompile()
    return made


def check_names(program: Program, sizes: Sizes) -> None:
    """Refuse sizes that name no dynamic dimension, or are below 1.

    Raises:
        DataError: see above.
    """
    known = dimensions(program)
    if not known:
        shapes = [list(tensor.shape) for tensor in program.example]
        raise DataError(
            f"no dimension of the inputs is dynamic: it takes shapes {shapes} and is specialised "
            "already",
            where="program",
            hint='capture(model, example, dynamic=("batch", "sequence")) leaves them open',
        )
    for name, size in sizes.items():
        if name not in known:
            raise DataError(
                f"no dynamic dimension named {name!r}", where="sizes", hint=nearest(name, known)
            )
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise DataError(f"{name} is {size!r}, expected a number from 1 on", where="sizes")


def resized(program: Program, sizes: Sizes) -> tuple[Tensor, ...]:
    """The example inputs, repeated or cut to `sizes`."""
    made: list[Tensor] = []
    for node, tensor in zip(program.placeholders, program.example, strict=True):
        for dim, name in program.dynamic.get(node.name, {}).items():
            if name in sizes and tensor.shape[dim] != sizes[name]:
                index = torch.arange(sizes[name], device=tensor.device) % tensor.shape[dim]
                tensor = tensor.index_select(dim, index)
        made.append(tensor)
    return tuple(made)


def shapes_of(program: Program, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Input → shape at `sizes`, what `Runtime.load` takes."""
    found: dict[str, tuple[int, ...]] = {}
    for node, tensor in zip(program.placeholders, program.example, strict=True):
        named = program.dynamic.get(node.name, {})
        found[node.name] = tuple(
            sizes.get(named.get(dim, ""), size) for dim, size in enumerate(tensor.shape)
        )
    return found


def _left(program: Program, sizes: Sizes) -> dict[str, dict[int, str]]:
    """The dynamic dimensions that are not fixed."""
    left = {
        node: {dim: name for dim, name in dims.items() if name not in sizes}
        for node, dims in program.dynamic.items()
    }
    return {node: dims for node, dims in left.items() if dims}


def _numbers(program: Program, sizes: Sizes) -> dict[str, Any]:
    """Node → its value, for nodes that give a number which the dimensions left do not change."""
    found = _run(program, program.example, sizes)
    if not program.dynamic:
        return found
    left = {name: size + _PROBE for name, size in dimensions(program).items()}
    other = _run(program, resized(program, left), sizes)
    return {name: value for name, value in found.items() if other.get(name) == value}


def _run(program: Program, example: Sequence[Tensor], sizes: Sizes) -> dict[str, Any]:
    try:
        program.propagate(example)
    except SurgeryError as error:
        told = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise DataError(f"cannot take {told}: {error.message}", where=error.where) from error
    return {
        node.name: node.meta["shape"]
        for node in program.graph.nodes
        if node.op == "call_function"
        and node.meta["dtype"] is None
        and isinstance(node.meta["shape"], (bool, int, float))
    }


def _write(node: fx.Node, number: Any) -> None:
    """Every user of `node` gets the number itself."""

    def known(source: fx.Node) -> Any:
        return number if source is node else source

    for user in list(node.users):
        user.args = fx.map_arg(user.args, known)
        user.kwargs = fx.map_arg(user.kwargs, known)
