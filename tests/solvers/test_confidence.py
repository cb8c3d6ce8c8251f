"""Limits of doubt: how far they go is up to the samples that test them."""

import numpy as np
import torch

from laconic.core.task import classification
from laconic.solvers.dynamic.confidence import Answers, solve


def answers(wrong):
    """One exit, doubt spread over four powers of ten; it is wrong in `wrong`, the end never."""
    doubt = np.geomspace(1e-4, 1, len(wrong))[:, None]
    ones = np.ones(len(wrong))
    return Answers(doubt, np.stack([1.0 - wrong, ones], axis=1), ones, np.array([0.3, 1.0]))


def test_limits_loosen_until_the_samples_that_test_them_object():
    count, seed = 9000, 3
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    wrong = np.zeros(count)
    # those that choose where to look are unlucky behind a tenth of the way, the others are not
    wrong[[at for at in order[: count // 3] if at > count // 10]] = 1
    task = classification(validation=[])
    found = solve(answers(wrong), task, 0.3, 0.95, torch.Generator().manual_seed(seed))
    assert found.leaving[0] == 1.0
    wrong[[at for at in order[count // 3 :] if at > count // 2]] = 1
    found = solve(answers(wrong), task, 0.3, 0.95, torch.Generator().manual_seed(seed))
    assert 0.45 < found.leaving[0] < 0.52
    assert found.drop.bound <= 0.3
