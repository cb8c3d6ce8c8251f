"""Make one linear map of several that have nothing non-linear between them.

Idea: a linear layer, a convolution, an average pooling, batch norm in eval mode, a number or a
vector that scales or shifts, and the identity are all affine maps of what they read. Two in a row
are one, and so is the sum of two that read the same value. The one is computed in float64 and
rounded once; it takes their place where it costs less.

Papers: Ding et al. 2021, "RepVGG" (arXiv 2101.03697) and "Diverse Branch Block" (2103.13425) for
branches; Dror et al. 2022, "Layer Folding" (2106.09309), and Fu et al. 2022, "DepthShrinker"
(2206.00843), for layers in a row whose activation is gone.

Helps: networks trained with parallel branches (RepVGG, MobileOne, DBB), bottlenecks without an
activation (the point-wise pairs of mobile networks), convolutions behind which an average pooling
stands, adapters and low-rank layers whose factors are not worth their rank, networks whose
activations were linearised.
Does not: networks with an activation behind every layer; maps that pad with zeros what the map
before would have given its bias (said in the notes); low-rank pairs that are cheaper apart. Like
`simplify.fold` it takes batch statistics away from what is to be trained on.
Cost: milliseconds a layer; no data.
"""

import math
from typing import Any, Literal, NamedTuple

from torch import fx

from laconic.methods.base import Context, Method, Outcome
from laconic.program import surgery
from laconic.program.cost import Cost, cost
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.layers.affine_nodes import Way, Ways, ways, write

_MOST_NOTES = 20


class _Price(NamedTuple):
    """What decides first (multiply-adds or parameters), what decides next, and operators."""

    first: int
    second: int
    operators: int


class _Offer(NamedTuple):
    """A merge that pays, and what it saves."""

    saved: _Price
    node: fx.Node
    way: Way


class MergeLinear(Method):
    """Options of `simplify.merge_linear`. Sites are names of the weights that may be merged.

    Attributes:
        by: what has to fall: multiply-adds (where they stay, parameters or operators), or
            parameters (where they stay, multiply-adds or operators).
        batch_norm: whether batch norm is merged too; if not, it parts what it stands between.
    """

    by: Literal["macs", "parameters"] = "macs"
    batch_norm: bool = True

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """The same function with fewer linear maps; equal up to float rounding in eval mode.

        Raises:
            RecipeError: the sites match no weight of a linear map.
        """
        del context
        made = program.clone()
        made.propagate()
        found, before = ways(made, batch_norm=self.batch_norm), cost(made)
        names = dict.fromkeys(layer.weight for layer in found.layers.values())
        chosen = frozenset(sites.choose(names))
        merged: list[dict[str, Any]] = []
        after = before
        while True:
            offers, dear = self._offers(made, found, after, chosen)
            if not offers:
                break
            merged += _accept(made, found, offers)
            found, after = ways(made, batch_norm=self.batch_norm), cost(made)
        return Outcome(
            program=made,
            resolved=self.model_dump(mode="json", exclude_defaults=True),
            notes=_notes(found, chosen, [*dear, *_bystanders(found, chosen)], bool(merged)),
            figures={
                "merged": merged,
                "macs": [before.macs, after.macs],
                "parameters": [before.params, after.params],
            },
        )

    def _offers(
        self, program: Program, found: Ways, now: Cost, chosen: frozenset[str]
    ) -> tuple[list[_Offer], list[str]]:
        """What pays, the best first, and sentences about pairs that do not."""
        offers: list[_Offer] = []
        dear: list[str] = []
        for node, listed in found.of.items():
            for way in listed:
                if not _is_possible(found, node, way, chosen):
                    continue
                saved = self._saved(program, now, node, way)
                if saved > _Price(0, 0, 0):
                    offers.append(_Offer(saved, node, way))
                elif len(way.layers) == 2:
                    dear.append(f"{' and '.join(_names(found, way))} stay apart: as one they "
                                f"would cost {-saved.first} {self.by} more")  # fmt: skip
        return sorted(offers, key=lambda offer: offer.saved, reverse=True), dear

    def _saved(self, program: Program, now: Cost, node: fx.Node, way: Way) -> _Price:
        """Multiply-adds per sample, parameters and operators that the merge would save."""
        names = {n.name for n in way.nodes}
        rows = [row for row in now.rows if row.node in names]
        positions = math.prod(node.meta["shape"]) // way.map.outputs // program.batch_size()
        macs = sum(row.macs for row in rows) - way.map.weights * positions
        params = sum(row.params for row in rows) - way.map.params
        first, second = (macs, params) if self.by == "macs" else (params, macs)
        return _Price(first, second, len(way.nodes) - 1)


def _is_possible(found: Ways, node: fx.Node, way: Way, chosen: frozenset[str]) -> bool:
    """Whether a way merges anything, may do so, can be written, and serves nobody else."""
    if not way.layers or len(way.nodes) < 2 or not set(_names(found, way)) <= chosen:
        return False
    if any(before != after for before, after in way.map.padding):
        return False
    if way.map.space == 0 and way.map.groups != 1:
        return False
    return all(
        user in way.nodes for inner in way.nodes if inner is not node for user in inner.users
    )


def _accept(program: Program, found: Ways, offers: list[_Offer]) -> list[dict[str, Any]]:
    """Write the offers, best first, that do not touch one another; what was done."""
    used: set[fx.Node] = set()
    done: list[dict[str, Any]] = []
    for offer in offers:
        if used & {*offer.way.nodes, offer.way.source}:
            continue
        used |= offer.way.nodes
        names, operators = _names(found, offer.way), len(offer.way.nodes)
        into = write(program, offer.node, offer.way, found.layers)
        done.append({"weights": names, "operators": operators, "into": into})
    surgery.remove_dead(program)
    program.propagate()
    program.recompile()
    return done


def _names(found: Ways, way: Way) -> list[str]:
    """The weights a way stands for, in graph order."""
    return [layer.weight for node, layer in found.layers.items() if node in way.layers]


def _bystanders(found: Ways, chosen: frozenset[str]) -> list[str]:
    """Sentences about layers that would stand next to another, were they not read elsewhere."""
    notes: list[str] = []
    for node, layer in found.layers.items():
        before = found.layers.get(layer.source)
        if before is None or not {layer.weight, before.weight} <= chosen:
            continue
        if layer.shared or before.shared:
            notes.append(f"{before.weight} and {layer.weight} stay apart: a weight has other uses")
        elif len(before.node.users) > 1:
            notes.append(f"{before.weight} and {layer.weight} stay apart: what {before.node.name} "
                         f"gives is also read elsewhere than by {node.name}")  # fmt: skip
    return notes


def _notes(found: Ways, chosen: frozenset[str], apart: list[str], merged: bool) -> list[str]:
    notes = [
        f"{first} and {second} stay apart: {why}"
        for second, first, why in found.refused
        if {first, second} <= chosen
    ]
    notes = list(dict.fromkeys([*notes, *apart]))
    if len(notes) > _MOST_NOTES:
        notes = [*notes[:_MOST_NOTES], f"and {len(notes) - _MOST_NOTES} more pairs stay apart"]
    if not merged:
        notes.append("nothing to merge: no two linear maps in a row are cheaper as one")
    return notes
