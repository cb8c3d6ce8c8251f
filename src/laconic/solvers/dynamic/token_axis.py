"""Where the token axis goes behind a layer, and what may happen to it there.

Tokens that leave change nothing for operators that treat each by itself, and only weights for those
that sum over them. Anything else is refused, by the operator's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from laconic.program import axes, rewrites
from laconic.program.axes import Atom, Sum, Term
from laconic.program.equations import Equations, arguments, operator_name
from laconic.program.operators import elementwise, joining, quantization, shape
from laconic.program.program import Program
from laconic.solvers.dynamic.token_layers import Layer
from laconic.solvers.layers.attentions import FUSED, SOFTMAX

POOLS = ("aten.mean", "aten.sum")
_FREE = ("aten.amax", "aten.amin", "aten.any", "aten.all")  # a token that stands twice is no more
_NORMS = ("aten.layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
_PRODUCTS = ("aten.matmul", "aten.bmm", "aten.baddbmm", "aten.mm")
_PASSED = ("aten.dropout", "aten.to", "aten._to_copy", "aten.clone", "aten.contiguous",
           "aten.expand", "aten.reshape", "aten.view", "laconic.fake_quantize",
           "laconic.dynamic_quantize")  # fmt: skip
_FOLLOWED = (
    {*shape.ROWS, *joining.ROWS, *elementwise.ROWS, *quantization.ROWS}
    | {"aten.slice", "aten.linear", "aten.addmm", "laconic.choose"}
) - {"aten.logcumsumexp", "aten._log_softmax", "aten.log_softmax", "aten.bernoulli"}


class Refused(Exception):
    """The tokens behind a layer cannot be followed: which layer, and what is in the way."""

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"{layer}: {reason}")
        self.layer, self.reason = layer, reason


@dataclass
class Stage:
    """The graph from one chosen layer to the next.

    Attributes:
        layer: whose stream it begins with.
        stand: the stand-in for that stream.
        mask: the stand-in for the padding mask, where it is read.
        axis: the token axis.
        rest: its part that can shrink.
        lead: how many tokens in front of that are read by number.
    """

    layer: Layer
    stand: fx.Node
    mask: fx.Node | None = None
    axis: Term = axes.UNIT
    rest: Term = axes.UNIT
    lead: int = 0
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])


@dataclass(frozen=True)
class Site:
    """An operator that sums over tokens: it has to know how many each one stands for."""

    node: fx.Node
    stage: int
    place: int = 0
    rank: int = 0  # of what is summed; the stage before may have put a node without shapes there
    whole: bool = True


class TokenAxis:
    """The solved equations of a program with stand-ins, seen from its tokens.

    Attributes:
        see: the equations.
        sites: what sums over tokens.

    Args:
        program: stand-ins are in place.
        stages: their axes are filled in.
        numbers: node → the stage it belongs to.

    Raises:
        Refused: the first layer behind which something cannot follow.
    """

    def __init__(
        self, program: Program, stages: Sequence[Stage], numbers: Mapping[fx.Node, int]
    ) -> None:
        self.program, self.stages, self._numbers = program, stages, numbers
        self.sites: list[Site] = []
        self.see = Equations(program)
        for stage in self.stages:
            stage.axis = axes.resolve(self.see.tensor(str(stage.stand.target))[1])
            if stage.mask is not None:
                held = self.see.tensor(str(stage.mask.target))
                axes.unify(held[1], stage.axis, "the padding mask")
        for stage in self.stages:
            self._measure(stage)
        owner = {atom: number for number, stage in enumerate(self.stages)
                 for atom in axes.atoms(stage.axis)}  # fmt: skip
        for node in self.program.graph.nodes:
            self._check(node, owner)
        for rewrite in self.see.rewrites:
            if isinstance(rewrite, rewrites.Values):
                found = [owner[a] for a in axes.atoms(rewrite.term) if a in owner]
                if found:
                    where = self.see.place(rewrite.node)
                    raise Refused(
                        self.stages[found[0]].layer.name,
                        f"{where}: values depend on the place of a token",
                    )

    def _measure(self, stage: Stage) -> None:
        """Which part of the token axis can shrink."""
        stage.axis = axes.resolve(stage.axis)
        parts = stage.axis.parts if isinstance(stage.axis, Sum) else (stage.axis,)
        stage.rest, stage.lead = parts[-1], sum(part.size for part in parts[:-1])
        name = stage.layer.name
        if not isinstance(stage.rest, Atom):
            raise Refused(name, "tokens are arranged in a grid behind it")
        if stage.rest.frozen is not None:
            raise Refused(name, stage.rest.frozen)
        if stage.rest.size < 2 or any(stage.rest in axes.atoms(part) for part in parts[:-1]):
            raise Refused(name, "tokens at the end are read by number")

    def _check(self, node: fx.Node, owner: Mapping[Atom, int]) -> None:
        """Whether a node may hold the token axis it holds, and what it needs to know."""
        out = self._held(node, owner)
        inputs = set().union(*(self._held(source, owner) for source in node.all_input_nodes))
        if not out | inputs or node.op in ("output", "placeholder"):
            return
        numbers = {owner[atom] for atom in out | inputs}
        number = self._numbers.get(node, -1)
        name = self.stages[max(numbers)].layer.name
        if node.op == "get_attr":
            if not any(node in (stage.stand, stage.mask) for stage in self.stages):
                raise Refused(name, f"{node.target} has a place for every token")
            return
        constant = number < 0 and not inputs
        if not constant and numbers != {number}:
            raise Refused(name, f"{self.see.place(node)}: tokens of before and behind it meet")
        self._judge(node, out, inputs, number)

    def _held(self, node: fx.Node, owner: Mapping[Atom, int]) -> set[Atom]:
        found = self.see.terms.get(node, ())
        dims = [
            term for entry in found for term in (entry if isinstance(entry, tuple) else (entry,))
        ]
        return {atom for term in dims for atom in axes.atoms(term) if atom in owner}

    def _judge(self, node: fx.Node, out: set[Atom], inputs: set[Atom], number: int) -> None:
        """Refuse what treats tokens as anything but a set; note what sums over them."""
        name, see = operator_name(node), arguments(node)
        stage = self.stages[max(number, 0)]
        if axes.resolve(stage.rest) not in out | inputs:
            return  # leading tokens only
        if name == FUSED:
            self._attention(node, stage, number)
        elif name in SOFTMAX:
            held: Any = node.args[0]
            rank = len(held.meta["shape"])
            place = see["dim"] % rank
            if self._is_tokens(self.see.dims(held)[place], stage):
                self.sites.append(Site(node, number, place, rank, self._whole(held, place, stage)))
        elif name in POOLS and inputs - out:
            self._pool(node, stage, number)
        elif name in _FREE or name in POOLS or name == "getitem" or is_constant(node):
            return
        elif name in _PRODUCTS:
            self._product(node, stage)
        elif name in _NORMS:
            held = see.get("input", node.args[0])
            behind = self.see.dims(held)[-len(see["normalized_shape"]) :]
            if any(self._is_tokens(term, stage) for term in behind):
                self._refuse(stage, node, "normalises over tokens")
        elif name not in _FOLLOWED and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            self._refuse(stage, node, "tokens cannot be followed through it")

    def _attention(self, node: fx.Node, stage: Stage, number: int) -> None:
        query: Any = node.args[0]
        key: Any = node.args[1]
        dims = self.see.dims(key)
        if not self._is_tokens(dims[-2], stage):
            return
        own = self.see.dims(stage.stand)[0]
        if axes.resolve(dims[0]) != axes.resolve(own) or len(query.meta["shape"]) != len(dims):
            self._refuse(stage, node, "heads are folded into the batch")
        if arguments(node)["attn_mask"] is not None:
            self._refuse(stage, node, "its mask says something about single tokens")
        self.sites.append(Site(node, number, len(dims) - 2, len(dims), self._whole(key, -2, stage)))

    def _pool(self, node: fx.Node, stage: Stage, number: int) -> None:
        held: Any = node.args[0]
        dims = self.see.dims(held)
        places = [place for place, term in enumerate(dims) if self._is_tokens(term, stage)]
        own = self.see.dims(stage.stand)[0]
        alone = len(places) == 1 and places[0] > 0 and axes.resolve(dims[0]) == axes.resolve(own)
        if not alone:
            self._refuse(stage, node, "sums over tokens and something else at once")
        (place,) = places
        whole = self._whole(held, place, stage)
        self.sites.append(Site(node, number, place, len(dims), whole))

    def _product(self, node: fx.Node, stage: Stage) -> None:
        """A sum over tokens is right if what it sums are shares of an attention."""
        left: Any = node.args[1 if operator_name(node) == "aten.baddbmm" else 0]
        if not self._is_tokens(self.see.dims(left)[-1], stage):
            return
        while operator_name(left) in _PASSED:
            left = left.args[0]
        if operator_name(left) not in SOFTMAX:
            self._refuse(stage, node, "sums over tokens without shares of an attention")

    def _is_tokens(self, term: Term, stage: Stage) -> bool:
        rest = axes.resolve(stage.rest)
        return any(atom is rest for atom in axes.atoms(term))

    def _whole(self, node: fx.Node, place: int, stage: Stage) -> bool:
        """Whether a dimension is all tokens, or (False) those that can go.

        Raises:
            Refused: it is anything else.
        """
        term = axes.resolve(self.see.dims(node)[place])
        if term == axes.resolve(stage.axis):
            return True
        if term != axes.resolve(stage.rest):
            self._refuse(stage, node, "tokens are joined with something else there")
        return False

    def _refuse(self, stage: Stage, node: fx.Node, why: str) -> None:
        raise Refused(stage.layer.name, f"{self.see.place(node)}: {why}")


def is_constant(node: fx.Node) -> bool:
    """Whether a node is made inside the graph, the same value everywhere."""
    return operator_name(node).startswith(("aten.full", "aten.zeros", "aten.ones", "aten.new_"))
