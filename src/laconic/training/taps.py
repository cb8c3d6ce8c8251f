"""Reading intermediate values of a Program: its graph gives them as further outputs for a while."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import fx

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.program.program import Program
from laconic.program.sites import Sites

_Shapes = Mapping[str, tuple[int, ...]]

MOST = 8
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@contextmanager
def tapped(program: Program, names: Sequence[str]) -> Generator[None, None, None]:
    """For the length of a `with` block, `program.run_flat` gives `names`' values after its outputs.

    Raises:
        RecipeError: there is no node of such a name.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    for name in names:
        if name not in nodes:
            raise RecipeError(f"no node {name!r}", where="nodes", hint=nearest(name, nodes))
    end = program.output_node
    held = end.args[0]
    if not isinstance(held, (tuple, list)):
        raise RecipeError("the program's output is not a flat tuple", where=end.name)
    try:
        if names:
            end.args = ((*held, *(nodes[name] for name in names)),)
            program.recompile()
        yield
    finally:
        if names:
            end.args = (held,)
            program.recompile()


def matched(
    student: Program, teacher: Program, nodes: Sequence[str] | Mapping[str, str] | None
) -> dict[str, str]:
    """Nodes of a student and of its teacher that hold the same thing: name → teacher's name.

    Args:
        student: the changed Program; both need example inputs of equal shape.
        teacher: the Program it comes from.
        nodes: pairs, which are only checked; or globs over names that both have, of which those of
            equal shape are taken; None takes the sums (ends of residual blocks), at most eight,
            spread evenly, and where there are none any node that both have.

    Raises:
        RecipeError: a pair whose nodes do not exist or differ in shape, or globs without a match.
    """
    ours, theirs = _shapes(student), _shapes(teacher)
    if isinstance(nodes, Mapping):
        for mine, other in nodes.items():
            _check_pair(mine, other, ours, theirs)
        return dict(nodes)
    same = [name for name, shape in ours.items() if theirs.get(name) == shape]
    if nodes is not None:
        return {name: name for name in Sites.of(list(nodes)).choose(same)}
    sums = {node.name for node in student.graph.nodes if node.target in _SUMS}
    chosen = [name for name in same if name in sums] or same
    return {name: name for name in _spread(chosen, MOST)}


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes of the float values that the graph computes from its inputs, by node name."""
    program.propagate()
    found: dict[str, tuple[int, ...]] = {}
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            dtype = node.meta.get("dtype")
            floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
            if node.op == "call_function" and floating:
                found[node.name] = node.meta["shape"]
    return found


def _check_pair(
    mine: str,
    other: str,
    ours: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, tuple[int, ...]],
) -> None:
    for name, known, whose in ((mine, ours, "program"), (other, theirs, "original")):
        if name not in known:
            raise RecipeError(
                f"the {whose} has no float node {name!r}", where="nodes", hint=nearest(name, known)
            )
    if ours[mine] != theirs[other]:
        raise RecipeError(
            f"{mine} has shape {list(ours[mine])} and {other} of the original "
            f"{list(theirs[other])}; feature losses compare equal shapes",
            where="nodes",
        )


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most `most` of the names, evenly spaced, the last one among them."""
    count = min(most, len(names))
    return [names[(index + 1) * len(names) // count - 1] for index in range(count)]
