"""Identities of codebooks and shared bases."""

import pytest
import torch

from laconic import forms
from laconic.forms import basis, codebook
from laconic.forms.basis import Basis
from laconic.forms.codebook import Codebook
from laconic.forms.operators import combine, lookup

LAYOUTS = [(None, 1, 1), (0, 1, 6), (1, 3, 2), (0, 4, 2)]  # axis, group, number of books


def case(axis, group, books, zero):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 4, 3, generator=generator)
    if zero:
        x = x.masked_fill(x.abs() < 0.6, 0.0)
    lists = [torch.randn(5 - n % 2, generator=generator) for n in range(books)]
    return x, lists, codebook.nearest(x, lists, axis, group, zero)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("axis", "group", "books"), LAYOUTS)
def test_every_element_is_the_nearest_of_its_own_book(axis, group, books, zero):
    x, lists, form = case(axis, group, books, zero)
    pieces = [x] if axis is None else x.split(group, axis)
    expected = []
    for piece, book in zip(pieces, lists, strict=True):
        near = book[(piece[..., None] - book).abs().argmin(-1)]
        expected.append(near.masked_fill(piece == 0, 0.0) if zero else near)
    whole = expected[0] if axis is None else torch.cat(expected, axis)
    assert torch.equal(form.decode(), whole)
    assert int(form.codes.min()) >= form.low
    assert int(form.codes.max()) < form.low + form.values.shape[-1]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("axis", "group", "books"), LAYOUTS)
def test_what_was_decoded_has_the_same_codes(axis, group, books, zero):
    _, lists, form = case(axis, group, books, zero)
    assert torch.equal(codebook.nearest(form.decode(), lists, axis, group, zero).codes, form.codes)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("axis", "group", "books"), LAYOUTS)
def test_operator_form_and_parts_agree(axis, group, books, zero):
    *_, form = case(axis, group, books, zero)
    rest = (axis, group, form.low, zero)
    assert torch.equal(lookup(form.codes, form.values, *rest), form.decode())
    again = forms.build("codebook", form.tensors(), form.meta())
    assert isinstance(again, Codebook)
    assert torch.equal(again.decode(), form.decode())
    assert (again.nbytes(), again.meta()) == (form.nbytes(), form.meta())


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("axis", "group", "books"), LAYOUTS)
def test_a_value_gets_the_summed_gradient_of_its_members(axis, group, books, zero):
    *_, form = case(axis, group, books, zero)
    upstream = torch.randn(form.codes.shape, generator=torch.Generator().manual_seed(2))
    values = form.values.clone().requires_grad_()
    lookup(form.codes, values, axis, group, form.low, zero).backward(upstream)
    expected = torch.zeros_like(form.values)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in form.codes.shape)).tolist():
        code = int(form.codes[tuple(place)])
        if zero and code == 0:
            continue
        row = () if axis is None else (place[axis] // group,)
        expected[(*row, code - form.low)] += upstream[tuple(place)]
    assert torch.allclose(values.grad, expected, atol=1e-5)


def test_zeros_stay_whatever_happens_to_the_values():
    x, _, form = case(None, 1, 1, True)
    moved = lookup(form.codes, form.values + 10, None, 1, form.low, True)
    assert torch.equal(moved == 0, x == 0)


def test_without_a_book_everything_is_zero():
    form = codebook.nearest(torch.zeros(3, 2), [torch.zeros(0)], None, 1, True)
    assert torch.equal(form.decode(), torch.zeros(3, 2))


def test_codes_count_from_the_value_next_to_zero():
    book = torch.tensor([-3.0, -1.0, 0.2, 4.0])
    form = codebook.nearest(torch.tensor([-3.0, 0.0, 4.0]), [book], None, 1, False)
    assert form.codes.tolist() == [-2, 0, 1] and form.codes.dtype == torch.int8


def test_bytes_are_packed_bits_and_values():
    form = codebook.nearest(torch.randn(3, 5), [torch.randn(8)], None, 1, False)
    assert form.nbytes() == 6 + 32  # 15 codes of 3 bits


def test_shapes_that_do_not_fit_are_named():
    codes = torch.zeros(6, 4, dtype=torch.int8)
    assert codebook.fits(codes, torch.zeros(4), None, 1) == ""
    assert codebook.fits(codes, torch.zeros(2, 4), 0, 4) == ""
    for values, axis, group in ((torch.zeros(2, 4), None, 1), (torch.zeros(3, 4), 0, 4),
                                (torch.zeros(6, 4), 2, 1), (torch.zeros(6, 4), 0, 0)):  # fmt: skip
        assert codebook.fits(codes, values, axis, group)


def test_operators_keep_torchs_rules():
    *_, form = case(0, 1, 6, True)
    values = form.values.clone().requires_grad_()
    torch.library.opcheck(lookup, (form.codes, values, 0, 1, form.low, True))
    parts = torch.randn(2, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(combine, parts)


def test_a_basis_is_summed_and_both_sides_take_gradients():
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
    shared = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    expected = torch.einsum("r,rab->ab", own, shared)
    assert torch.allclose(combine(own, shared), expected)
    form = Basis(own.detach(), shared.detach())
    again = forms.build("basis", form.tensors(), form.meta())
    assert torch.equal(again.decode(), basis.decode(own.detach(), shared.detach()))
    assert form.nbytes() == 8 * (3 + 24)
    assert torch.autograd.gradcheck(combine, (own, shared))
