"""Multiply-adds, parameters and bytes of a sub-network from its sizes alone, without cutting.

The counts are sums of products of terms (see `program/cost.py`), evaluated at the sizes of a
member; what hangs on a dropped branch is not there, a cropped kernel counts by its part. The
numbers agree exactly with those of the cut Program.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from laconic.program import axes
from laconic.program.axes import Atom, Term
from laconic.program.cost import depends_on_batch, weights_of
from laconic.solvers.elastic import FLOAT_BITS, Elastic, Order
from laconic.solvers.search_space import Member, named

Terms = tuple[int, tuple[Term, ...]]


@dataclass(frozen=True)
class Price:
    """Multiply-adds per sample, parameters, and bytes of the stored tensors.

    A weight of fewer bits counts its codes and a float scale for each output channel.
    """

    macs: int
    parameters: int
    bytes: int


class Prices:
    """What the members of a space cost."""

    def __init__(self, elastic: Elastic, order: Order | None = None) -> None:
        """`order`: as in `Elastic.cut`."""
        self._elastic, self._order = elastic, order or {}
        self._books: dict[int, _Book] = {}
        self._known: dict[tuple[tuple[str, int], ...], Price] = {}

    def __call__(self, member: Member) -> Price:
        """The price of a member."""
        key = tuple(sorted(member.items()))
        if key not in self._known:
            here = self._elastic.at(member)
            book = self._books.setdefault(id(here), _Book(here))
            self._known[key] = book.price(member, self._order)
        return self._known[key]


class _Book:
    """Counts of one Program, by node and by tensor."""

    def __init__(self, elastic: Elastic) -> None:
        self._elastic = elastic
        found, program = elastic.groups, elastic.program
        self._atoms = {group.name: group.atom for group in found}
        self._free = set(self._atoms.values())
        self._batch, batched = program.batch_size(), depends_on_batch(program)
        self._macs = {
            node: [(self._compiled(terms), node in batched) for terms in monomials]
            for node, monomials in found.equations.multiply_adds.items()
        }
        self._tensors = {
            name: self._compiled(terms) for name, terms in found.equations.tensors.items()
        }
        self._weights = weights_of(program)
        self._crops = {layer.node: name for name, layer in elastic.kernels.items()}
        self._alive: dict[tuple[str, ...], tuple[list[fx.Node], list[str]]] = {}

    def _compiled(self, terms: Any) -> Terms:
        """A product of terms as a number and the terms that may shrink."""
        number, varying = 1, []
        for term in terms:
            if any(atom in self._free for atom in axes.atoms(term)):
                varying.append(axes.resolve(term))
            else:
                number *= term.size
        return number, tuple(varying)

    def price(self, member: Member, order: Order) -> Price:
        """See `Price`."""
        sizes = {self._atoms[site]: n for site, n in named(member, "width")}
        sides = dict(named(member, "kernel"))
        bits = {site: n for site, n in named(member, "bits") if n < FLOAT_BITS}
        gone = tuple(branch.name for branch in self._elastic.dropped(member, order))
        if gone not in self._alive:
            self._alive[gone] = _alive(self._elastic, set(gone))
        nodes, names = self._alive[gone]
        macs = sum(self._node(node, sizes, sides) for node in nodes)
        parameters = stored = 0
        for name in names:
            tensor = self._elastic.program.tensor(name)
            count = self._cropped(name, _evaluated(self._tensors[name], sizes), sides)
            parameters += count if name in self._weights else 0
            if name in bits:
                axis = self._elastic.weights[name]
                rows = 1 if axis is None else axes.new_size(
                    self._elastic.groups.equations.tensors[name][axis], sizes)  # fmt: skip
                stored += -(-count * bits[name] // 8) + 4 * rows
            else:
                stored += count * tensor.element_size()
        return Price(macs, parameters, stored)

    def _node(self, node: fx.Node, sizes: Mapping[Atom, int], sides: Mapping[str, int]) -> int:
        total = 0
        for terms, batched in self._macs.get(node, ()):
            count = _evaluated(terms, sizes)
            total += count // self._batch if batched else count
        return self._cropped(self._crops.get(node, ""), total, sides)

    def _cropped(self, name: str, count: int, sides: Mapping[str, int]) -> int:
        if name not in sides:
            return count
        layer = self._elastic.kernels[name]
        return count * sides[name] ** layer.space // layer.taps


def _alive(elastic: Elastic, gone: set[str]) -> tuple[list[fx.Node], list[str]]:
    """Operators and tensors that the outputs still need when some branches are dropped."""
    program = elastic.program
    past = {
        branch.total: branch.stream
        for stage in elastic.stages
        for branch in stage.branches
        if branch.name in gone
    }
    seen: set[fx.Node] = set()
    stack: list[fx.Node] = [program.output_node]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [past[node]] if node in past else node.all_input_nodes
    order = [node for node in program.graph.nodes if node in seen and node not in past]
    stored = [str(node.target) for node in order if node.op == "get_attr"]
    names = dict.fromkeys(program.aliases.get(name, name) for name in stored)
    return [node for node in order if node.op == "call_function"], list(names)


def _evaluated(terms: Terms, sizes: Mapping[Atom, int]) -> int:
    number, varying = terms
    for term in varying:
        number *= axes.new_size(term, sizes)
    return number
