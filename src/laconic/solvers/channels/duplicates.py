"""Which channels of a group are constant or copies of others, and how their readers take them over.

See `solvers/channels/channel_region.py` for what makes two channels the same function.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.program.program import Program
from laconic.solvers.channels.channel_region import Region, columns, passed, rows
from laconic.solvers.layers import intervals
from laconic.statistics.collect import Request, collect
from laconic.statistics.min_max import MinMax

_ROUNDING = 16  # a scaled copy of a row is off by that many eps of its norm, at most


@dataclass(frozen=True)
class Constants:
    """Which channels each reader of a group sees as a constant.

    Attributes:
        dead: bool `[size]`, constant for every reader and removable.
        values: for every reader, float64 `[size, width]`: what each of its columns is then.
        stuck: channels that are constant but stay, because a reader pads with zeros.
    """

    dead: Tensor
    values: tuple[Tensor, ...]
    stuck: int = 0


@dataclass
class Plan:
    """What becomes of a group's channels.

    Attributes:
        keep: indices that stay, ascending.
        dead: indices whose constants go into biases.
        into: index that goes → (index that takes it over, factor).
        constants: what is known about the dead ones.
        bound: how far the readers' outputs can move, for an input of norm 1 (bias counted as an
            input of 1), if what lies between is 1-Lipschitz, as ReLU and pooling are.
        notes: sentences.
    """

    keep: list[int]
    dead: list[int]
    into: dict[int, tuple[int, float]]
    constants: Constants | None
    bound: float = 0.0
    notes: list[str] = field(default_factory=list[str])


# constants ----------------------------------------------------------------------------------


def provable(
    program: Program, regions: Sequence[Region], inputs: tuple[float, float] | None
) -> dict[str, Constants]:
    """Channels that are constant for every input: by zero weights, or by bounds.

    Args:
        program: in eval mode, shapes propagated.
        regions: of the groups to look at.
        inputs: range of the model's inputs; None is unbounded.
    """
    read = [layer.source for region in regions for layer, _ in region.readers]
    known = intervals.bounds(program, inputs, read)
    ends: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    for region in regions:
        for layer, _ in region.readers:
            low, high = known[layer.source]
            axis = layer.channel_axis(low)
            ends[layer.node] = (
                low.movedim(axis, 0).flatten(1).amin(1),
                high.movedim(axis, 0).flatten(1).amax(1),
            )
    return {region.group.name: _constants(region, ends, 1e-9) for region in regions}


def observed(
    program: Program, regions: Sequence[Region], batches: Sequence[Sequence[Tensor]]
) -> dict[str, Constants]:
    """Channels that have one value on all of the given data."""
    seen: dict[fx.Node, MinMax] = {}
    requests: dict[str, Request] = {}
    for region in regions:
        for layer, _ in region.readers:
            place = layer.node.args.index(layer.source)
            axis = layer.channel_axis(torch.empty(layer.source.meta["shape"], device="meta"))
            seen[layer.node] = MinMax(axis)
            requests[layer.node.name] = (layer.node.name, f"input {place}", seen[layer.node])
    collect(program, batches, requests)
    ends = {node: (one.minimum.double(), one.maximum.double()) for node, one in seen.items()}
    return {region.group.name: _constants(region, ends, 0.0) for region in regions}


def either(one: Constants, two: Constants) -> Constants:
    """Dead by either account; the first one's values where it knows them."""
    values = tuple(
        torch.where(one.dead[:, None], a, b) for a, b in zip(one.values, two.values, strict=True)
    )
    return Constants(one.dead | two.dead, values, max(one.stuck, two.stuck))


def _constants(
    region: Region, ends: Mapping[fx.Node, tuple[Tensor, Tensor]], slack: float
) -> Constants:
    size = region.group.size
    constant = torch.ones(size, dtype=torch.bool)
    removable = constant.clone()
    values: list[Tensor] = []
    for layer, member in region.readers:
        low, high = (end[columns(region.group, member)] for end in ends[layer.node])
        flat = (high - low <= slack * low.abs().clamp(min=1)) & low.isfinite() & high.isfinite()
        held = torch.where(flat, (low + high) / 2, torch.zeros_like(low))
        values.append(held)
        constant &= flat.all(1)
        if any(any(pair) for pair in layer.padding):
            removable &= (held == 0).all(1)
    return Constants(constant & removable, tuple(values), int((constant & ~removable).sum()))


# plans --------------------------------------------------------------------------------------


def plan(
    program: Program, region: Region, constants: Constants | None, merge: bool, tolerance: float
) -> Plan:
    """What becomes of the channels of a group; at least one stays.

    Args:
        program: whose group it is.
        region: of the group.
        constants: of its readers; None keeps constant channels.
        merge: whether copies go.
        tolerance: largest distance of a row from a multiple of another one, relative to its norm;
            never less than rounding.
    """
    size = region.group.size
    made = Plan([], [], {}, constants)
    if constants is not None:
        made.dead = constants.dead.nonzero().flatten().tolist()
        if len(made.dead) == size:
            made.dead = made.dead[1:]
            made.notes.append(f"{region.group.name}: every channel is constant, one is kept")
        if constants.stuck:
            made.notes.append(f"{region.group.name}: {constants.stuck} constant channels stay, a "
                              "convolution that pads with zeros reads them")  # fmt: skip
    alive = [index for index in range(size) if index not in set(made.dead)]
    if merge:
        made.into = _matches(program, region, alive, tolerance)
    made.keep = [index for index in alive if index not in made.into]
    if tolerance:
        made.bound = _bound(program, region, made)
    return made


def _matches(
    program: Program, region: Region, alive: list[int], tolerance: float
) -> dict[int, tuple[int, float]]:
    """Index → (index that stays, factor); the one with the largest row of a kind stays."""
    written, met = rows(program, region)[alive].cpu(), passed(program, region)[alive].cpu()
    weight = program.tensor(region.writers[0].layer.weight)
    limit = max(tolerance, _ROUNDING * torch.finfo(weight.dtype).eps)
    lengths = written.norm(dim=1)
    order = lengths.argsort(descending=True, stable=True).tolist()
    kept: list[int] = []
    found: dict[int, tuple[int, float]] = {}
    for place in order:
        others = torch.tensor(kept, dtype=torch.int64)
        factor = torch.ones(len(kept), dtype=torch.float64)
        if region.homogeneous and float(lengths[place]):
            factor = written[others] @ written[place] / lengths[others].square()
        gap = (written[place] - factor[:, None] * written[others]).norm(dim=1)
        apart = (met[place] - met[others]).norm(dim=1)
        near = (gap <= limit * lengths[place]) & (factor > 0)
        near &= apart <= limit * met[place].norm()
        if not bool(near.any()):
            kept.append(place)
            continue
        best = int(torch.where(near, gap, torch.inf).argmin())
        found[alive[place]] = (alive[kept[best]], float(factor[best]))
    return found


def _bound(program: Program, region: Region, made: Plan) -> float:
    written = rows(program, region).cpu()
    reach = torch.zeros(region.group.size, dtype=torch.float64)
    for layer, member in region.readers:
        weight = program.tensor(layer.weight).detach().double().movedim(layer.in_dim, 0)
        held = weight[columns(region.group, member).to(weight.device)].flatten(1).norm(dim=1)
        reach = torch.maximum(reach, held.cpu())
    gaps = [(written[j] - c * written[i]).norm() * reach[j] for j, (i, c) in made.into.items()]
    return float(torch.stack(gaps).sum()) if gaps else 0.0


# changing the readers -----------------------------------------------------------------------


def missing_biases(region: Region, made: Plan) -> list[str]:
    """Weights of readers that have to take a constant in and have no bias."""
    if made.constants is None or not made.dead:
        return []
    pairs = zip(region.readers, made.constants.values, strict=True)
    return [
        layer.weight
        for (layer, _), values in pairs
        if layer.bias is None and bool(values[made.dead].any())
    ]


def add_biases(program: Program, weights: Sequence[str]) -> dict[str, str]:
    """Give the layers of these weights a bias of zeros, in place: weight → its name."""
    wanted = set(weights)
    made: dict[str, str] = {}
    for node in list(program.graph.nodes):
        held: Any = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
        name = str(held.target) if isinstance(held, fx.Node) and held.op == "get_attr" else ""
        if name in wanted:
            wanted.discard(name)
            made[name] = _give_bias(program, node, name)
    program.propagate()
    program.recompile()
    return made


def _give_bias(program: Program, node: fx.Node, weight: str) -> str:
    held = program.tensor(weight)
    target: Any = node.target
    plain = target in (torch.ops.aten.mm.default, torch.ops.aten.matmul.default)
    zeros = held.new_zeros(held.shape[1] if plain else held.shape[0])
    path, _, _ = weight.rpartition(".")
    value = nn.Parameter(zeros, requires_grad=held.requires_grad)
    name = program.add_tensor(f"{path}.bias" if path else "bias", value)
    with program.graph.inserting_before(node):
        bias = program.graph.get_attr(name)
    bias.meta = {"origin": node.meta.get("origin", ""), "shape": tuple(zeros.shape),
                 "dtype": zeros.dtype}  # fmt: skip
    if not plain:
        node.args = (*node.args[:2], bias, *node.args[3:])
        return name
    with program.graph.inserting_after(node):
        total = program.graph.call_function(torch.ops.aten.add.Tensor, (node, bias))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total, lambda user: user is not total)
    return name


@torch.no_grad()
def move(program: Program, region: Region, made: Plan, given: Mapping[str, str]) -> None:
    """Let the channels that stay do what those that go did: readers' weights and biases.

    given: weight → the bias that `add_biases` gave it.
    """
    for place, (layer, member) in enumerate(region.readers):
        where = columns(region.group, member)
        old = program.tensor(layer.weight)
        weight = old.detach().double().movedim(layer.in_dim, 0).contiguous()
        if made.constants is not None and made.dead:
            bias = layer.bias or given.get(layer.weight)
            _move_constants(program, bias, weight, where[made.dead],
                            made.constants.values[place][made.dead])  # fmt: skip
        if made.into:
            gone = list(made.into)
            factors = torch.tensor([made.into[j][1] for j in gone], dtype=torch.float64)
            source = where[gone].to(weight.device)
            target = where[[made.into[j][0] for j in gone]].to(weight.device)
            shape = (len(gone), 1, *[1] * (weight.ndim - 1))
            added = weight[source] * factors.to(weight.device).reshape(shape)
            weight = weight.index_add(0, target.flatten(), added.flatten(0, 1))
        program.set_tensor(layer.weight, weight.movedim(0, layer.in_dim).to(old.dtype).contiguous())


def _move_constants(
    program: Program, bias: str | None, weight: Tensor, where: Tensor, values: Tensor
) -> None:
    """Add what the dead columns always gave; `weight` is `[in, out, *kernel]`."""
    if not bool(values.any()):
        return
    taps = weight.reshape(*weight.shape[:2], -1).sum(2)
    given = values.flatten().to(weight.device) @ taps[where.flatten().to(weight.device)]
    assert bias is not None
    old = program.tensor(bias)
    program.set_tensor(bias, (old.detach().double() + given).to(old.dtype))
