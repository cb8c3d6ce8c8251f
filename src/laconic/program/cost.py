"""What a program costs: multiply-adds, parameters and bytes, per sample.

Counted: products and convolutions (one multiply-add per product; biases, activations, norms and
softmax are free, as usual in the field). An operator nobody described is named in `unknown`, never
counted as zero in silence. Sizes stand for themselves: the counts are polynomials in the sizes of
the groups, so that `CostModel` evaluates any choice of sizes without cutting.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from laconic.program import axes
from laconic.program.axes import Atom, Term
from laconic.program.equations import Equations, operator_name
from laconic.program.groups import Groups
from laconic.program.program import (
    DEQUANTIZE,
    FAKES,
    LEVELS,
    LOOKUP,
    MEMBER,
    STORED,
    VECTORS,
    Program,
)

Monomials: TypeAlias = Counter[tuple[int, ...]]
Integers: TypeAlias = NDArray[np.int64]


_FORMS = (DEQUANTIZE, *FAKES, MEMBER, *STORED)


@dataclass(frozen=True)
class NodeCost:
    """One operator: `macs` per sample; elements and bytes of the tensors it is first to read."""

    node: str
    operator: str
    origin: str
    macs: int
    params: int
    bytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """Totals and rows; `unknown`: operator → nodes nobody described, which count for nothing."""

    rows: tuple[NodeCost, ...]
    macs: int
    params: int
    bytes: int
    unknown: Mapping[str, tuple[str, ...]]


def cost(program: Program) -> Cost:
    """Multiply-adds per sample, parameters and bytes of a program, per operator and in total."""
    equations = Equations(program)
    batched, batch = depends_on_batch(program), program.batch_size()
    owned = _owners(program)
    rows: list[NodeCost] = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        total = sum(
            prod(term.size for term in terms) for terms in equations.multiply_adds.get(node, ())
        )
        names = owned.get(node, ())
        tensors = [program.tensor(name) for name in names]
        weights = [t for n, t in zip(names, tensors, strict=True) if _is_weight(program, n)]
        rows.append(
            NodeCost(
                node.name,
                operator_name(node),
                str(node.meta.get("origin", "")),
                total // batch if node in batched else total,
                sum(tensor.numel() for tensor in weights),
                sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                tuple(names),
            )
        )
    unknown = {name: tuple(n.name for n in nodes) for name, nodes in equations.unknown.items()}
    return Cost(
        tuple(rows),
        sum(row.macs for row in rows),
        sum(row.params for row in rows),
        sum(row.bytes for row in rows),
        unknown,
    )


def depends_on_batch(program: Program) -> set[fx.Node]:
    """Nodes whose work grows with the batch; the others run once however large it is."""
    found = {node for node in program.placeholders if program.dynamic.get(node.name)}
    for node in program.graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _owners(program: Program) -> dict[fx.Node, tuple[str, ...]]:
    """Operator → the stored tensors it is the first to read (through their form)."""
    owned: dict[fx.Node, list[str]] = {}
    seen: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "get_attr" or str(node.target) in seen:
            continue
        user = next(iter(node.users), None)
        while user is not None and user.target in _FORMS and user.users:
            user = next(iter(user.users))
        if user is not None:
            seen.add(str(node.target))
            owned.setdefault(user, []).append(str(node.target))
    return {node: tuple(names) for node, names in owned.items()}


def weights_of(program: Program) -> set[str]:
    """Names of the tensors that count as parameters."""
    return {name for name, _ in program.tensors() if _is_weight(program, name)}


def _is_weight(program: Program, name: str) -> bool:
    """Parameters, and the integer codes that stand for one."""
    if isinstance(program.tensor(name), torch.nn.Parameter):
        return True
    return any(
        user.target in (DEQUANTIZE, LEVELS, LOOKUP, VECTORS) and user.args[0] is node
        for node in program.graph.nodes
        if node.op == "get_attr" and node.target == name
        for user in node.users
    )


class CostModel:
    """Multiply-adds and parameters as polynomials in the sizes of the groups.

    `names` and `sizes` are the groups that can shrink and their sizes, in the order of every array
    below. Agrees exactly with `cost(cut(program, ...))`.
    """

    def __init__(self, program: Program, groups: Groups) -> None:
        self.names = tuple(group.name for group in groups)
        self.sizes: Integers = np.array([group.size for group in groups], dtype=np.int64)
        self._batch = program.batch_size()
        variables = {group.atom: place for place, group in enumerate(groups)}
        batched = depends_on_batch(program)
        counts: tuple[Monomials, Monomials] = (Counter(), Counter())
        cache: dict[Term, Monomials] = {}
        for node, monomials in groups.equations.multiply_adds.items():
            for terms in monomials:
                counts[node in batched].update(_multiply(terms, variables, cache))
        weights: Monomials = Counter()
        for name in dict.fromkeys(n for names in _owners(program).values() for n in names):
            if _is_weight(program, name):
                weights.update(_multiply(groups.equations.tensors[name], variables, cache))
        self._once, self._each = (_compile(c, len(variables)) for c in counts)
        self._params = _compile(weights, len(variables))

    def macs(self, sizes: Mapping[str, int] | Integers) -> int:
        """Multiply-adds per sample; `sizes` by group name (others keep theirs), or an int64 row."""
        return int(self.macs_of(self._row(sizes))[0])

    def params(self, sizes: Mapping[str, int] | Integers) -> int:
        """Parameters; `sizes` as in `macs`."""
        return int(self.params_of(self._row(sizes))[0])

    def macs_of(self, sizes: Integers) -> Integers:
        """Multiply-adds per sample for many choices at once: [choices, groups] → [choices]."""
        return self._each(sizes) // self._batch + self._once(sizes)

    def params_of(self, sizes: Integers) -> Integers:
        """Parameters for many choices at once: [choices, groups] → [choices]."""
        return self._params(sizes)

    def per_index(
        self, sizes: Mapping[str, int] | Integers | None = None
    ) -> tuple[Integers, Integers]:
        """What one index of every group saves when the rest is `sizes`: (macs, params)."""
        row = self._row(self.sizes if sizes is None else sizes)
        fewer = np.maximum(row - np.eye(row.shape[1], dtype=np.int64), 0)
        every = np.concatenate([row, fewer])
        macs, params = self.macs_of(every), self.params_of(every)
        return macs[0] - macs[1:], params[0] - params[1:]

    def _row(self, sizes: Mapping[str, int] | Integers) -> Integers:
        if isinstance(sizes, Mapping):
            unknown = set(sizes) - set(self.names)
            if unknown:
                raise KeyError(f"no group that can shrink is named {sorted(unknown)[0]!r}")
            pairs = zip(self.names, self.sizes, strict=True)
            sizes = np.array([sizes.get(name, int(size)) for name, size in pairs], dtype=np.int64)
        return np.atleast_2d(np.asarray(sizes, dtype=np.int64))


class _Polynomial:
    """coefficient x product of variables, summed; evaluated for many rows at once."""

    def __init__(self, coefficients: Integers, variables: Integers) -> None:
        self._coefficients = coefficients
        self._variables = variables

    def __call__(self, sizes: Integers) -> Integers:
        padded = np.concatenate([sizes, np.ones((len(sizes), 1), np.int64)], axis=1)
        return padded[:, self._variables].prod(axis=2) @ self._coefficients


def _compile(monomials: Monomials, count: int) -> _Polynomial:
    degree = max((len(key) for key in monomials), default=0) or 1
    variables = np.full((len(monomials), degree), count, dtype=np.int64)
    for row, key in enumerate(monomials):
        variables[row, : len(key)] = key
    coefficients = np.array(list(monomials.values()), dtype=np.int64)
    return _Polynomial(coefficients, variables)


def _multiply(
    terms: Sequence[Term], variables: Mapping[Atom, int], cache: dict[Term, Monomials]
) -> Monomials:
    total: Monomials = Counter({(): 1})
    for term in terms:
        total = _times(total, _expand(axes.resolve(term), variables, cache))
    return total


def _times(left: Monomials, right: Monomials) -> Monomials:
    result: Monomials = Counter()
    for one, factor in left.items():
        for other, count in right.items():
            result[tuple(sorted(one + other))] += factor * count
    return result


def _expand(term: Term, variables: Mapping[Atom, int], cache: dict[Term, Monomials]) -> Monomials:
    """The size of a term as a polynomial."""
    if isinstance(term, Atom):
        return Counter({(variables[term],): 1} if term in variables else {(): term.size})
    found = cache.get(term)
    if found is None:
        if isinstance(term, axes.Product):
            found = _multiply(term.factors, variables, cache)
        else:
            found = Counter()
            for part in term.parts:
                found.update(_expand(axes.resolve(part), variables, cache))
        cache[term] = found
    return found
