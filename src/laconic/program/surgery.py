"""The only writer of graphs: cutting axes, replacing tensors, removing what nobody reads."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, fx

from laconic.core.errors import SurgeryError
from laconic.program import axes, rewrites
from laconic.program.axes import Atom
from laconic.program.equations import Dims, Equations
from laconic.program.groups import Groups
from laconic.program.groups import groups as find_groups
from laconic.program.program import Program

Changes: TypeAlias = dict[str, dict[int, Tensor]]


def cut(
    program: Program,
    keep: Mapping[str, Tensor | Sequence[int]],
    groups: Groups | None = None,
    *,
    checked: bool = True,
) -> tuple[Program, Changes]:
    """Keep only the given indices of the given groups.

    Every stored tensor of a group is sliced and every constant that follows a size is rewritten;
    what an operator derives from a size (the scale of attention) is pinned to its old value.

    Args:
        program: left untouched; the result shares the tensors that did not change.
        keep: group name → indices that stay (any order, at least one). Groups not named stay whole.
        groups: what `groups(program)` returned, if it is at hand.
        checked: run the result on fake tensors and compare shapes. Without it the graph's notes of
            shapes are those of before; ten times as fast, for one of many cuts of the same groups.

    Returns:
        The smaller program, and tensor name → dimension → int64 positions that were kept, for
        dimensions that shrank.

    Raises:
        SurgeryError: an unknown or frozen group, bad indices, or a graph that does not fit
            afterwards (names the node).
    """
    groups = groups if groups is not None else find_groups(program)
    kept = _kept(program, keep, groups)
    result = program.clone()
    nodes = dict(zip(program.graph.nodes, result.graph.nodes, strict=True))
    changes = _positions(groups.equations, kept)
    for name, dims in changes.items():
        result.set_tensor(name, sliced(program.tensor(name).detach(), dims))
    step = rewrites.Cut(result, nodes.__getitem__, kept, _sizes_of(kept))
    _rewrite(groups.equations, nodes, step, checked)
    return result, changes


def cut_(
    program: Program,
    keep: Mapping[str, Tensor | Sequence[int]],
    groups: Groups | None = None,
) -> Changes:
    """As `cut`, but in place: nodes and tensors stay the objects they are, so training goes on.

    Gradients of the tensors that shrank are dropped; what an optimizer holds beside them has to be
    cut with `sliced`. Values and modes are those of `program` as it is. Other Programs that share
    its memory keep theirs.

    Raises:
        SurgeryError: as `cut`; where the graph does not fit afterwards, the program is spoilt.
    """
    groups = groups if groups is not None else find_groups(program)
    kept = _kept(program, keep, groups)
    nodes = {node: node for node in program.graph.nodes}
    changes = _positions(groups.equations, kept)
    for name, dims in changes.items():
        tensor = program.tensor(name)
        tensor.grad = None
        tensor.data = sliced(tensor.detach(), dims)
    _rewrite(
        groups.equations, nodes, rewrites.Cut(program, nodes.__getitem__, kept, _sizes_of(kept))
    )
    return changes


def sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """`tensor` with only the positions `kept` of some dimensions, in the memory layout it had."""
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    for dim, where in kept.items():
        tensor = tensor.index_select(dim, where.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def _kept(
    program: Program, keep: Mapping[str, Tensor | Sequence[int]], groups: Groups
) -> dict[Atom, Tensor]:
    if groups.equations.program is not program:
        raise SurgeryError("these groups belong to another program", hint="call groups(program)")
    return groups.kept(keep)


def _sizes_of(kept: Mapping[Atom, Tensor]) -> dict[Atom, int]:
    return {atom: len(indices) for atom, indices in kept.items()}


def _positions(equations: Equations, kept: Mapping[Atom, Tensor]) -> Changes:
    """Tensor → dimension → positions that stay, for dimensions that shrink."""
    sizes = _sizes_of(kept)
    return {
        name: shrunk
        for name, dims in equations.tensors.items()
        if (
            shrunk := {
                dim: axes.positions(term, kept)
                for dim, term in enumerate(dims)
                if axes.new_size(term, sizes) != term.size
            }
        )
    }


def _rewrite(
    equations: Equations,
    nodes: Mapping[fx.Node, fx.Node],
    step: rewrites.Cut,
    checked: bool = True,
) -> None:
    for rewrite in equations.rewrites:
        rewrite.apply(step)
    step.program.recompile()
    if checked:
        step.program.propagate()
        _check(equations, nodes, step)


def _check(equations: Equations, nodes: Mapping[fx.Node, fx.Node], step: rewrites.Cut) -> None:
    """Every node has the sizes that its terms foretell."""
    for old, terms in equations.terms.items():
        new = nodes[old]
        if old.op != "call_function" or "shape" not in new.meta or not new.users:
            continue
        several = isinstance(terms, list)
        foretold = [_sizes(dims, step) for dims in terms] if several else _sizes(terms, step)
        shape = new.meta["shape"]
        found = [tuple(s or ()) for s in shape] if several else tuple(shape)
        if found != foretold:
            raise SurgeryError(
                f"shape {found} after the cut, expected {foretold}",
                where=equations.place(old),
                hint="keep the groups of this operator whole, and report its name",
            )


def _sizes(dims: Dims, step: rewrites.Cut) -> tuple[int, ...]:
    return tuple(step.size(term) for term in dims)


def replace_tensor(program: Program, node: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    """Give the readers of `node` a new stored tensor instead; returns its node.

    Args:
        program: changed in place; call `recompile()` when done.
        node: any node of the program; left without users.
        name: wanted name of the new tensor (a taken one gets a number).
        tensor: a parameter or a buffer.
    """
    stored = program.add_tensor(name, tensor)
    with program.graph.inserting_before(node):
        made = program.graph.get_attr(stored)
    made.meta = {
        "origin": node.meta.get("origin", ""),
        "shape": tuple(tensor.shape),
        "dtype": tensor.dtype,
    }
    node.replace_all_uses_with(made)
    return made


def remove_dead(program: Program) -> list[str]:
    """Remove nodes without users and tensors nobody reads, in place; returns the tensors' names."""
    for node in reversed(list(program.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            program.graph.erase_node(node)
    program.recompile()
    return program.drop_unused()
