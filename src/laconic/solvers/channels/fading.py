"""What is going to be pruned fades while training goes on, until its removal changes nothing.

A part of the weights (or of the indices of groups) is under a penalty, the rest is free. The plan
is how much of the penalised norm is left after each step: 1 at the beginning, falling ever faster
to 0 at the end of the fading. What the plan asks for is a factor from step to step; the strength of
the penalty is what it takes to get it (`proximal.py`). Where the loss pushes back, the norm is
larger than planned and the strength grows in proportion.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.errors import RecipeError
from laconic.program.groups import Group, groups
from laconic.program.program import Program
from laconic.program.surgery import Changes, cut_
from laconic.solvers.channels import proximal
from laconic.solvers.channels.selection import Keep
from laconic.solvers.importance.base import pooled
from laconic.training.attendant import Attendant
from laconic.training.plan import Plan

Norm = Literal["l1", "l2"]
_TOLD = 10  # strengths that are kept for the report


def left(step: int, steps: int, pace: float) -> float:
    """How much of the norm is to be left after `step` of `steps` steps: from 1 to 0.

    >>> [left(step, 4, 2.0) for step in (0, 2, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """
    return 1 - min(step / steps, 1) ** pace


class Fading(Attendant, ABC):
    """What both kinds share: the plan, and the strengths that were found.

    Attributes:
        strengths: step → mean strength of the penalty (lambda), about ten of them.
        end: the step after which the faded part is zero.
    """

    def __init__(self, share: float, pace: float) -> None:
        """`share` of the steps serve the fading; `pace` is the power of time in the plan."""
        self._share, self._pace = share, pace
        self.strengths: dict[int, float] = {}
        self.end = 1

    def begin(self, program: Program, plan: Plan) -> None:
        """Take the program and the length."""
        self.program = program
        self.end = max(1, round(self._share * (plan.steps or 1)))

    @torch.no_grad()
    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """The proximal step of the penalty, right after that of the optimizer."""
        if step > self.end:
            return
        before = left(step - 1, self.end, self._pace)
        factor = left(step, self.end, self._pace) / before
        found = self.fade(factor)
        rate = float(optimizer.param_groups[0]["lr"])
        told = max(1, self.end // _TOLD)
        if found and rate > 0 and step % told == 0 and step < self.end:
            self.strengths[step] = sum(found) / len(found) / rate
        if step == self.end:
            self.finish(optimizer)

    @abstractmethod
    def fade(self, factor: float) -> list[float]:
        """Shrink the norm by `factor`; the strengths times the learning rate that it took."""

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """The faded part has become zero."""

    def judged(self, step: int) -> bool:
        """Only states without the faded part count."""
        return step >= self.end

    def tensors(self) -> Mapping[str, Tensor]:
        """The strengths."""
        return {
            f"strength/{step}": torch.tensor(v, dtype=torch.float64)
            for step, v in self.strengths.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        found = {k: v for k, v in tensors.items() if k.startswith("strength/")}
        self.strengths = {int(k.split("/")[1]): float(v) for k, v in found.items()}


class FadingWeights(Fading):
    """Single weights fade to zeros that last."""

    def __init__(self, keep: Keep, norm: Norm, share: float, pace: float) -> None:
        """`keep`: tensor → which of its weights stay, bool of its shape."""
        super().__init__(share, pace)
        self._keep, self._norm = keep, norm
        self._faded = False

    def fade(self, factor: float) -> list[float]:
        """One proximal step for every tensor."""
        step = proximal.l1 if self._norm == "l1" else proximal.l2
        found: list[float] = []
        for name, gone in self._gone().items():
            tensor = self.program.tensor(name)
            values, strength = step(tensor[gone], factor)
            tensor[gone] = values
            found.append(strength)
        return found

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """No momentum moves them any more, and no gradient will."""
        for name, gone in self._gone().items():
            for value in optimizer.state.get(self.program.tensor(name), {}).values():
                if isinstance(value, Tensor) and value.shape == gone.shape:
                    value.masked_fill_(gone, 0.0)
        self._guard()

    def project(self, tensors: Mapping[str, Tensor]) -> None:
        """A running mean that remembers faded weights forgets them once they are zero."""
        if self._faded:
            for name, gone in self._gone().items():
                if name in tensors:
                    tensors[name].masked_fill_(gone, 0.0)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`; zeros that were final are final again."""
        super().restore(tensors)
        gone = self._gone()
        if gone and all(not bool(self.program.tensor(n)[g].any()) for n, g in gone.items()):
            self._guard()

    def _guard(self) -> None:
        self._faded = True
        self.program.sparse |= set(self._gone())
        self.program.train()  # which lets no gradient reach the zeros

    def _gone(self) -> dict[str, Tensor]:
        return {
            name: ~stays.to(self.program.tensor(name).device)
            for name, stays in self._keep.items()
            if not bool(stays.all())
        }


class FadingGroups(Fading):
    """Indices of groups fade, and are cut from the network in training when they are zero.

    Attributes:
        changes: what was cut.
        change: relative change of the program's outputs by the cut, on its example; None before.
    """

    def __init__(self, keep: Keep, share: float, pace: float) -> None:
        """`keep`: group → indices that stay."""
        super().__init__(share, pace)
        # a tensor may be in two groups: which one fades first is the same however they were found
        self._keep = dict(sorted(keep.items()))
        self.changes: Changes = {}
        self.change: float | None = None

    def begin(self, program: Program, plan: Plan) -> None:
        """Find the groups of the program in training."""
        super().begin(program, plan)
        self._found = groups(program)
        chosen = [self._found.find(name) for name in self._keep]
        for group in chosen:
            if group.frozen is not None:
                raise RecipeError(
                    "features are compared along this group, so it cannot be cut in training",
                    where=group.name,
                    hint="name other nodes, or take features: 0",
                )
        self._fading = [(group, _others(self._keep[group.name], group.size)) for group in chosen]

    def fade(self, factor: float) -> list[float]:
        """One proximal step of the group lasso for every group."""
        return [self._fade(group, gone, factor) for group, gone in self._fading]

    def _fade(self, group: Group, gone: Tensor, factor: float) -> float:
        squares = torch.zeros(group.size, dtype=torch.float64)
        members = [m for m in group.members if self._trains(m.tensor)]
        for member in members:
            tensor = self.program.tensor(member.tensor)
            along = tensor.double().square().movedim(member.dim, -1)
            rows = along.reshape(-1, along.shape[-1]).sum(0).cpu()
            squares += pooled(rows, group.index(member), group.size)
        scales, strength = proximal.lasso(squares.sqrt()[gone], factor)
        every = torch.ones(group.size, dtype=torch.float64)
        every[gone] = scales
        for member in members:
            tensor = self.program.tensor(member.tensor)
            index = group.index(member)
            along = torch.where(index >= 0, every[index.clamp(min=0)], 1.0).to(tensor)
            shape = [1] * tensor.ndim
            shape[member.dim] = -1
            tensor.mul_(along.view(shape))
        return strength

    def _trains(self, name: str) -> bool:
        tensor = self.program.tensor(name)
        return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()

    def cut(self, step: int) -> Changes:
        """Cut what has faded."""
        if step != self.end or not self._keep:
            return {}
        before = _outputs(self.program)
        self.changes = cut_(self.program, self._keep, self._found)
        self.change = _distance(before, _outputs(self.program))
        return self.changes

    def tensors(self) -> Mapping[str, Tensor]:
        """The strengths, and whether the cut is made."""
        made = (
            {} if self.change is None else {"cut": torch.tensor(self.change, dtype=torch.float64)}
        )
        return {**super().tensors(), **made}

    def reshape(self, tensors: Mapping[str, Tensor]) -> Changes:
        """Make the cut again that was made before `tensors` were taken."""
        if "cut" in tensors:
            self.change = float(tensors["cut"])
            self.changes = cut_(self.program, self._keep, self._found)
        return self.changes


def _others(kept: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero()[:, 0]


@torch.no_grad()
def _outputs(program: Program) -> Sequence[Tensor]:
    """What the program gives in eval mode for its example."""
    device = next((tensor.device for _, tensor in program.tensors()), torch.device("cpu"))
    program.eval()
    found = program.run_flat(*(tensor.to(device) for tensor in program.example))
    program.train()
    return [value.double() for value in found if value.is_floating_point()]


def _distance(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    change = sum(float((b - a).square().sum()) for a, b in zip(one, two, strict=True))
    size = sum(float(a.square().sum()) for a in one)
    return math.sqrt(change / size) if size else math.sqrt(change)
