"""Put fake-quantisation nodes into a graph, their tensors beside what they quantise."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from laconic.program.program import FAKE_QUANTIZE, Program
from laconic.solvers.placement import Place, WeightSite
from laconic.solvers.ranges import Grid


def quantize_weight(program: Program, site: WeightSite, axis: int | None, grid: Grid) -> fx.Node:
    """Put one node behind a weight, between it and all its users.

    Its grid is stored as `<weight>_scale` and `<weight>_zero_point`. The program is changed;
    recompile it afterwards.
    """
    first, *others = site.holders
    for other in others:
        other.replace_all_uses_with(first)
        program.graph.erase_node(other)
    return _insert(program, first, list(first.users), site.name, axis, grid)


def quantize_activation(program: Program, place: Place, grid: Grid) -> fx.Node:
    """Put one node behind a tensor of the graph; only the place's users read it.

    Its grid is stored as `activations.<node>_scale` and `activations.<node>_zero_point`.
    """
    name = f"activations.{place.name}"
    return _insert(program, place.source, place.users, name, None, grid)


def _insert(
    program: Program,
    source: fx.Node,
    users: Sequence[fx.Node],
    name: str,
    axis: int | None,
    grid: Grid,
) -> fx.Node:
    graph = program.graph
    origin = {"origin": source.meta.get("origin", "")}
    sides: list[fx.Node] = []
    with graph.inserting_after(_last_input(source)):
        made = graph.create_node("call_function", FAKE_QUANTIZE, (source,), name="fake_quantize")
    with graph.inserting_before(made):
        for suffix, tensor in (("scale", grid.scale), ("zero_point", grid.zero_point)):
            side = graph.get_attr(program.add_tensor(f"{name}_{suffix}", _beside(program, tensor)))
            side.meta = {**origin, "shape": tuple(tensor.shape), "dtype": tensor.dtype}
            sides.append(side)
    made.args = (source, *sides, axis, grid.qmin, grid.qmax)
    made.meta = dict(source.meta)
    for user in users:
        user.replace_input_with(source, made)
    return made


def _last_input(node: fx.Node) -> fx.Node:
    """A node behind which others can stand: inputs stay together at the front."""
    if node.op != "placeholder":
        return node
    inputs: list[Any] = [n for n in node.graph.nodes if n.op == "placeholder"]
    return inputs[-1]


def _beside(program: Program, tensor: Tensor) -> Tensor:
    """The tensor on the program's device."""
    for _, held in program.tensors():
        return tensor.to(held.device)
    return tensor
