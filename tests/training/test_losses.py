"""Identities of the distillation losses."""

import torch
import torch.nn.functional as F

from laconic.training import losses


def test_equal_outputs_cost_nothing(generator):
    logits = torch.randn(6, 5, generator=generator)
    for temperature in (1.0, 4.0):
        # log p - log q is exactly 0 for equal inputs
        assert losses.soft_targets(logits, logits.clone(), temperature) == 0
    assert losses.relative_error(logits, logits.clone()) == 0
    # the cosine of a vector with itself is 1 up to the rounding of two norms
    assert abs(losses.cosine(logits, logits.clone())) < 4 * torch.finfo(torch.float32).eps


def test_soft_targets_are_kl_divergence(generator):
    student, teacher = torch.randn(2, 7, 5, generator=generator)
    temperature = 3.0
    reference = F.kl_div(
        F.log_softmax(student.double() / temperature, -1),
        F.softmax(teacher.double() / temperature, -1),
        reduction="batchmean",
    )
    found = losses.soft_targets(student, teacher, temperature)
    torch.testing.assert_close(found.double(), reference * temperature**2, rtol=1e-5, atol=1e-7)


def test_soft_targets_at_high_temperature_match_logits(generator):
    """Hinton et al., equation 4: the loss tends to half the squared distance of centred logits, a class."""
    student, teacher = torch.randn(2, 9, 4, generator=generator).double()
    centred = (student - student.mean(-1, keepdim=True)) - (
        teacher - teacher.mean(-1, keepdim=True)
    )
    wanted = 0.5 * centred.pow(2).mean()
    found = losses.soft_targets(student, teacher, 300.0)
    # next term of the series is smaller by (range of logits / temperature) ~ 0.02; float32 inside
    torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=0)


def test_hard_targets_are_cross_entropy_to_the_teachers_choice(generator):
    student, teacher = torch.randn(2, 2, 3, 5, generator=generator)
    wanted = F.cross_entropy(student.flatten(0, 1), teacher.argmax(-1).flatten())
    torch.testing.assert_close(losses.hard_targets(student, teacher), wanted)


def test_mask_leaves_padding_out(generator):
    student, teacher = torch.randn(2, 2, 6, 5, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    spoilt = student.clone()
    spoilt[mask == 0] = 1e3
    for loss in (
        lambda s, t: losses.soft_targets(s, t, 2.0, mask),
        lambda s, t: losses.hard_targets(s, t, mask),
        lambda s, t: losses.cosine(s, t, mask),
        lambda s, t: losses.relative_error(s, t, mask),
        lambda s, t: losses.features([s], [t], mask),
    ):
        assert loss(spoilt, teacher) == loss(student, teacher)
    kept = mask.bool()
    torch.testing.assert_close(
        losses.soft_targets(student, teacher, 2.0, mask),
        losses.soft_targets(student[kept], teacher[kept], 2.0),
    )


def test_features_do_not_depend_on_scale(generator):
    student, teacher = torch.randn(2, 3, 4, generator=generator)
    once = losses.features([student], [teacher])
    torch.testing.assert_close(
        losses.features([16 * student], [16 * teacher]), once, rtol=0, atol=0
    )


def test_decoupled_parts_make_up_the_divergence(generator):
    """Zhao et al., equation 5: KL = target part + (1 - p) other part, p the target's probability."""
    student, teacher = 3 * torch.randn(2, 7, 6, 5, generator=generator)
    classes = torch.randint(0, 5, (7, 6), generator=generator)
    temperature = 2.0
    first, second = losses.decoupled(student, teacher, classes, temperature)
    p = F.softmax(teacher / temperature, -1).gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    whole = (first + (1 - p) * second).mean() * temperature**2
    # sums of five logarithms of size one to ten in float32
    torch.testing.assert_close(
        whole, losses.soft_targets(student, teacher, temperature), rtol=1e-4, atol=1e-6
    )
    assert losses.decoupled_targets(student, student, classes, temperature, (1.0, 8.0)) < 1e-6


def test_the_hardest_positions_are_those_that_differ_most(generator):
    student, teacher = torch.randn(2, 3, 4, 5, generator=generator)
    each = (F.softmax(teacher, -1) * (F.log_softmax(teacher, -1) - F.log_softmax(student, -1))).sum(
        -1
    )
    chosen = losses.hardest(student, teacher, 0.25)
    assert chosen.sum() == 3
    assert each[chosen].min() > each[~chosen].max()
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    chosen = losses.hardest(student, teacher, 0.5, mask)
    assert chosen.sum() == 2
    assert (chosen <= mask.bool()).all()
    everywhere = losses.hardest(student, teacher, 1.0)
    assert everywhere.all()


def test_several_teachers_are_averaged_in_probabilities(generator):
    one, two = 3 * torch.randn(2, 6, 5, generator=generator)
    temperature = 3.0
    mean = (F.softmax(one / temperature, -1) + F.softmax(two / temperature, -1)) / 2
    found = losses.mixture([one, two], "kl", temperature)
    torch.testing.assert_close(F.softmax(found / temperature, -1), mean)
    assert losses.mixture([one], "kl", temperature) is one
    torch.testing.assert_close(losses.mixture([one, two], "mse", 1.0), (one + two) / 2)
    again = losses.mixture([one, one], "dkd", temperature)
    assert losses.soft_targets(one, again, temperature) < 1e-6


def test_a_mask_of_tokens_hides_no_features(generator):
    student, teacher = (torch.randn(3, 5, generator=generator) for _ in range(2))
    mask = (torch.arange(5) < 2).expand(3, -1)  # as many tokens as there are features
    assert losses.relative_error(student, teacher, mask) == losses.relative_error(student, teacher)
