"""What of a Program is elastic, and its sub-networks as Programs of their own.

Widths are groups, depth is the residual branches of a stage (a run of branches over a stream of one
shape), a kernel is cropped to its centre, another resolution is a resize in front of the graph, and
bits are a fake-quantised weight. Costs are evaluated from the sizes, without cutting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch

from laconic.core.errors import RecipeError, SurgeryError
from laconic.core.suggest import nearest
from laconic.program import surgery
from laconic.program.freezing import is_frozen, thaw
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.program.rewrites import set_argument
from laconic.program.sites import Sites
from laconic.program.surgery import Changes
from laconic.solvers.layers import branch_removal
from laconic.solvers.layers.residual import Branch, branches
from laconic.solvers.quantization import ranges
from laconic.solvers.quantization.insertion import quantize_weight
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.solvers.search.search_space import (
    KINDS,
    Knob,
    Member,
    Space,
    Wishes,
    choices_of,
    named,
)
from laconic.statistics.layers import Layer, layers

FLOAT_BITS = 32
Order = Mapping[str, Sequence[int]]
"""Knob → its indices (or branches of its stage), best first; those not named keep their order."""


@dataclass(frozen=True)
class Stage:
    """Residual branches in a row over a stream of one shape."""

    name: str
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Cut:
    """A sub-network and how it came about.

    Attributes:
        program: the sub-network.
        changes: tensor → dimension → positions that were kept.
        crops: weight → side of the kernel that is left.
    """

    program: Program
    changes: Changes
    crops: Mapping[str, int]


class Elastic:
    """A Program seen as the largest of its sub-networks.

    Attributes:
        program: a copy of it, its weights as floats; its tensors may be changed by the owner.
        groups, stages, kernels, inputs: what varies.
    """

    def __init__(self, program: Program) -> None:
        """`program` is left untouched."""
        self.program = thaw(program) if is_frozen(program) else program.clone()
        self.program.propagate()
        self.groups = groups(self.program)
        self.stages = _stages(branches(self.program))
        self.kernels = {layer.weight: layer for layer in layers(self.program) if _croppable(layer)}
        self._resized: dict[tuple[str, int], Elastic] = {}

    @cached_property
    def weights(self) -> dict[str, int | None]:
        """Weights that may have fewer bits → their output axis."""
        return {
            site.name: site.axis for site in weight_sites(self.program)[0] if not site.weight_only
        }

    @cached_property
    def inputs(self) -> dict[str, int]:
        """Square images among the inputs → their side."""
        pairs = zip(self.program.placeholders, self.program.example, strict=True)
        return {
            node.name: value.shape[-1]
            for node, value in pairs
            if value.ndim == 4 and value.is_floating_point() and value.shape[-1] == value.shape[-2]
        }

    def sizes(self, kind: str) -> dict[str, int]:
        """Sites of a kind of knob → their size in the whole network."""
        if kind == "width":
            return {group.name: group.size for group in self.groups}
        if kind == "depth":
            return {stage.name: len(stage.branches) for stage in self.stages}
        if kind == "kernel":
            return {name: layer.kernel[0] for name, layer in self.kernels.items()}
        if kind == "resolution":
            return self.inputs
        return dict.fromkeys(self.weights, FLOAT_BITS)

    # sub-networks ---------------------------------------------------------------------------

    def cut(self, member: Member, order: Order | None = None, *, checked: bool = True) -> Cut:
        """The sub-network of a member, a Program like any other.

        Args:
            member: knobs that it does not name are the whole network's.
            order: which indices are the good ones.
            checked: work shapes out anew, as a Program that leaves the house needs it.
        """
        here = self.at(member)
        keep = here._keep(member, order or {})
        made, changes = surgery.cut(here.program, keep, here.groups, checked=checked)
        crops = {site: n for site, n in named(member, "kernel") if n < self.kernels[site].kernel[0]}
        for name, side in crops.items():
            _crop(made, here.kernels[name], side)
        dropped = _twins(made, here.dropped(member, order or {}))
        if dropped or crops:
            branch_removal.remove(made, dropped, checked=checked)
        for site, bits in named(member, "bits"):
            _quantise(made, site, bits)
        return Cut(made, changes, crops)

    def at(self, member: Member) -> "Elastic":
        """This Program at the resolution of a member."""
        for site, side in named(member, "resolution"):
            if side != self.inputs[site]:
                return self.resized(site, side)
        return self

    def resized(self, site: str, side: int) -> "Elastic":
        """This Program with one input resized to `side` squared; tensors shared.

        Raises:
            SurgeryError: the graph does not take such an input.
        """
        if (site, side) not in self._resized:
            made = self.program.clone()
            _resize(made, site, side)
            self._resized[site, side] = Elastic(made)
        return self._resized[site, side]

    def dropped(self, member: Member, order: Order) -> list[Branch]:
        """The branches that a member is without, in graph order."""
        gone: list[Branch] = []
        for stage in self.stages:
            name = f"depth:{stage.name}"
            ranked = order.get(name, range(len(stage.branches)))
            stay = set(ranked[: member.get(name, len(stage.branches))])
            gone += [branch for place, branch in enumerate(stage.branches) if place not in stay]
        return gone

    def _keep(self, member: Member, order: Order) -> dict[str, list[int]]:
        keep: dict[str, list[int]] = {}
        for site, count in named(member, "width"):
            size = self.groups.find(site).size
            if count < size:
                keep[site] = sorted(order.get(f"width:{site}", range(size))[:count])
        return keep


def declare(elastic: Elastic, wishes: Wishes, sites: Sites) -> tuple[Space, list[str]]:
    """The space that is meant, and what to know about it.

    Args:
        elastic: the Program.
        wishes: "kind:glob" → choices; of several patterns for a site the last one counts.
        sites: which groups, stages, weights and inputs take part.

    Raises:
        RecipeError: a pattern or sites that match nothing; resolutions the graph does not take.
    """
    chosen: dict[str, dict[str, tuple[int, ...]]] = {kind: {} for kind in KINDS}
    notes: list[str] = []
    for pattern, values in wishes.items():
        kind, _, glob = pattern.partition(":")
        sizes = elastic.sizes(kind)
        matching = [site for site in sizes if site == glob or fnmatchcase(site, glob or "*")]
        if not matching and glob not in ("", "*"):
            raise RecipeError(
                f"{pattern!r} matches nothing", where="space", hint=nearest(glob, sizes)
            )
        if not matching:
            notes.append(f"{kind}: nothing of this program is elastic in it")
        for site in matching:
            chosen[kind][site] = choices_of(kind, sizes[site], values)
    knobs = [
        Knob(kind, site, _possible(elastic, kind, site, chosen[kind][site]))
        for kind in KINDS
        for site in elastic.sizes(kind)
        if site in chosen[kind]
    ]
    wanted = set(sites.choose([knob.site for knob in knobs]))
    varying = [knob for knob in knobs if knob.site in wanted and len(knob.choices) > 1]
    return Space(tuple(varying)), notes


def _possible(elastic: Elastic, kind: str, site: str, choices: tuple[int, ...]) -> tuple[int, ...]:
    """The choices that the graph takes.

    Raises:
        RecipeError: a resolution that it does not.
    """
    if kind == "kernel":
        layer = elastic.kernels[site]
        return tuple(side for side in choices if _fits(layer, side))
    if kind == "resolution":
        for side in choices[1:]:
            try:
                elastic.resized(site, side)
            except SurgeryError as error:
                raise RecipeError(
                    f"the graph does not take an input of {side} by {side}: {error.message}",
                    where=f"space, {kind}:{site}",
                    hint="networks that pool over all of the image do; or leave it out",
                ) from error
    return choices


# depth ------------------------------------------------------------------------------------------


def _stages(found: Sequence[Branch]) -> list[Stage]:
    runs: list[list[Branch]] = []
    for branch in found:
        if runs and runs[-1][-1].total.meta["shape"] == branch.total.meta["shape"]:
            runs[-1].append(branch)
        else:
            runs.append([branch])
    names: dict[str, int] = {}
    stages: list[Stage] = []
    for run in runs:
        name = _shared_path([branch.name for branch in run])
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}~{names[name]}"
        stages.append(Stage(name, tuple(run)))
    return stages


def _shared_path(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared) or names[0]


def _twins(made: Program, gone: Sequence[Branch]) -> list[Branch]:
    """The same branches in a cut of the program, found by their nodes' names."""
    there = {node.name: node for node in made.graph.nodes}
    return [
        replace(
            branch,
            total=there[branch.total.name],
            stream=there[branch.stream.name],
            end=there[branch.end.name],
            inner=(),
        )
        for branch in gone
    ]


# kernels ----------------------------------------------------------------------------------------


def _croppable(layer: Layer) -> bool:
    sides = set(layer.kernel)
    even = all(before == after for before, after in layer.padding)
    return bool(layer.space and not layer.shared and even and len(sides) == 1) and (
        layer.kernel[0] > 1 and layer.kernel[0] % 2 == 1 and _fits(layer, layer.kernel[0] - 2)
    )


def _fits(layer: Layer, side: int) -> bool:
    """Whether a crop leaves the positions of the output where they are."""
    lost = (layer.kernel[0] - side) // 2
    pairs = zip(layer.padding, layer.dilation, strict=True)
    return side % 2 == 1 and all(pad[0] >= apart * lost for pad, apart in pairs)


def _crop(made: Program, layer: Layer, side: int) -> None:
    weight = made.tensor(layer.weight)
    lost = (weight.shape[-1] - side) // 2
    for dim in range(2, weight.ndim):
        weight = weight.narrow(dim, lost, side)
    made.set_tensor(layer.weight, weight.detach().contiguous())
    node = next(n for n in made.graph.nodes if n.name == layer.node.name)
    padding = [p[0] - d * lost for p, d in zip(layer.padding, layer.dilation, strict=True)]
    set_argument(node, "padding", padding)


# resolution and bits ----------------------------------------------------------------------------


def _resize(made: Program, site: str, side: int) -> None:
    source = next(node for node in made.placeholders if node.name == site)
    behind: Any = made.placeholders[-1]
    users = list(source.users)
    with made.graph.inserting_after(behind):
        node = made.graph.call_function(
            torch.ops.aten.upsample_bilinear2d.vec, (source, [side, side], False, None)
        )
    node.meta = {"origin": source.meta.get("origin", "")}
    for user in users:
        user.replace_input_with(source, node)
    made.recompile()
    made.propagate()


def _quantise(made: Program, name: str, bits: int) -> None:
    """Round a weight, if it is still there, to a symmetric grid for each output channel."""
    site = next((site for site in weight_sites(made)[0] if site.name == name), None)
    if site is None or bits >= FLOAT_BITS:
        return
    grid = ranges.weight_grid(made.tensor(name).detach(), site.axis, "mse", bits)
    quantize_weight(made, site, site.axis, grid)
    made.recompile()
