"""Which axes of a network may be rotated without changing what it computes, and the proof.

`x R` in place of `x` along an axis, R orthogonal, is undone where the axis is summed over: in the
columns of a linear layer, which are rotated too, and in the product of two tensors that are both
rotated. On the way every operator has to be linear and treat all indices of the axis alike: moves
of other dimensions, sums of such tensors, factors that do not depend on the index, probabilities
of an attention. Which stored tensors write and read the axis is what the groups say; here every
operator on the way is looked at, and the first one that is not covered is named.

A norm over the whole axis passes too: RMS norm divides by a length, which R keeps. Layer norm first
subtracts the mean, which is the part along the all-ones vector: it passes every R that maps this
vector to itself. That keeps the operator as it is, for any input, where centring what is written
into the stream would turn it into another norm. The norm's own weight and bias do not commute with
R. They can go into the linear layers that read the norm, if nothing else does.

Ashkboos et al. 2024, "SliceGPT" (arXiv 2401.15024) and "QuaRot" (arXiv 2404.00456).
"""

from dataclasses import dataclass
from typing import Any

from torch import fx

from laconic.program.axes import Term
from laconic.program.groups import Group, Groups
from laconic.program.program import Program
from laconic.solvers.quantization.rotation_rules import CONSTANT, Refused, Scene, Way, operator
from laconic.statistics.layers import Layer, layers


@dataclass(frozen=True)
class Scale:
    """A vector that multiplies the axis and one that is added, and the layers that read the result.

    Attributes:
        name: of the operator, for people.
        weight, bias: names of the stored vectors, None where there is none.
        readers: the linear layers that take them in.
    """

    name: str
    weight: str | None
    bias: str | None
    readers: tuple[Layer, ...]


@dataclass(frozen=True)
class Turn:
    """An axis that may be rotated.

    Attributes:
        group: its tensors.
        scales: what has to go into the next layers first.
        keeps_ones: whether the rotation has to map the all-ones vector to itself.
        fixed: tensors of the group that are not rotated: the vectors of `scales`.
    """

    group: Group
    scales: tuple[Scale, ...]
    keeps_ones: bool
    fixed: frozenset[str]


class Rotatable:
    """Finds the axes of one program that may be rotated."""

    def __init__(self, program: Program, groups: Groups) -> None:
        self.program, self.scene = program, Scene(program, groups.equations.terms)
        self.layers = {layer.node: layer for layer in layers(program)}
        self.readers: dict[str, int] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                name = program.aliases.get(str(node.target), str(node.target))
                self.readers[name] = self.readers.get(name, 0) + len(node.users)

    def of(self, group: Group) -> Turn | str:
        """How a group may be rotated, or in words why it may not."""
        if group.frozen is not None:
            return group.frozen
        if group.size < 2:
            return "it has one index"
        pruned = next((m.tensor for m in group.members if m.tensor in self.program.sparse), None)
        if pruned is not None:
            return f"the zeros of {pruned} are pruned weights, which a rotation would fill"
        try:
            return _Proof(self.scene, group, self).turn()
        except Refused as refused:
            return str(refused)


class _Proof(Way):
    """All operators on the way of one axis, looked at one after the other."""

    def __init__(self, scene: Scene, group: Group, held: Rotatable) -> None:
        super().__init__(scene, group)
        self._held = held

    def turn(self) -> Turn:
        """Raises Refused: names the first operator that is not covered."""
        for node in self.about.program.graph.nodes:
            reads = any(source in self.kinds for source in node.all_input_nodes)
            if not reads and not self.places(node):
                continue
            if node.op == "get_attr":
                self.stored(node)
            elif node.op != "call_function":
                raise Refused(f"it is an {'in' if node.op == 'placeholder' else 'out'}put")
            else:
                kind = self.rule(node)
                if kind is not None:
                    self.kinds[node] = kind
                    if len(self.places(node)) != 1:
                        raise self.no(node, "has it in two dimensions")
        scales = [self._scale(*found) for found in self.scaled]
        kept = {name for s in scales for name in (s.weight, s.bias) if name is not None}
        needed = tuple(scale for scale in scales if not self._is_plain(scale))
        return Turn(self.group, needed, self.keeps_ones, frozenset(kept))

    # norms ------------------------------------------------------------------------------------

    def _scale(self, node: fx.Node, weight: Any, bias: Any) -> Scale:
        """Raises Refused: something but linear layers reads what is scaled."""
        aliases = self.about.program.aliases
        names = [None if v is None else aliases.get(str(v.target), str(v.target))
                 for v in (weight, bias)]  # fmt: skip
        origin = str(node.meta.get("origin") or node.name)
        made = Scale(origin, names[0], names[1], ())
        if self._is_plain(made):
            return made
        for name in names:
            if name is not None and (self._held.readers[name] > 1 or name in aliases.values()):
                raise self.no(node, f"has {name}, which others read too")
        term = next(self.term(v, self.places(v)[0]) for v in (weight, bias) if v is not None)
        found: list[Layer] = []
        stack = [node]
        while stack:
            here = stack.pop()
            for user in here.users:
                layer = self._held.layers.get(user)
                if layer is not None and layer.source is here:
                    self._takes(node, layer, term, shifted=bias is not None)
                    found.append(layer)
                elif operator(user) in CONSTANT and self.kinds.get(user) == "turned":
                    stack.append(user)
                elif user in self.kinds or user.op == "output":
                    why = f"has a weight, and {operator(user)} {user.name} reads it besides layers"
                    raise self.no(node, why)
        return Scale(origin, names[0], names[1], tuple(dict.fromkeys(found)))

    def _takes(self, node: fx.Node, layer: Layer, term: Term, *, shifted: bool) -> None:
        holder: Any = next(n for n in layer.node.all_input_nodes if n.op == "get_attr"
                           and self._is_weight(n, layer))  # fmt: skip
        fits = layer.groups == 1 and self.term(holder, layer.in_dim) == term
        own = layer.bias is not None and self._held.readers[layer.bias] == 1
        if not fits or (shifted and (layer.space or not (own or operator(layer.node) == "linear"))):
            raise self.no(node, f"has a weight that {layer.weight} cannot take in")

    def _is_weight(self, node: fx.Node, layer: Layer) -> bool:
        name = str(node.target)
        return self.about.program.aliases.get(name, name) == layer.weight

    def _is_plain(self, scale: Scale) -> bool:
        """Whether it multiplies by ones and adds zeros."""
        held = [None if name is None else self.about.program.tensor(name).detach()
                for name in (scale.weight, scale.bias)]  # fmt: skip
        ones = held[0] is None or bool((held[0] == 1).all())
        return ones and (held[1] is None or not bool(held[1].any()))
