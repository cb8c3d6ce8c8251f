"""The objective of learning from a teacher: precision of its losses, outputs without a distribution."""

import pytest
import torch
from torch import nn

from laconic.core.errors import RecipeError
from laconic.core.task import classification, embedding
from laconic.program.capture import capture
from laconic.solvers.teaching import feature_losses
from laconic.training.distillation import Distillation, kind_for, kind_of
from laconic.training.precision import autocast
from laconic.training.taps import tapped
from laconic.training.teacher import Original

CPU = torch.device("cpu")


def net(outputs=4):
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs)]
    return capture(nn.Sequential(*layers).eval(), (torch.randn(2, 6),))


def test_losses_are_not_rounded_by_autocast():
    # far from the origin and near each other: rounded products would leave nothing of distances
    student, teacher = net(), net()
    with torch.no_grad():
        for program in (student, teacher):
            program.tensor("0.bias").add_(30.0)
    task = classification()
    with tapped(student, ["relu"]):
        objective = Distillation(
            task=task, student=student, teacher=Original(teacher, ["relu"], CPU, "fp32"),
            outputs=1, device=CPU, features=1.0, compare=feature_losses.relational,
        )  # fmt: skip
        x = torch.randn(8, 6)
        given = student.run_flat(x)
        plain = objective(lambda *_: given, x, 0).value
        with autocast(CPU, "bf16"):
            rounded = objective(lambda *_: given, x, 0).value
    assert torch.equal(plain, rounded)


def test_single_numbers_have_no_distribution():
    task, one = classification(), net(outputs=1)
    assert kind_of("auto", one, task, 1.0, CPU) == "mse"
    assert kind_of("auto", net(), task, 1.0, CPU) == "kl"
    assert kind_of("auto", one, embedding(), 1.0, CPU) == "cosine"
    assert kind_for(task, torch.zeros(5)) == "mse"
    assert kind_of("kl", one, task, 0.0, CPU) == "kl"  # outputs are not compared
    for wish in ("kl", "dkd"):
        with pytest.raises(RecipeError, match=r"\[2, 1\] are one number a sample"):
            kind_of(wish, one, task, 0.5, CPU)
