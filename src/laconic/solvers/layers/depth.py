"""Layers of a network that repeat: which ones there are, which stay, and taking the others out.

A layer is a run of residual branches of one stream that lie under one module: a residual block, or
attention and perceptron of a transformer. What stands behind the sum of every such branch, a norm
or an activation that the stream has passed through before as well, leaves together with it. Layers
that follow each other on one stream are a chain: a stage of a ResNet, an encoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any, Literal

import torch
from torch import fx

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.program import surgery
from laconic.program.equations import operator_name
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.layers.residual import Branch, branches

Spread = Literal["even", "alternate", "first", "last"]
Amount = int | float
_PASSING = ("aten.dropout", "aten.clone", "aten.contiguous")
_NORMS = ("aten.layer_norm", "aten.batch_norm", "aten.rms_norm", "aten.group_norm")


@dataclass(frozen=True)
class DeepLayer:
    """One layer of a chain.

    Attributes:
        name: its module path.
        branches: its residual branches, in graph order.
        exit: the node that gives the stream behind it.
    """

    name: str
    branches: tuple[Branch, ...]
    exit: fx.Node

    @property
    def total(self) -> fx.Node:
        """The last sum."""
        return self.branches[-1].total


Chain = list[DeepLayer]


def chains(program: Program) -> list[Chain]:
    """The layers that could be left out, chain by chain in graph order; shapes are propagated."""
    held = branches(program)
    streams, totals = {_through(branch.stream) for branch in held}, {b.total for b in held}
    runs: list[list[tuple[Branch, fx.Node]]] = []
    ends: dict[fx.Node, list[tuple[Branch, fx.Node]]] = {}
    for branch in held:
        run = ends.pop(_through(branch.stream), None)
        if run is None:
            run = []
            runs.append(run)
        end = _exit(branch, streams, totals)
        run.append((branch, end))
        ends[end] = run
    return [_layered(run) for run in runs]


def places(count: int, of: int, spread: Spread) -> list[int]:
    """Which `count` of `of` layers stay: ascending positions.

    "even" takes both ends and what lies evenly between, "alternate" the first of every run of equal
    length, "first" and "last" what they say.
    """
    if spread == "even":
        return [round(index * (of - 1) / max(count - 1, 1)) for index in range(count)]
    if spread == "alternate":
        return [index * of // count for index in range(count)]
    return list(range(count) if spread == "first" else range(of - count, of))


def staying(
    found: Sequence[Chain],
    wanted: Amount | Mapping[str, Amount] | Sequence[int | str],
    spread: Spread,
    sites: Sites,
) -> list[str]:
    """Names of the layers that stay, of every chain.

    Args:
        found: the chains of a program.
        wanted: how many layers of each chain stay, or which share of it (rounded down); the same
            by glob over the layers' names; or the layers themselves, by name or by position.
        spread: which ones, where a number is given.
        sites: layers that are not selected stay.

    Raises:
        RecipeError: more layers than there are, or names and positions that no layer has.
    """
    names = [layer.name for chain in found for layer in chain]
    free = [name for name in names if sites.match(name)]
    if isinstance(wanted, (int, float)):
        wanted = {"*": wanted}
    if not isinstance(wanted, Mapping):
        listed = {_named(one, names) for one in wanted}
        return [name for name in names if name in listed or name not in free]
    left = list(free)
    gone: set[str] = set()
    for pattern, amount in wanted.items():
        chosen = Sites.of(pattern).choose(left)
        left = [name for name in left if name not in chosen]
        for chain in found:
            own = [layer.name for layer in chain if layer.name in chosen]
            kept = {own[place] for place in places(_count(amount, own), len(own), spread)}
            gone |= set(own) - kept
    return [name for name in names if name not in gone]


def keep_only(program: Program, found: Sequence[Chain], kept: Sequence[str]) -> None:
    """Let the stream go past every layer that is not in `kept`, in place."""
    for chain in found:
        for layer in chain:
            if layer.name not in kept:
                first = layer.branches[0]
                stream: Any = first.total.args[first.place]  # a layer before may have left
                layer.exit.replace_all_uses_with(stream)
    surgery.remove_dead(program)
    program.propagate()
    program.recompile()


def goals(found: Sequence[Chain], kept: Sequence[str]) -> dict[str, str]:
    """What each layer that stays has to give now: its last sum → the sum it stands in for.

    A layer stands in for itself and for those that left behind it, and what gives the stream of a
    chain for those that left before the first that stays; node names. Layers of a chain from which
    nothing has left so far are not among them.
    """
    wanted: dict[str, str] = {}
    for chain in found:
        stay = [place for place, layer in enumerate(chain) if layer.name in kept]
        gone = stay[0] if stay else len(chain)
        if gone:
            wanted[entry(chain[0]).name] = chain[gone - 1].total.name
        ends = [place - 1 for place in stay[1:]] + [len(chain) - 1]
        whole = stay[:1] == [0]
        for place, end in zip(stay, ends, strict=True) if stay else ():
            whole = whole and place == end
            if not whole:
                wanted[chain[place].total.name] = chain[end].total.name
    return wanted


def entry(layer: DeepLayer) -> fx.Node:
    """What is to a layer's stream as its own last sum is to the stream behind it."""
    stream = _through(layer.branches[0].stream)
    if layer.exit is layer.total or stream.op != "call_function":
        return stream
    if operator_name(stream) != operator_name(layer.exit):
        return stream
    (before, *_) = [source for source in stream.all_input_nodes if source.op != "get_attr"]
    return before


def _count(amount: Amount, names: Sequence[str]) -> int:
    if isinstance(amount, float):
        return floor(amount * len(names) + 1e-9)
    if names and amount > len(names):
        raise RecipeError(
            f"{amount} layers are to stay, the chain from {names[0]} to {names[-1]} has "
            f"{len(names)}",
            where="layers",
        )
    return min(amount, len(names))


def _named(one: int | str, names: Sequence[str]) -> str:
    if isinstance(one, str) and one in names:
        return one
    if isinstance(one, int) and -len(names) <= one < len(names):
        return names[one]
    hint = nearest(str(one), names) if names else "no residual branch was found"
    raise RecipeError(f"no layer {one!r} among {len(names)}", where="layers", hint=hint)


def _through(node: fx.Node) -> fx.Node:
    """The node whose value this one passes on."""
    while node.op == "call_function" and operator_name(node) in _PASSING:
        (node,) = node.all_input_nodes
    return node


def _exit(branch: Branch, streams: set[fx.Node], totals: set[fx.Node]) -> fx.Node:
    """The sum, or the norm or activation behind it that belongs to the layer.

    One that the stream has passed through before as well; for the first layer of a chain, which has
    nothing before it, one that the next layer's stream comes from.
    """
    total, before = branch.total, _through(branch.stream)
    readers = list(total.users)
    if len(readers) != 1 or readers[0].op != "call_function":
        return total
    (reader,) = readers
    name = operator_name(reader)
    pointwise = torch.Tag.pointwise in getattr(reader.target, "tags", ())
    stored = [source for source in reader.all_input_nodes if source.op != "get_attr"]
    if stored != [total] or not (name in _NORMS or pointwise):
        return total
    alike = before.op == "call_function" and operator_name(before) == name
    first = before not in totals and reader in streams
    return reader if alike or first else total


def _layered(run: Sequence[tuple[Branch, fx.Node]]) -> Chain:
    """The branches of one stream, those under one module together; each with its exit."""
    paths = [branch.name.split("~")[0].split(".") for branch, _ in run]
    shared = 0
    while all(len(p) > shared and p[: shared + 1] == paths[0][: shared + 1] for p in paths):
        shared += 1
    if any(len(path) == shared for path in paths):  # one of them is the module above the others
        shared = max(shared - 1, 0)
    chain: Chain = []
    for (branch, end), path in zip(run, paths, strict=True):
        name = ".".join(path[: shared + 1]) + "".join(branch.name.partition("~")[1:])
        held = (branch,)
        if chain and chain[-1].name == name:
            held = (*chain.pop().branches, branch)
        taken = any(layer.name == name for layer in chain)
        chain.append(DeepLayer(branch.name if taken else name, held, end))
    return chain
