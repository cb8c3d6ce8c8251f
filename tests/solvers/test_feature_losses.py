"""Identities of the losses between inner values."""

import pytest
import torch

from laconic.solvers.teaching import feature_losses as inner

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def values(generator):
    """[batch, channels, h, w], [batch, tokens, width], [batch, features]."""
    shapes = [(6, 8, 4, 4), (6, 5, 8), (6, 8)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_equal_values_cost_nothing(values):
    for value in values:
        # two unit vectors from the same numbers differ by nothing; so do distances and angles
        assert inner.relational([value], [value.clone()]) == 0
    for value in values[:2]:
        assert inner.attention([value], [value.clone()]) == 0
        assert inner.relations(1)([values[1]], [values[1].clone()], None) == 0


def test_attention_maps_forget_channels_and_scale(values, generator):
    image, tokens, _ = values
    order = torch.randperm(8, generator=generator)
    # a permuted mean of eight squares: rounding of a sum, scaled by a power of two
    assert inner.attention([4 * image[:, order]], [image]) < 16 * EPS
    wide = torch.cat([image, image], 1)
    assert inner.attention([wide], [image]) < 16 * EPS
    assert inner.attention([tokens[..., order]], [tokens]) < 16 * EPS
    assert inner.attention([image.flip(3)], [image]) > 0.01


def test_relations_of_a_batch_forget_rotations_and_scale(values, generator):
    flat = values[2].double()
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator).double())
    # points are taken in float32: distances of size one to a few eps, amplified by cancellation
    assert inner.relational([3 * flat @ turn], [flat]) < 1e-9
    assert inner.relational([flat + 5], [flat]) < 1e-9
    wider = torch.cat([flat, torch.zeros(6, 3)], 1)
    assert inner.relational([wider], [flat]) < 1e-9
    assert inner.relational([flat.roll(1, 0)], [flat]) > 0.01


def test_samples_that_coincide_have_finite_gradients():
    point = torch.ones(4, 3, requires_grad=True)
    inner.relational([point], [torch.randn(4, 3)]).backward()
    assert torch.isfinite(point.grad).all()
    point.grad = None
    inner.contrastive([point], [torch.randn(4, 3)]).backward()
    assert torch.isfinite(point.grad).all()


def test_contrast_is_least_for_ones_own_teacher(values):
    for value in values:
        own = inner.contrastive([value], [value])
        assert own < inner.contrastive([value.roll(1, 0)], [value])
    # all alike: nothing is known, so the loss is that of guessing, log of the batch
    same = torch.ones(6, 8)
    guessing = torch.tensor(6.0).log()
    torch.testing.assert_close(inner.contrastive([same], [values[2]]), guessing)


def test_relations_take_other_heads_and_widths(generator):
    """Heads are joined and split anew: values with and without heads are the same."""
    student = torch.randn(2, 3, 5, 4, generator=generator)  # 3 heads of 4
    teacher = torch.randn(2, 2, 5, 12, generator=generator)  # 2 heads of 12
    for heads in (1, 2, 6, 12):
        loss = inner.relations(heads)([student], [teacher], None)
        joined = inner.relations(heads)(
            [student.transpose(1, 2).flatten(2)], [teacher.transpose(1, 2).flatten(2)], None
        )
        assert loss == joined
        assert loss > 0


def test_relations_leave_padding_out(generator):
    student, teacher = torch.randn(2, 2, 2, 5, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    spoilt = student.clone()
    spoilt[0, :, 3:] = 1e3
    loss = inner.relations(2)
    assert loss([spoilt], [teacher], mask) == loss([student], [teacher], mask)
    short = loss([student[:1, :, :3]], [teacher[:1, :, :3]], None)
    torch.testing.assert_close(loss([student[:1]], [teacher[:1]], mask[:1]), short)
    for kind in (inner.attention, inner.relational, inner.contrastive):
        one, two = student.flatten(2), teacher.flatten(2)  # [batch, 2 tokens, 20]
        held = torch.tensor([[1, 0], [1, 0]])
        other = one.clone()
        other[:, 1] = 1e3
        assert kind([other], [two], held) == kind([one], [two], held)
