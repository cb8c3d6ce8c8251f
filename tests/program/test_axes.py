"""The term algebra: unification against what views and concatenations do to real indices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.program.axes import (
    EMPTY,
    UNIT,
    Atom,
    Product,
    Sum,
    atoms,
    concatenation,
    freeze,
    indices,
    new_size,
    positions,
    product,
    repeats,
    resolve,
    rigid,
    split,
    stretches,
    unify,
)


def all_atoms(*terms):
    return list(dict.fromkeys(atom for term in terms for atom in atoms(term)))


def random_keep(terms, seed):
    """A random non-empty choice of indices for every atom that may shrink."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for atom in all_atoms(*terms):
        if atom.frozen is None:
            count = int(torch.randint(1, atom.size + 1, (1,), generator=generator))
            keep[atom] = torch.randperm(atom.size, generator=generator)[:count].sort().values
    return keep


def test_a_view_refines_an_atom():
    width, heads, size = Atom(768), Atom(12), Atom(64)
    unify(width, product(heads, size), "view")
    assert resolve(width) == Product((heads, size), 768)
    kept = positions(width, {heads: torch.tensor([1, 3])})
    assert torch.equal(kept, torch.cat([torch.arange(64, 128), torch.arange(192, 256)]))
    assert new_size(width, {heads: 2, size: 10}) == 20


def test_two_factorisations_meet_on_their_common_grid():
    first, second = [Atom(12), Atom(64)], [Atom(24), Atom(32)]
    unify(product(*first), product(*second), "view")
    assert [atom.size for atom in all_atoms(*first)] == [12, 2, 32]
    assert all_atoms(*first) == all_atoms(*second)


def test_without_a_common_grid_only_the_stretch_freezes():
    a, b, c, d, free = Atom(4), Atom(6), Atom(6), Atom(4), Atom(7)
    other = Atom(7)
    unify(product(free, a, b), product(other, c, d), "odd view")
    assert all(rigid(term) for term in (a, b, c, d))
    assert "odd view" in next(atoms(a)).frozen
    assert not rigid(free) and resolve(free) == resolve(other)


def test_concatenations_are_cut_at_the_boundaries_of_either():
    left, right = [Atom(4), Atom(8)], [Atom(8), Atom(4)]
    unify(concatenation(*left), concatenation(*right), "cat")
    assert [atom.size for atom in all_atoms(*left)] == [4, 4, 4]
    assert all_atoms(*left) == all_atoms(*right)


def test_a_fused_matrix_may_be_viewed_and_split():
    fused, three, heads, size = Atom(36), Atom(3), Atom(3), Atom(4)
    unify(fused, product(three, heads, size), "view")
    pieces = split(fused, [12, 24])
    assert pieces == [Product((heads, size), 12)] * 3


def test_a_frozen_term_freezes_what_it_meets_with_its_reason():
    left, right = Atom(6, "input x"), product(Atom(2), Atom(3))
    unify(left, right, "add")
    assert {atom.frozen for atom in atoms(right)} == {"input x"}
    with pytest.raises(ValueError, match="cannot be one axis"):
        unify(Atom(2), Atom(3), "add")


def test_rotated_halves_become_one_atom():
    head = Atom(8)
    one, two = split(head, [4])
    unify(head, concatenation(two, one), "rotate")
    assert len(all_atoms(head)) == 1
    assert positions(head, {all_atoms(head)[0]: torch.tensor([1])}).tolist() == [1, 5]


def test_units_and_empties_vanish():
    atom = Atom(5)
    assert (
        product(Atom(1), atom, UNIT) == Product((Atom(1), atom), 5) or product(atom, UNIT) is atom
    )
    assert resolve(Atom(1)) == UNIT and concatenation(atom, EMPTY) is atom
    assert product(atom, EMPTY) == EMPTY


def test_a_product_is_cut_along_its_leading_factor_only():
    lead, rest = Atom(3), Atom(4)
    assert split(product(lead, rest), [5]) is None
    pieces = split(product(lead, rest), [4])
    assert [piece.size for piece in pieces] == [4, 8]


def test_indices_map_positions_to_the_atom():
    a, b = Atom(2), Atom(3)
    term = concatenation(product(a, b), Atom(2))
    assert indices(term, b).tolist() == [0, 1, 2, 0, 1, 2, -1, -1]
    assert indices(term, a).tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    assert list(repeats(product(a, b, a))) == [a]
    assert not list(repeats(concatenation(a, a)))


def test_long_chains_of_bindings_resolve():
    first = Atom(3)
    links = [first, *(Atom(3) for _ in range(5000))]
    for one, other in zip(links, links[1:], strict=False):
        one.bound = other
    assert resolve(first) is links[-1]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_unified_views_keep_the_same_positions(data):
    """Whatever two factorisations of one axis are unified, both sides foretell the same cut."""
    total = data.draw(st.sampled_from([12, 24, 36, 48, 60]))

    def factors():
        found, rest = [], total
        while rest > 1:
            divisors = [d for d in range(2, rest + 1) if rest % d == 0]
            found.append(data.draw(st.sampled_from(divisors)))
            rest //= found[-1]
        return found

    left, right = ([Atom(size) for size in factors()] for _ in range(2))
    unify(product(*left), product(*right), "view")
    keep = random_keep([*left, *right], data.draw(st.integers(0, 99)))
    one, other = positions(product(*left), keep), positions(product(*right), keep)
    assert torch.equal(one, other)
    sizes = {atom: len(kept) for atom, kept in keep.items()}
    assert new_size(product(*left), sizes) == len(one)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_unified_concatenations_keep_the_same_positions(data):
    """Sums of atoms and products, cut differently on both sides."""
    lengths = st.lists(st.integers(1, 4), min_size=1, max_size=4)
    width = data.draw(st.integers(1, 3))
    left = data.draw(lengths)
    right = data.draw(lengths)
    short = sum(left) - sum(right)
    (right if short > 0 else left).append(abs(short))
    shared = Atom(width)
    sides = [
        [product(Atom(size), shared) if wide else Atom(size * width) for size in side if size]
        for side, wide in ((left, True), (right, data.draw(st.booleans())))
    ]
    terms = [concatenation(*side) for side in sides]
    unify(terms[0], terms[1], "cat")
    keep = random_keep(terms, data.draw(st.integers(0, 99)))
    assert torch.equal(positions(terms[0], keep), positions(terms[1], keep))


def test_stretches_cover_both_sides():
    left, right = [Atom(2), Atom(3), Atom(4)], [Atom(6), Atom(1), Atom(2), Atom(2)]
    found = stretches(left, right)
    assert [t for one, _ in found for t in one] == left
    assert [t for _, other in found for t in other] == right
    for one, other in found:
        assert math.prod(t.size for t in one) == math.prod(t.size for t in other)


def test_freeze_reaches_every_atom_and_keeps_earlier_reasons():
    a, b = Atom(2, "first"), Atom(3)
    term = Sum((a, Product((b, a), 6)), 8)
    freeze(term, "second")
    assert (a.frozen, b.frozen) == ("first", "second")
