"""Reading intermediate values of a Program: its graph gives them as further outputs for a while."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, fx

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.program.program import Program
from laconic.program.sites import Sites

Alike = Callable[[tuple[int, ...], tuple[int, ...]], bool]
"""Whether values of two shapes, the student's and the teacher's, can be compared."""
T = TypeVar("T")

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


def equal(mine: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Shapes that are the same."""
    return mine == other


def matched(
    student: Program,
    teacher: Program,
    nodes: Sequence[str] | Mapping[str, str] | None,
    alike: Alike = equal,
) -> dict[str, str]:
    """Nodes of a student and of its teacher that hold the same thing: name → teacher's name.

    Args:
        student: the changed Program.
        teacher: the Program it comes from, or another one that takes the same inputs.
        nodes: pairs, which are only checked; or globs over names that both have, of which those of
            shapes that are alike are taken; None takes the sums (ends of residual blocks), at most
            eight, spread evenly, and where there are none any node that both have. Sums go by name
            where the last one of the student has a namesake in the teacher, else by stage: runs of
            sums of one resolution, first with first, the ends of both together.
        alike: whether two shapes can be compared.

    Raises:
        RecipeError: a pair whose nodes do not exist or differ in shape, globs without a match, or
            nothing that could be compared.
    """
    ours, theirs = _shapes(student, student.example), _shapes(teacher, student.example)
    if isinstance(nodes, Mapping):
        for mine, other in nodes.items():
            _check_pair(mine, other, ours, theirs, alike)
        return dict(nodes)
    same = [name for name in ours if name in theirs and alike(ours[name], theirs[name])]
    if nodes is not None:
        return {name: name for name in Sites.of(list(nodes)).choose(same)}
    sums = _sums(student, ours)
    named = [name for name in same if name in sums]
    if sums and not _end_together(sums, _sums(teacher, theirs), named):
        pairs = _by_stage(sums, _sums(teacher, theirs), ours, theirs, alike)
        if pairs:
            return dict(_spread(pairs, MOST))
    if not named and not same:
        raise RecipeError(
            "program and teacher have no node of one name and shape, nor blocks that end alike",
            where="nodes",
            hint="give pairs {node: the teacher's node}",
        )
    return {name: name for name in _spread(named or same, MOST)}


def _sums(program: Program, known: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [n.name for n in program.graph.nodes if n.target in _SUMS and n.name in known]


def _end_together(ours: Sequence[str], theirs: Sequence[str], named: Sequence[str]) -> bool:
    """Whether names suit: the last sum of one is the last sum of the other, or there is as many."""
    return bool(named) and (len(ours) == len(theirs) or ours[-1] == theirs[-1])


def _by_stage(
    ours: Sequence[str],
    theirs: Sequence[str],
    mine: Mapping[str, tuple[int, ...]],
    other: Mapping[str, tuple[int, ...]],
    alike: Alike,
) -> list[tuple[str, str]]:
    """Pairs of sums of equal depth within stages of equal number; () if the stages differ."""
    left, right = _stages(ours, mine), _stages(theirs, other)
    if len(left) != len(right):
        return []
    pairs: list[tuple[str, str]] = []
    for first, second in zip(left, right, strict=True):
        some, many = (first, second) if len(first) <= len(second) else (second, first)
        spread = [many[(index + 1) * len(many) // len(some) - 1] for index in range(len(some))]
        pairs += (
            zip(first, spread, strict=True) if some is first else zip(spread, second, strict=True)
        )
    return [(a, b) for a, b in pairs if alike(mine[a], other[b])]


def _stages(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Runs of values of one resolution: of images the pixels, else rank and tokens."""
    stages: list[list[str]] = []
    last: tuple[int, ...] | None = None
    for name in names:
        shape = shapes[name]
        kind = shape[2:] if len(shape) > 3 else (len(shape), *shape[1:-1])
        if kind != last:
            stages.append([])
        stages[-1].append(name)
        last = kind
    return stages


def _shapes(program: Program, example: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the float values that the graph computes from its inputs, by node name."""
    program.propagate(example)
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
    alike: Alike,
) -> None:
    for name, known, whose in ((mine, ours, "program"), (other, theirs, "original")):
        if name not in known:
            raise RecipeError(
                f"the {whose} has no float node {name!r}", where="nodes", hint=nearest(name, known)
            )
    if not alike(ours[mine], theirs[other]):
        wanted = "equal shapes" if alike is equal else "shapes that differ in width only"
        raise RecipeError(
            f"{mine} has shape {list(ours[mine])} and {other} of the original "
            f"{list(theirs[other])}; this loss compares {wanted}",
            where="nodes",
        )


def _spread(names: Sequence[T], most: int) -> list[T]:
    """At most `most` of the names, evenly spaced, the last one among them."""
    count = min(most, len(names))
    return [names[(index + 1) * len(names) // count - 1] for index in range(count)]
