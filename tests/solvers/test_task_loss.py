"""The loss that says what a change costs: with labels, without them, over so many samples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.errors import DataError
from laconic.core.task import classification, embedding
from laconic.program.capture import capture
from laconic.solvers.teaching.task_loss import TaskLoss

CPU = torch.device("cpu")


@pytest.fixture
def net():
    def build(seed):
        torch.manual_seed(seed)
        return capture(nn.Sequential(nn.Linear(5, 4)).eval(), (torch.zeros(2, 5),))

    with torch.random.fork_rng():
        yield build


def test_labels_are_used_where_there_are_some(net, generator):
    x, y = torch.randn(10, 5, generator=generator), torch.arange(10) % 4
    task = classification(calibration=[(x[:6], y[:6]), (x[6:], y[6:])])
    program = net(0)
    with torch.no_grad():
        wanted = F.cross_entropy(program(x), y).item()
        first = F.cross_entropy(program(x[:8]), y[:8]).item()
    assert TaskLoss(task, net(1), 100, CPU)(program) == pytest.approx(wanted, rel=1e-5)
    assert TaskLoss(task, net(1), 8, CPU)(program) == pytest.approx(first, rel=1e-5)


def test_without_labels_it_is_the_divergence_from_the_original(net, generator):
    x = torch.randn(10, 5, generator=generator)
    task = classification(calibration=[(x[:7],), (x[7:],)])
    program, original = net(0), net(1)
    loss = TaskLoss(task, original, 9, CPU)
    with torch.no_grad():
        p, q = original(x[:9]).softmax(-1), program(x[:9]).softmax(-1)
    wanted = (p * (p / q).log()).sum(-1).mean().item()
    assert loss(program) == pytest.approx(wanted, rel=1e-4)
    assert loss(program) == pytest.approx(wanted, rel=1e-4)  # what it remembers is the same
    assert abs(loss(original)) < 1e-6


def test_embeddings_are_compared_by_cosine(net, generator):
    x = torch.randn(6, 5, generator=generator)
    program, original = net(0), net(1)
    loss = TaskLoss(embedding(calibration=[(x,)]), original, 6, CPU)
    with torch.no_grad():
        wanted = 1 - F.cosine_similarity(program(x), original(x)).mean().item()
    assert loss(program) == pytest.approx(wanted, rel=1e-4)


def test_no_data_is_an_error(net):
    with pytest.raises(DataError):
        TaskLoss(classification(calibration=[]), net(0), 4, CPU)(net(0))
