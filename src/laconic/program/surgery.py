"""The only writer of graphs: cutting axes, replacing tensors, removing what nobody reads."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, fx

from laconic.core.errors import SurgeryError
from laconic.program import axes, rewrites
from laconic.program.equations import Dims, Equations
from laconic.program.groups import Groups
from laconic.program.groups import groups as find_groups
from laconic.program.program import Program

Changes: TypeAlias = dict[str, dict[int, Tensor]]


def cut(
    program: Program,
    keep: Mapping[str, Tensor | Sequence[int]],
    groups: Groups | None = None,
) -> tuple[Program, Changes]:
    """Keep only the given indices of the given groups.

    Every stored tensor of a group is sliced and every constant that follows a size is rewritten;
    what an operator derives from a size (the scale of attention) is pinned to its old value.

    Args:
        program: left untouched; the result shares the tensors that did not change.
        keep: group name → indices that stay (any order, at least one). Groups not named stay whole.
        groups: what `groups(program)` returned, if it is at hand.

    Returns:
        The smaller program, and tensor name → dimension → int64 positions that were kept, for
        dimensions that shrank.

    Raises:
        SurgeryError: an unknown or frozen group, bad indices, or a graph that does not fit
            afterwards (names the node).
    """
    groups = groups if groups is not None else find_groups(program)
    kept = groups.kept(keep)
    equations = groups.equations
    if equations.program is not program:
        raise SurgeryError("these groups belong to another program", hint="call groups(program)")
    sizes = {atom: len(indices) for atom, indices in kept.items()}
    result = program.clone()
    nodes = dict(zip(program.graph.nodes, result.graph.nodes, strict=True))
    changes: Changes = {}
    for name, dims in equations.tensors.items():
        tensor = program.tensor(name).detach()
        for dim, term in enumerate(dims):
            if axes.new_size(term, sizes) != term.size:
                where = axes.positions(term, kept)
                changes.setdefault(name, {})[dim] = where
                tensor = tensor.index_select(dim, where.to(tensor.device))
        if name in changes:
            result.set_tensor(name, tensor)
    step = rewrites.Cut(result, nodes.__getitem__, kept, sizes)
    for rewrite in equations.rewrites:
        rewrite.apply(step)
    result.recompile()
    result.propagate()
    _check(equations, nodes, step)
    return result, changes


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
