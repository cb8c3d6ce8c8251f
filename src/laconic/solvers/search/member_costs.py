"""Multiply-adds, parameters and bytes of a sub-network from its sizes alone, without cutting.

The counts are sums of products of terms (see `program/cost.py`), evaluated at the sizes of a
member; what hangs on a dropped branch is not there, a cropped kernel counts by its part. The
numbers agree exactly with those of the cut Program.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx

from laconic.program import axes
from laconic.program.axes import Atom, Term
from laconic.program.cost import depends_on_batch, weights_of
from laconic.solvers.search.elastic import FLOAT_BITS, Elastic, Order
from laconic.solvers.search.search_space import Member, named


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

    def __call__(self, member: Member) -> Price:
        """The price of a member."""
        return self._book(member).price(member, self._order)

    def macs(self, member: Member) -> int:
        """Its multiply-adds alone, which takes a third of the time."""
        return self._book(member).macs(member, self._order)

    def _book(self, member: Member) -> "_Book":
        here = self._elastic.at(member)
        if id(here) not in self._books:
            self._books[id(here)] = _Book(here)
        return self._books[id(here)]


class _Count:
    """A sum of products of terms, remembered for all sizes that it was asked for."""

    def __init__(self, products: Iterable[tuple[Sequence[Term], int]], free: set[Atom]) -> None:
        """`products`: terms, and what their product is divided by."""
        self._products = [(tuple(terms), by) for terms, by in products]
        atoms = (atom for terms, _ in self._products for t in terms for atom in axes.atoms(t))
        self._atoms = tuple(dict.fromkeys(atom for atom in atoms if atom in free))
        self._known: dict[tuple[int, ...], int] = {}

    def at(self, sizes: Mapping[Atom, int]) -> int:
        """Its value when atoms have `sizes`; others keep theirs."""
        key = tuple(sizes.get(atom, atom.size) for atom in self._atoms)
        if key not in self._known:
            self._known[key] = sum(
                prod(axes.new_size(term, sizes) for term in terms) // by
                for terms, by in self._products
            )
        return self._known[key]


class _Book:
    """Counts of one Program, by node and by tensor."""

    def __init__(self, elastic: Elastic) -> None:
        self._elastic = elastic
        found, program = elastic.groups, elastic.program
        self._atoms = {group.name: group.atom for group in found}
        free = set(self._atoms.values())
        batch, batched = program.batch_size(), depends_on_batch(program)
        self._macs = {
            node: _Count(((t, batch if node in batched else 1) for t in monomials), free)
            for node, monomials in found.equations.multiply_adds.items()
        }
        self._tensors = {
            name: _Count([(terms, 1)], free) for name, terms in found.equations.tensors.items()
        }
        self._weights = weights_of(program)
        self._crops = {layer.node: name for name, layer in elastic.kernels.items()}
        self._alive: dict[tuple[int, ...], tuple[list[fx.Node], list[str]]] = {}

    def macs(self, member: Member, order: Order) -> int:
        """Multiply-adds per sample."""
        sizes, sides = self._sizes(member), dict(named(member, "kernel"))
        return sum(
            self._cropped(self._crops.get(node, ""), self._macs[node].at(sizes), sides)
            for node in self._needed(member, order)[0]
        )

    def price(self, member: Member, order: Order) -> Price:
        """See `Price`."""
        sizes, sides = self._sizes(member), dict(named(member, "kernel"))
        bits = {site: n for site, n in named(member, "bits") if n < FLOAT_BITS}
        parameters = stored = 0
        for name in self._needed(member, order)[1]:
            count = self._cropped(name, self._tensors[name].at(sizes), sides)
            parameters += count if name in self._weights else 0
            if name in bits:
                stored += -(-count * bits[name] // 8) + 4 * self._rows(name, sizes)
            else:
                stored += count * self._elastic.program.tensor(name).element_size()
        return Price(self.macs(member, order), parameters, stored)

    def _sizes(self, member: Member) -> dict[Atom, int]:
        return {self._atoms[site]: n for site, n in named(member, "width")}

    def _rows(self, name: str, sizes: Mapping[Atom, int]) -> int:
        """Scales of a weight on a grid."""
        axis = self._elastic.weights[name]
        dims = self._elastic.groups.equations.tensors[name]
        return 1 if axis is None else axes.new_size(dims[axis], sizes)

    def _needed(self, member: Member, order: Order) -> tuple[list[fx.Node], list[str]]:
        """Operators that count and tensors that are left at the depths of a member."""
        key = tuple(count for _, count in named(member, "depth"))
        if key not in self._alive:
            gone = {branch.name for branch in self._elastic.dropped(member, order)}
            nodes, names = _alive(self._elastic, gone)
            self._alive[key] = ([node for node in nodes if node in self._macs], names)
        return self._alive[key]

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
