"""Put the nodes that stand for forms into a graph, their tensors beside what they decode."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from laconic.forms.codebook import Codebook
from laconic.forms.hashed import Hashed
from laconic.forms.vectors import Vectors
from laconic.program.program import (
    COMBINE,
    DYNAMIC_QUANTIZE,
    FAKE_LEVELS,
    FAKE_QUANTIZE,
    HASHED,
    LOOKUP,
    MEMBER,
    VECTORS,
    Program,
)
from laconic.solvers.quantization.placement import Place
from laconic.solvers.quantization.ranges import Grid
from laconic.solvers.quantization.weight_sites import WeightSite


def quantize_weight(program: Program, site: WeightSite, axis: int | None, grid: Grid) -> fx.Node:
    """Put one node behind a weight, between it and all its users.

    Its grid is stored as `<weight>_scale` and `<weight>_zero_point`. The program is changed;
    recompile it afterwards.
    """
    first = _single(program, site)
    return _insert(program, first, list(first.users), site.name, axis, grid)


def insert_levels(
    program: Program, site: WeightSite, axis: int | None, scale: Tensor, name: str
) -> fx.Node:
    """Put one node behind a weight that moves it to the levels called `name`.

    The scale is stored as `<weight>_scale`. The program is changed; recompile it afterwards.

    Args:
        program: its tensor of the site's name is the float master copy.
        site: the weight.
        axis: what the scales belong to, or None.
        scale: float `[]`, `[n]` or `[n, g]`, positive; a parameter if it is to train.
        name: of the levels, see `forms.levels`.
    """
    first = _single(program, site)
    users = list(first.users)
    return _put(program, first, users, site.name, FAKE_LEVELS, {"scale": scale}, (axis, name))


def insert_lookup(program: Program, site: WeightSite, values: Tensor, form: Codebook) -> fx.Node:
    """Put one node behind codes that stand in a weight's place, between them and all its users.

    The values are stored as `<weight>_codebook`. The program is changed; recompile it afterwards.

    Args:
        program: its tensor of the site's name holds the codes already.
        site: the weight.
        values: of the codebook, a parameter if they are to train.
        form: everything else.
    """
    side = program.add_tensor(f"{site.name}_codebook", values)
    return _behind(program, site, LOOKUP, side, (form.axis, form.group, form.low, form.zero))


def insert_combine(program: Program, site: WeightSite, basis: str) -> fx.Node:
    """Put one node behind coefficients that stand in a weight's place; `basis` is a stored tensor.

    The program is changed; recompile it afterwards.
    """
    return _behind(program, site, COMBINE, basis, ())


def insert_vectors(program: Program, site: WeightSite, side: str, form: Vectors) -> fx.Node:
    """Put one node behind codes that stand in a weight's place; `side` is the stored vectors.

    The program is changed; recompile it afterwards.
    """
    return _behind(program, site, VECTORS, side, (list(form.shape), form.axis))


def insert_hashed(program: Program, site: WeightSite, form: Hashed) -> fx.Node:
    """Put one node behind buckets that stand in a weight's place.

    The program is changed; recompile it afterwards.
    """
    return _behind(program, site, HASHED, None, (list(form.shape), form.seed))


def insert_member(
    program: Program,
    site: WeightSite,
    base: str | None,
    names: Sequence[str],
    sizes: Sequence[int],
) -> fx.Node:
    """Put one node behind the rows of several models; it picks those of the first.

    The program is changed; recompile it afterwards.

    Args:
        program: its tensor of the site's name holds the rows already.
        site: the tensor.
        base: the stored tensor that is added to everybody's rows.
        names: of the models, in the order of the rows.
        sizes: how many rows each has; none where each has one entry.
    """
    made = _behind(program, site, MEMBER, base, (",".join(names), 0, list(sizes)))
    if base is None:
        made.args = (made.args[0], None, *made.args[1:])
    return made


def _behind(
    program: Program, site: WeightSite, target: Any, side: str | None, rest: tuple[Any, ...]
) -> fx.Node:
    """A node that decodes the tensor in a weight's place, with the tensor `side` if there is."""
    first = _single(program, site)
    users, parts = list(first.users), [first]
    if side is not None:
        other = program.tensor(side)
        with program.graph.inserting_after(first):
            parts.append(program.graph.get_attr(side))
        parts[1].meta = {"origin": first.meta.get("origin", ""), "shape": tuple(other.shape)}
        parts[1].meta["dtype"] = other.dtype
    name = str(target).split(".")[1]
    with program.graph.inserting_after(parts[-1]):
        made = program.graph.create_node("call_function", target, (*parts, *rest), name=name)
    made.meta = dict(first.meta)
    stored = program.tensor(site.name)
    first.meta |= {"shape": tuple(stored.shape), "dtype": stored.dtype}
    for user in users:
        user.replace_input_with(first, made)
    return made


def _single(program: Program, site: WeightSite) -> fx.Node:
    """The one node that reads a weight: several become one."""
    first, *others = site.holders
    for other in others:
        other.replace_all_uses_with(first)
        program.graph.erase_node(other)
    return first


def quantize_activation(program: Program, place: Place, grid: Grid) -> fx.Node:
    """Put one node behind a tensor of the graph; only the place's users read it.

    Its grid is stored as `activations.<node>_scale` and `activations.<node>_zero_point`.
    """
    name = f"activations.{place.name}"
    return _insert(program, place.source, place.users, name, None, grid)


def insert_activation_levels(program: Program, place: Place, scale: Tensor, name: str) -> fx.Node:
    """Put one node behind a tensor of the graph that moves it to the levels called `name`.

    Only the place's users read it. The scale, `[]`, is stored as `activations.<node>_scale`.
    """
    stored, sides = f"activations.{place.name}", {"scale": scale}
    return _put(program, place.source, place.users, stored, FAKE_LEVELS, sides, (None, name))


def insert_dynamic(program: Program, place: Place, bits: int, per_token: bool) -> fx.Node:
    """Put one node behind a tensor of the graph that rounds it to a grid over its own range."""
    rest = (bits, per_token)
    return _put(program, place.source, place.users, place.name, DYNAMIC_QUANTIZE, {}, rest)


def _insert(
    program: Program,
    source: fx.Node,
    users: Sequence[fx.Node],
    name: str,
    axis: int | None,
    grid: Grid,
) -> fx.Node:
    sides = {"scale": grid.scale, "zero_point": grid.zero_point}
    rest = (axis, grid.qmin, grid.qmax)
    return _put(program, source, users, name, FAKE_QUANTIZE, sides, rest)


def _put(
    program: Program,
    source: fx.Node,
    users: Sequence[fx.Node],
    name: str,
    target: Any,
    stored: Mapping[str, Tensor],
    rest: tuple[Any, ...],
) -> fx.Node:
    """A node `target(source, *stored, *rest)` in front of `users`, its tensors beside `name`."""
    graph = program.graph
    origin = {"origin": source.meta.get("origin", "")}
    sides: list[fx.Node] = []
    with graph.inserting_after(_last_input(source)):
        made = graph.create_node("call_function", target, (source,), name=str(target).split(".")[1])
    with graph.inserting_before(made):
        for suffix, tensor in stored.items():
            side = graph.get_attr(program.add_tensor(f"{name}_{suffix}", _beside(program, tensor)))
            side.meta = {**origin, "shape": tuple(tensor.shape), "dtype": tensor.dtype}
            sides.append(side)
    made.args = (source, *sides, *rest)
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
        moved = tensor.to(held.device)
        if isinstance(tensor, nn.Parameter) and moved is not tensor:
            return nn.Parameter(moved.detach(), requires_grad=tensor.requires_grad)
        return moved
    return tensor
