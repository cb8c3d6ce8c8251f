"""Inputs drawn from batch normalisation: their statistics, their classes, and what they teach."""

import pytest
import torch
from torch import nn

from laconic.core.errors import RecipeError
from laconic.core.task import classification
from laconic.methods.base import Context
from laconic.methods.distill.logits import Logits
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.solvers.teaching.learning import Course
from laconic.solvers.teaching.synthetic_inputs import Drawing

SHORT = {"precision": "fp32", "evaluations": 1, "teacher": "torch", "data": "synthetic"}


class Net(nn.Module):
    """[batch, 3, 8, 8] -> [batch, 3]; its inputs have mean 5 and spread 2."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.first(x)))
        x = torch.relu(self.bn2(self.second(x)))
        return self.head(x.mean((2, 3)))


def real(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 5 + 2 * torch.randn(count, 3, 8, 8, generator=generator)


@pytest.fixture
def teacher():
    net = Net()
    with torch.no_grad():
        net.head.weight.mul_(40)
        for part in (net.bn, net.bn2):
            part.momentum = None  # the plain mean
        net.train()
        for _ in range(4):
            net(real(64, 3))
        net.head.bias.copy_(-net.eval()(real(64)).mean(0))
    return capture(net.eval(), (real(2),))


def drawn(teacher, count, steps):
    course = Course(task=classification(), original=teacher)
    drawing = Drawing.of(teacher, course)
    return drawing, drawing.batches(count, steps, course.progress)


def test_statistics_are_those_remembered_and_classes_are_dealt_evenly(teacher):
    before = {name: tensor.clone() for name, tensor in teacher.tensors()}
    rough, _ = drawn(teacher, 30, 1)
    drawing, (values,) = drawn(teacher, 30, 150)
    assert values.shape == (30, 3, 8, 8)
    assert drawing.left < 0.1 * rough.left
    assert drawing.left < 0.05  # nats a channel: means within a third of a deviation
    with torch.no_grad():
        classes = teacher(values).argmax(1).bincount(minlength=3)
    assert classes.min() >= 7  # ten each were dealt
    again = drawn(teacher, 30, 150)[1][0]
    assert torch.equal(values, again)
    for name, tensor in teacher.tensors():
        assert torch.equal(tensor, before[name])
    assert len(teacher.output_node.args[0]) == 1


def apply(options, student, teacher, task):
    method = Logits(**{**SHORT, **options})
    return method.apply(student, Sites(), Context(task=task, original=teacher))


def test_a_damaged_network_recovers_without_data(teacher):
    student = teacher.clone()
    weight = teacher.tensor("second.weight").detach()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weight.shape, generator=generator)
    student.set_tensor("second.weight", weight + weight.std() * noise)
    x = real(64, 9)
    with torch.no_grad():
        labels = teacher(x).argmax(1)
    task = classification(validation=[(x, labels)])
    options = {"steps": 60, "lr": 5e-4, "synthetic": 60, "synthetic_steps": 60}
    made = apply(options, student, teacher, task)
    history = made.figures["history"]
    assert made.notes[0].startswith("learned from 60 inputs drawn from batch normalisation")
    assert history[-1]["divergence"] < 0.75 * history[0]["divergence"]
    replayed = apply(dict(made.resolved), student, teacher, task)
    for name, tensor in made.program.tensors():
        assert torch.equal(tensor, replayed.program.tensor(name))


def test_what_cannot_be_drawn_is_refused_in_words(teacher):
    student = capture(Net(6).eval(), (real(2),))
    with pytest.raises(RecipeError, match="synthetic inputs have no labels"):
        apply({"alpha": 0.5, "steps": 1}, student, teacher, classification())
    plain = capture(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval(), (real(2),))
    with pytest.raises(RecipeError, match="the teacher has none.*a few hundred unlabelled samples"):
        apply({"steps": 1}, student, plain, classification())

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.bn = nn.BatchNorm1d(4)

        def forward(self, ids):
            return self.bn(self.table(ids).mean(1))

    text = capture(Text().eval(), (torch.zeros(2, 3, dtype=torch.long),))
    with pytest.raises(RecipeError, match=r"one float tensor, found ids \(torch.int64\)"):
        apply({"steps": 1}, text, text, classification())
