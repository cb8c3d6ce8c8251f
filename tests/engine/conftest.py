"""A tiny model, its task, and methods small enough to check by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.core.task import Task, classification
from laconic.engine import run as run_module
from laconic.methods.base import Context, Method, Outcome
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.program.surgery import cut


class Scale(Method):
    """Multiplies the last weight."""

    factor: float = 2.0

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        calls.append(("scale", self.factor))
        made = program.clone()
        made.set_tensor("2.weight", made.tensor("2.weight").detach() * self.factor)
        return Outcome(program=made, resolved={"factor": self.factor}, notes=["scaled"])


class Halve(Method):
    """Keeps every second hidden channel."""

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        calls.append(("halve", 0.0))
        group = groups(program)[0]
        made, changes = cut(program, {group.name: list(range(0, group.size, 2))})
        return Outcome(
            program=made, changes=changes, figures={"kept": torch.tensor(group.size // 2)}
        )


calls: list[tuple[str, float]] = []
FAKES: dict[str, type[Method]] = {"scale": Scale, "halve": Halve}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Recipes may name `scale` and `halve`; the list says what really ran."""

    def method_of(step: Any, where: str) -> Method:
        return FAKES[step.method](**step.options)

    monkeypatch.setattr(run_module, "method_of", method_of)
    calls.clear()
    return calls


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def program(model: nn.Module) -> Program:
    return capture(model, torch.randn(2, 4))


def batches(count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 4, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.fixture
def task() -> Task:
    return classification(train=batches(), validation=batches(), test=batches())
