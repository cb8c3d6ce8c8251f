"""Constants in a graph that stand for a size, and how each follows when axes shrink."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from laconic.program import axes
from laconic.program.axes import Atom, Term
from laconic.program.program import Program


@dataclass(frozen=True)
class Cut:
    """What a rewrite needs: the program being cut, its nodes, and what atoms keep."""

    program: Program
    node: Callable[[fx.Node], fx.Node]
    keep: Mapping[Atom, Tensor]
    sizes: Mapping[Atom, int]

    def size(self, term: Term) -> int:
        """New size of a term."""
        return axes.new_size(term, self.sizes)


@dataclass(frozen=True)
class Size:
    """An integer argument is the size of `term`."""

    node: fx.Node
    argument: str
    term: Term

    def apply(self, cut: Cut) -> None:
        """Write the new size."""
        set_argument(cut.node(self.node), self.argument, cut.size(self.term))


@dataclass(frozen=True)
class Sizes:
    """Each integer of a list argument is the size of a term; -1 stays -1."""

    node: fx.Node
    argument: str
    terms: tuple[Term | None, ...]

    def apply(self, cut: Cut) -> None:
        """Write the new sizes; a symbolic entry is scaled."""
        node = cut.node(self.node)
        entries = list(get_argument(node, self.argument))
        changed = False
        for place, (entry, term) in enumerate(zip(entries, self.terms, strict=True)):
            if term is None or entry == -1 or cut.size(term) == term.size:
                continue
            changed = True
            if isinstance(entry, fx.Node):
                entries[place] = _scaled(node, entry, cut.size(term), term.size)
            else:
                entries[place] = cut.size(term)
        if changed:
            set_argument(node, self.argument, entries)


@dataclass(frozen=True)
class Pin:
    """A value the operator derives from the size of `term` unless it is given: keep the old one."""

    node: fx.Node
    argument: str
    value: float
    term: Term

    def apply(self, cut: Cut) -> None:
        """Give the value explicitly."""
        node = cut.node(self.node)
        if cut.size(self.term) != self.term.size and get_argument(node, self.argument) is None:
            set_argument(node, self.argument, self.value)


@dataclass(frozen=True)
class Sections:
    """A split whose pieces are `terms`, along dimension `dim`."""

    node: fx.Node
    dim: int
    terms: tuple[Term, ...]

    def apply(self, cut: Cut) -> None:
        """Write the new sizes of the pieces."""
        sizes = [cut.size(term) for term in self.terms]
        if sizes != [term.size for term in self.terms]:
            node = cut.node(self.node)
            node.target = torch.ops.aten.split_with_sizes.default
            node.args = (node.args[0], sizes, self.dim)
            node.kwargs = {}


@dataclass(frozen=True)
class Values:
    """A tensor made inside the graph whose values depend on the position along its only axis."""

    node: fx.Node
    term: Term

    def apply(self, cut: Cut) -> None:
        """Replace it by a stored tensor that holds the kept values."""
        if cut.size(self.term) == self.term.size:
            return
        node = cut.node(self.node)
        kept = node.target(*node.args, **node.kwargs)[axes.positions(self.term, cut.keep)]  # type: ignore[operator]
        name = cut.program.add_tensor(f"constants.{node.name}", kept)
        with node.graph.inserting_before(node):
            stored = node.graph.get_attr(name)
        stored.meta = {"origin": node.meta.get("origin", "")}
        node.replace_all_uses_with(stored)
        node.graph.erase_node(node)


Rewrite: TypeAlias = Size | Sizes | Pin | Sections | Values


def _scaled(node: fx.Node, symbol: fx.Node, new: int, old: int) -> fx.Node:
    """`symbol * new // old`: exact, because the symbol is a multiple of `old` per unit of batch."""
    with node.graph.inserting_before(node):
        many = node.graph.call_function(operator.mul, (symbol, new))
        made = node.graph.call_function(operator.floordiv, (many, old))
    many.meta = {"origin": node.meta.get("origin", "")}
    made.meta = dict(many.meta)
    return made


def _place(node: fx.Node, name: str) -> int:
    slots = [slot.name for slot in node.target._schema.arguments]  # type: ignore[union-attr]
    return slots.index(name)


def get_argument(node: fx.Node, name: str) -> Any:
    """An argument by its name in the operator's schema; None where it is left to its default."""
    place = _place(node, name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Write an argument by its name in the operator's schema."""
    place = _place(node, name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)
