"""Terms: what a dimension is made of, and the equations between them.

Every dimension of every tensor is a *term* over atoms: an atom, a row-major product of terms
(`flatten`), or a sum of terms (`cat`). Operators state equations between terms; `unify` solves
them by first-order unification: an atom is bound to another atom, or refined into a product or a
sum. What cannot be solved is frozen, with a reason. Each atom that is left is an axis that can
shrink on its own; positions and sizes of any term follow from those of its atoms.

>>> channels = Atom(6)
>>> unify(channels, product(heads := Atom(2), width := Atom(3)), "view")
>>> positions(channels, {root(width): torch.tensor([0, 2])})
tensor([0, 2, 3, 5])
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


class Atom:
    """An axis of its own, until it is bound to a term or refined into one."""

    __slots__ = ("bound", "frozen", "hint", "size")

    def __init__(self, size: int, frozen: str | None = None, hint: str | None = None) -> None:
        """`frozen`: why it must keep its size; `hint`: what it is, for names ("heads")."""
        self.size = size
        self.frozen = frozen
        self.hint = hint
        self.bound: Term | None = None

    def __repr__(self) -> str:
        return f"Atom({self.size}{', frozen' if self.frozen else ''})"


@dataclass(frozen=True, slots=True)
class Product:
    """Row-major product: index = ((i0 * size1 + i1) * size2 + i2) ..."""

    factors: "tuple[Term, ...]"
    size: int


@dataclass(frozen=True, slots=True)
class Sum:
    """Concatenation."""

    parts: "tuple[Term, ...]"
    size: int


Term: TypeAlias = Atom | Product | Sum
UNIT = Product((), 1)
EMPTY = Sum((), 0)


def product(*factors: Term) -> Term:
    """The row-major product, flattened; units vanish."""
    flat: list[Term] = []
    for factor in factors:
        flat += factor.factors if isinstance(factor, Product) else (factor,)
    flat = [factor for factor in flat if factor.size != 1]
    if any(factor.size == 0 for factor in flat):
        return EMPTY
    if len(flat) == 1:
        return flat[0]
    size = 1
    for factor in flat:
        size *= factor.size
    return Product(tuple(flat), size) if flat else UNIT


def concatenation(*parts: Term) -> Term:
    """The sum, flattened; empty parts vanish."""
    flat: list[Term] = []
    for part in parts:
        flat += part.parts if isinstance(part, Sum) else (part,)
    flat = [part for part in flat if part.size]
    if len(flat) == 1:
        return flat[0]
    return Sum(tuple(flat), sum(part.size for part in flat)) if flat else EMPTY


def resolve(term: Term) -> Term:
    """The term with every bound atom replaced by what it is bound to, in normal form."""
    if isinstance(term, Product):
        return product(*(resolve(factor) for factor in term.factors)) if term.factors else UNIT
    if isinstance(term, Sum):
        return concatenation(*(resolve(part) for part in term.parts)) if term.parts else EMPTY
    chain: list[Atom] = []
    found: Term = term
    while isinstance(found, Atom) and found.bound is not None:
        chain.append(found)
        found = found.bound
    if isinstance(found, Atom):
        found = UNIT if found.size == 1 else found
    else:
        found = resolve(found)
    for atom in chain:
        atom.bound = found
    return found


def root(atom: Atom) -> Atom:
    """The atom that stands for `atom`; for atoms that were not refined."""
    found = resolve(atom)
    if not isinstance(found, Atom):
        raise ValueError(f"{atom} was refined into {found}")
    return found


def atoms(term: Term) -> Iterator[Atom]:
    """Every atom of a term, from left to right, with repetitions."""
    term = resolve(term)
    if isinstance(term, Atom):
        yield term
        return
    for inner in term.factors if isinstance(term, Product) else term.parts:
        yield from atoms(inner)


def rigid(term: Term) -> bool:
    """Whether no atom of the term can shrink."""
    return all(atom.frozen is not None for atom in atoms(term))


def freeze(term: Term, why: str) -> None:
    """Let no atom of the term shrink; reasons given earlier stay."""
    for atom in atoms(term):
        if atom.frozen is None:
            atom.frozen = why


def reason(term: Term, otherwise: str) -> str:
    """Why the first frozen atom of a term is frozen."""
    return next((atom.frozen for atom in atoms(term) if atom.frozen is not None), otherwise)


def unify(left: Term, right: Term, why: str) -> None:
    """Make two terms of one size equal, index by index.

    What cannot be made equal keeps its size: its atoms are frozen with `why`.

    Raises:
        ValueError: the sizes differ.
    """
    left, right = resolve(left), resolve(right)
    if left == right:
        return
    if left.size != right.size:
        raise ValueError(f"{why}: sizes {left.size} and {right.size} cannot be one axis")
    if rigid(left):
        freeze(right, reason(left, why))
    elif rigid(right):
        freeze(left, reason(right, why))
    elif isinstance(left, Atom):
        _bind(left, right)
    elif isinstance(right, Atom):
        _bind(right, left)
    elif isinstance(left, Sum) or isinstance(right, Sum):
        _unify_sums(left, right, why)
    else:
        _unify_products(left.factors, right.factors, why)


def _bind(atom: Atom, term: Term) -> None:
    if isinstance(term, Atom) and term.hint is None:
        term.hint = atom.hint
    if atom.frozen is not None:
        freeze(term, atom.frozen)
    atom.bound = term


def _unify_sums(left: Term, right: Term, why: str) -> None:
    """Cut both at the boundaries of either, and unify piece by piece."""
    cuts = sorted({*_boundaries(left), *_boundaries(right)})
    pieces = split(left, cuts), split(right, cuts)
    if pieces[0] is None or pieces[1] is None:
        freeze(left, f"{why}: the pieces of a concatenation do not line up")
        freeze(right, f"{why}: the pieces of a concatenation do not line up")
        return
    for one, other in zip(pieces[0], pieces[1], strict=True):
        unify(one, other, why)


def _boundaries(term: Term) -> list[int]:
    """Interior offsets at which the parts of a sum meet."""
    offsets: list[int] = []
    place = 0
    for part in term.parts[:-1] if isinstance(term, Sum) else ():
        place += part.size
        offsets.append(place)
    return offsets


def split(term: Term, cuts: Sequence[int]) -> list[Term] | None:
    """The pieces of a term between interior offsets `cuts`, or None if it cannot be cut there.

    An atom is refined into a sum; a product is cut along its leading factor.
    """
    term = resolve(term)
    if not cuts:
        return [term]
    if isinstance(term, Atom):
        ends = [*cuts, term.size]
        sizes = [end - start for start, end in zip([0, *cuts], ends, strict=True)]
        pieces: list[Term] = [Atom(size, term.frozen, term.hint) for size in sizes]
        _bind(term, concatenation(*pieces))
        return [resolve(piece) for piece in pieces]
    if isinstance(term, Product):
        return _split_product(term, cuts)
    return _split_sum(term, cuts)


def _split_product(term: Product, cuts: Sequence[int]) -> list[Term] | None:
    lead, rest = term.factors[0], product(*term.factors[1:])
    if any(cut % rest.size for cut in cuts):
        return None
    pieces = split(lead, [cut // rest.size for cut in cuts])
    return None if pieces is None else [product(piece, rest) for piece in pieces]


def _split_sum(term: Sum, cuts: Sequence[int]) -> list[Term] | None:
    pieces: list[list[Term]] = [[] for _ in range(len(cuts) + 1)]
    index = place = 0
    for part in term.parts:
        end = place + part.size
        inner = [cut - place for cut in cuts if place < cut < end]
        cut_part = split(part, inner)
        if cut_part is None:
            return None
        for number, piece in enumerate(cut_part):
            index += number > 0
            pieces[index].append(piece)
        index += end in cuts
        place = end
    return [concatenation(*piece) for piece in pieces]


def _unify_products(left: Sequence[Term], right: Sequence[Term], why: str) -> None:
    """Align two products by the sizes of their tails; only stretches that do not fit freeze."""
    for one, other in stretches(left, right):
        _refine(list(one), list(other), why)


def stretches(
    left: Sequence[Term], right: Sequence[Term]
) -> list[tuple[Sequence[Term], Sequence[Term]]]:
    """Smallest consecutive runs of factors of equal total size, from left to right."""
    found: list[tuple[Sequence[Term], Sequence[Term]]] = []
    i, j = len(left), len(right)
    while i > 0 or j > 0:
        start_i, start_j, one, other = i, j, 1, 1
        while one != other or start_i == i and start_j == j:
            if start_i > 0 and (one <= other or start_j == 0):
                start_i -= 1
                one *= left[start_i].size
            else:
                start_j -= 1
                other *= right[start_j].size
        found.append((left[start_i:i], right[start_j:j]))
        i, j = start_i, start_j
    return found[::-1]


def _refine(left: list[Term], right: list[Term], why: str) -> None:
    """Unify two runs of factors by splitting the larger tail until the sizes meet."""
    while left and right:
        one, other = resolve(left.pop()), resolve(right.pop())
        if one.size == other.size:
            unify(one, other, why)
        elif one.size % other.size == 0:
            high, low = _factor(one, other.size, why)
            unify(low, other, why)
            left.append(high)
        elif other.size % one.size == 0:
            high, low = _factor(other, one.size, why)
            unify(one, low, why)
            right.append(high)
        else:
            for term in (*left, one, *right, other):
                freeze(term, f"{why}: sizes {one.size} and {other.size} have no common grid")
            return


def _factor(term: Term, low: int, why: str) -> tuple[Term, Term]:
    """The term as a product of two factors, the second of size `low`."""
    if rigid(term):
        frozen = reason(term, why)
        return Atom(term.size // low, frozen), Atom(low, frozen)
    parts = Atom(term.size // low), Atom(low)
    unify(term, product(*parts), why)
    return resolve(parts[0]), resolve(parts[1])


def positions(term: Term, keep: Mapping[Atom, Tensor]) -> Tensor:
    """Positions of a term that stay when atoms keep `keep` (int64, ascending as given).

    Atoms that are not in `keep` keep all their indices.
    """
    term = resolve(term)
    if isinstance(term, Atom):
        return keep.get(term, torch.arange(term.size))
    if isinstance(term, Product):
        found = torch.zeros(1, dtype=torch.int64)
        for factor in term.factors:
            found = (found[:, None] * factor.size + positions(factor, keep)).flatten()
        return found
    place, pieces = 0, [torch.zeros(0, dtype=torch.int64)]
    for part in term.parts:
        pieces.append(positions(part, keep) + place)
        place += part.size
    return torch.cat(pieces)


def indices(term: Term, atom: Atom) -> Tensor:
    """For every position of a term its index along `atom`, or -1 where the atom takes no part."""
    term = resolve(term)
    if isinstance(term, Atom):
        return torch.arange(term.size) if term is atom else torch.full((term.size,), -1)
    if isinstance(term, Product):
        found = torch.full((1,), -1)
        for factor in term.factors:
            inner = indices(factor, atom)
            found = torch.maximum(found[:, None], inner).flatten()
        return found
    pieces = [torch.zeros(0, dtype=torch.int64)]
    return torch.cat(pieces + [indices(part, atom) for part in term.parts])


def new_size(term: Term, sizes: Mapping[Atom, int]) -> int:
    """The size of a term when atoms have `sizes`; atoms not named keep theirs."""
    term = resolve(term)
    if isinstance(term, Atom):
        return sizes.get(term, term.size)
    if isinstance(term, Product):
        total = 1
        for factor in term.factors:
            total *= new_size(factor, sizes)
        return total
    return sum(new_size(part, sizes) for part in term.parts)


def repeats(term: Term) -> Iterable[Atom]:
    """Atoms that stand twice within one product of the term: their positions are not linear."""
    term = resolve(term)
    if isinstance(term, Sum):
        for part in term.parts:
            yield from repeats(part)
    elif isinstance(term, Product):
        seen: set[Atom] = set()
        for factor in term.factors:
            inner = set(atoms(factor))
            yield from inner & seen
            yield from repeats(factor)
            seen |= inner
