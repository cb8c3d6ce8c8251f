"""Learn the rounding of a network's weights region by region, from what the float network gives.

A region's codes, scales and biases are moved by Adam until its output, from the inputs that the
network rounded so far gives it, is that of the same region in the float network (BRECQ, Li et al.,
arXiv 2102.05426). Half of the inputs, at random places, are the float network's, which keeps the
solution from fitting the drift of a few samples (QDrop, Wei et al., arXiv 2203.05740). There are no
labels, and no gradient leaves a region. Both networks are gone through once, side by side.

Where activations stand on grids already, the float network is the one without them, and the steps
of the grids inside a region are learned with its weights (as BRECQ does, with the gradient of LSQ).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, fx

from laconic.program.normalize import base_name
from laconic.program.program import DYNAMIC_QUANTIZE, FAKE_QUANTIZE, FAKES, Program
from laconic.solvers.quantization import ranges, regions, weight_rounding
from laconic.solvers.quantization.regions import Region
from laconic.solvers.quantization.soft_rounding import SoftWeight, Way
from laconic.solvers.quantization.weight_rounding import Rounding
from laconic.solvers.setting import Setting
from laconic.statistics.batches import Batches, told_nothing
from laconic.statistics.convoy import Convoy, affordable
from laconic.statistics.layers import Layer, layers
from laconic.statistics.walk import Order, Walk
from laconic.training.plan import Precision, computes_bf16
from laconic.training.precision import autocast

_ENOUGH = 8
"""Bits from which rounding to nearest is as good."""
_WARM = 0.2
"""Part of the steps before the sigmoid's regulariser sets in."""
_JOINS = {"cat", "concat", "stack"}
"""What meets in one of these shares a grid, so that its steps stay."""


class LearningOptions(BaseModel):
    """How roundings are learned.

    Attributes:
        samples: calibration samples at most.
        batch: samples of a step.
        steps: for each region.
        rate: of Adam at the start, in steps of a grid; biases move at a tenth of it.
        way: "straight": weights move freely and are rounded in each step; "sigmoid": AdaRound.
        reach: how many steps of its grid a weight may move with "straight"; None: any number.
        scales: learn scales as well, also those of activations that stand on grids.
        biases: learn biases as well.
        mix: part of a region's inputs that comes from the float network during the steps.
        decide: weight of the regulariser that makes "sigmoid" decide.
        precision: of the steps: "auto" is bf16 where the processor computes in it.
    """

    samples: int = Field(default=1024, ge=1)
    batch: int = Field(default=64, ge=1)
    steps: int = Field(default=300, ge=1)
    rate: float = Field(default=0.03, gt=0)
    way: Way = "straight"
    reach: float | None = Field(default=None, gt=0)
    scales: bool = True
    biases: bool = True
    mix: float = Field(default=0.5, ge=0, le=1)
    decide: float = Field(default=1.0, gt=0)
    precision: Precision = "auto"

    def settled_precision(self, device: torch.device) -> Precision:
        """What "auto" is on a device."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if computes_bf16(device) else "fp32"


@dataclass(frozen=True)
class Example:
    """One batch of a region: inputs of the rounded and of the float network, and the target."""

    rounded: Mapping[fx.Node, Tensor]
    plain: Tensor
    target: Tensor


class Reconstruction:
    """What settles the weights of one opened program."""

    def __init__(self, work: Rounding, plan: LearningOptions, setting: Setting) -> None:
        self.work, self.plan, self.setting = work, plan, setting
        self.sites = {site.name: site for site in work.sites}
        self.errors: dict[str, list[float]] = {}

    def run(self) -> None:
        """Settle all weights of layers that can be run; the others are noted.

        Raises:
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        found = regions.regions(self.work.program, layers(self.work.program))
        if not self.sites:
            return
        batches = list(self._batches())
        self.work.notes += told_nothing(batches)
        before = _float_activations(self.work.program.clone())
        ahead, behind = Convoy(before, batches), Convoy(self.work.program, batches)
        twin = dict(zip(self.work.program.graph.nodes, before.graph.nodes, strict=True))
        for region in self.setting.progress.track(found, "learning roundings", len(found)):
            learned = self._learned(region)
            if any(self.work.bits[layer.weight] < _ENOUGH for layer in learned):
                self._learn(region, learned, _examples(region, ahead, behind, twin))
            else:
                self._nearest([layer.weight for layer in learned])
        left = [site.name for site in self.work.open_sites()]
        self.work.notes += [f"{name}: rounded to nearest, no region holds it" for name in left]
        self._nearest(left)

    def _batches(self) -> Batches:
        room = affordable(self.work.program, walks=3)
        if room < self.plan.samples:
            self.work.notes.append(f"calibration was held to {room} samples: no more fit")
        samples = min(room, self.plan.samples)
        return weight_rounding.calibration(
            self.work.program, self.setting, samples, self.plan.batch
        )

    def _learned(self, region: Region) -> list[Layer]:
        """Layers whose weights are chosen and theirs alone."""
        return [
            layer for layer in region.layers
            if layer.weight in self.sites and not layer.shared
            and layer.weight not in self.work.grids
        ]  # fmt: skip

    def _nearest(self, names: Sequence[str]) -> None:
        for name in names:
            site, weight = self.sites[name], self.work.program.tensor(name).detach()
            grid = self.work.grid(site, weight)
            self.work.settle(site, ranges.on_grid(weight, site.axis, grid), grid)

    # one region -------------------------------------------------------------------------------

    def _learn(self, region: Region, learned: Sequence[Layer], data: Sequence[Example]) -> None:
        program, plan = self.work.program, self.plan
        soft = {layer.weight: self._soft(layer.weight) for layer in learned}
        shifts = _Shifts(program, learned if plan.biases else [])
        steps = _Steps(program, region, learns=plan.scales)
        groups = [
            {"params": [weight.codes for weight in soft.values()], "lr": plan.rate},
            {"params": [weight.factors for weight in soft.values()],
             "lr": plan.rate if plan.scales else 0.0},
            {"params": list(shifts.moves.values()), "lr": plan.rate / 10},
            {"params": list(steps.factors.values()), "lr": plan.rate},
        ]  # fmt: skip
        fit = _Fit(self, region, soft, [shifts, steps], data)
        first = fit.error()
        fit.descend(torch.optim.Adam([group for group in groups if group["params"]]))
        if not math.isfinite(fit.error()):
            self.work.notes += [
                f"{name}: rounded to nearest, learning it diverged" for name in soft
            ]
            self._nearest(list(soft))
            return
        for name, weight in soft.items():
            self.work.settle(self.sites[name], *weight.settled())
        for moved in (shifts, steps):
            moved.store(program)
        label = ", ".join(soft)
        self.errors[label] = [first, fit.error(settled=True)]

    def _soft(self, name: str) -> SoftWeight:
        site, weight = self.sites[name], self.work.program.tensor(name).detach()
        return SoftWeight(
            weight, site.axis, self.work.grid(site, weight), self.plan.way,
            reach=self.plan.reach, zeros=name in self.work.program.sparse,
        )  # fmt: skip


class _Shifts:
    """Biases on the move, each in units of its layer's weights."""

    def __init__(self, program: Program, learned: Sequence[Layer]) -> None:
        self.moves: dict[str, Tensor] = {}
        self._units: dict[str, float] = {}
        self._start: dict[str, Tensor] = {}
        for layer in learned:
            if layer.bias is None or _readers(program, layer.bias) != 1:
                continue
            rows = layer.matrix(program.tensor(layer.weight).detach())
            held = program.tensor(layer.bias).detach()
            self._units[layer.bias] = float(rows.square().sum(1).mean().sqrt())
            self._start[layer.bias] = held.float()
            self.moves[layer.bias] = torch.zeros_like(held.float()).requires_grad_()

    def values(self) -> dict[str, Tensor]:
        return {n: self._start[n] + self._units[n] * move for n, move in self.moves.items()}

    @torch.no_grad()
    def store(self, program: Program) -> None:
        for name, value in self.values().items():
            program.set_tensor(name, value.to(program.tensor(name)))


class _Steps:
    """Steps of the activations' grids inside of a region, each times a factor that moves."""

    def __init__(self, program: Program, region: Region, *, learns: bool) -> None:
        self.factors: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        for node in region.nodes if learns else ():
            source: Any = node.args[0] if node.target is FAKE_QUANTIZE else None
            joined = any(base_name(user) in _JOINS for user in node.users)
            if source is None or source.op == "get_attr" or joined:
                continue
            side: Any = node.args[1]
            if side.op == "get_attr":
                held = program.tensor(str(side.target)).detach()
                self._start[str(side.target)] = held
                self.factors[str(side.target)] = torch.ones_like(held).requires_grad_()

    def values(self) -> dict[str, Tensor]:
        return {n: self._start[n] * f.clamp(min=0.05) for n, f in self.factors.items()}

    @torch.no_grad()
    def store(self, program: Program) -> None:
        for name, value in self.values().items():
            program.set_tensor(name, value)


class _Fit:
    """The descent of one region."""

    def __init__(
        self, owner: Reconstruction, region: Region, soft: Mapping[str, SoftWeight],
        others: Sequence[_Shifts | _Steps], data: Sequence[Example],
    ) -> None:  # fmt: skip
        self._program, self._plan, self._device = (
            owner.work.program,
            owner.plan,
            owner.setting.device,
        )
        self._order = Order(self._program)
        self._precision = owner.plan.settled_precision(self._device)
        self._region, self._soft, self._others, self._data = region, soft, others, data
        self._generator = torch.Generator().manual_seed(owner.setting.seed)
        spread = torch.stack([one.target.float().var() for one in data]).mean()
        self._spread = float(spread.clamp(min=1e-30))

    def descend(self, optimizer: torch.optim.Adam) -> None:
        """All steps, the rates falling to zero along a cosine."""
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        turn: list[int] = []
        for step in range(self._plan.steps):
            part = step / self._plan.steps
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * part))
            if not turn:
                turn = torch.randperm(len(self._data), generator=self._generator).tolist()
            loss = self._loss(self._data[turn.pop()], part)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            for weight in self._soft.values():
                weight.hold()

    def _loss(self, one: Example, part: float) -> Tensor:
        entered = one.rounded[self._region.source]
        if self._plan.mix > 0:
            chance = torch.rand(entered.shape, generator=self._generator).to(entered.device)
            entered = torch.where(chance < self._plan.mix, one.plain, entered)
        inputs = {**one.rounded, self._region.source: entered}
        loss = self._distance(inputs, self._tensors(), one.target)
        if self._plan.way == "sigmoid" and part >= _WARM:
            left = (1 - part) / (1 - _WARM)
            for weight in self._soft.values():
                loss = loss + self._plan.decide * weight.undecided(2 + 18 * left)
        return loss

    def _tensors(self) -> dict[str, Tensor]:
        """All that moves, as it stands."""
        found = {name: weight.values() for name, weight in self._soft.items()}
        for one in self._others:
            found |= one.values()
        return found

    def _distance(
        self, inputs: Mapping[fx.Node, Tensor], tensors: Mapping[str, Tensor], target: Tensor
    ) -> Tensor:
        with autocast(self._device, self._precision):
            made = regions.run(self._program, self._order, self._region, inputs, tensors)
        return (made.float() - target).square().mean() / self._spread

    @torch.no_grad()
    def error(self, *, settled: bool = False) -> float:
        """Mean squared error relative to the target's spread, as it stands or once settled."""
        tensors = {} if settled else self._tensors()
        found = [self._distance(one.rounded, tensors, one.target) for one in self._data]
        return float(torch.stack(found).mean())


def _examples(
    region: Region, ahead: Convoy, behind: Convoy, twin: Mapping[fx.Node, fx.Node]
) -> list[Example]:
    """What both networks give a region, and what the float one makes of it."""
    entry = next(node for node in region.nodes if region.source in node.all_input_nodes)
    behind.before(entry)
    ahead.before(twin[entry])
    inputs = [
        {region.source: walk.values[region.source], **_sides(region, walk)} for walk in behind
    ]
    plain = [walk.values[twin[region.source]] for walk in ahead]
    ahead.past(twin[region.target])
    targets = [walk.values[twin[region.target]].float() for walk in ahead]
    ahead.forget(twin[region.target])
    return [Example(*parts) for parts in zip(inputs, plain, targets, strict=True)]


def _sides(region: Region, walk: Walk) -> dict[fx.Node, Any]:
    """What a region reads besides; what stands behind its first node is computed on the side."""
    late = [node for node in region.sides if walk.order.place[node] >= walk.next]
    found = walk
    if late:
        found = walk.fork()
        with torch.no_grad():
            found.run(walk.order.place[late[-1]] + 1, hold=region.sides)
    return {node: found.values[node] for node in region.sides}


def _float_activations(program: Program) -> Program:
    """The program with nodes that put activations on grids letting everything through."""
    for node in program.graph.nodes:
        source: Any = node.args[0] if node.target in (DYNAMIC_QUANTIZE, *FAKES) else None
        if source is not None and source.op != "get_attr":
            node.target = _through
    return program


def _through(x: Tensor, *grid: object) -> Tensor:
    del grid
    return x


def _readers(program: Program, name: str) -> int:
    return sum(
        len(node.users) for node in program.graph.nodes
        if node.op == "get_attr" and program.aliases.get(str(node.target), str(node.target)) == name
    )  # fmt: skip
