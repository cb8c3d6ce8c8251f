"""Choices of width and depth as probabilities that training moves, with an exact expected cost.

Every knob has a logit for each choice. In a step one choice is drawn by Gumbel noise; forward it is
taken whole, backward its gradient is that of the softmax (Jang et al. 2017, arXiv 1611.01144; Wu et
al. 2019, "FBNet", 1812.03443). A width masks the columns that read a group's indices, which is
what cutting them computes; a depth gates the ends of branches. Multiply-adds are a polynomial in
the sizes in which no knob stands twice in a product, so the expectation is the polynomial of the
expected sizes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.program import axes
from laconic.program.axes import Atom
from laconic.program.cost import depends_on_batch
from laconic.program.groups import Group
from laconic.program.groups import Member as Carrier
from laconic.program.program import Program
from laconic.solvers.search.elastic import Elastic, Order
from laconic.solvers.search.sandwich import StandIn, tensor_names
from laconic.solvers.search.search_space import Knob, Member, Space
from laconic.solvers.search.strategies import Excess
from laconic.training.attendant import Attendant
from laconic.training.feed import mixed
from laconic.training.job import Forward, Loss, Objective
from laconic.training.plan import Plan

_STREAM = 11  # of random numbers, apart from those of the loop
_SGD_SCALE = 3.0  # logits over what the optimizer moves: they need longer steps than weights
_ADAM_STEP = 0.05  # of a logit in one step
Probabilities = Mapping[str, Tensor]


class Relaxation(Attendant):
    """Trains a Program's weights and the logits of its knobs together.

    Attributes:
        logits: knob → name of the tensor that stands for its logits.
        expected: (step, part of the multiply-adds) now and then.
    """

    def __init__(
        self,
        elastic: Elastic,
        space: Space,
        order: Order,
        student: Program,
        *,
        target: float,
        strength: float,
        temperature: tuple[float, float],
        seed: int,
    ) -> None:
        """Add the logits to `student`, a Program with the tensors of `elastic`'s.

        Args:
            elastic: the whole network.
            space: knobs of width and depth.
            order: which indices are the good ones.
            student: is trained; its graph stays as it is.
            target: part of the multiply-adds that is wanted.
            strength: of the penalty at the end; it grows from nothing.
            temperature: of the softmax at the beginning and at the end.
            seed: of the noise.
        """
        self._elastic, self._space, self._student = elastic, space, student
        self._target, self._strength, self._seed = target, strength, seed
        self._temperature = temperature
        self._steps, self._each, self._scale = 1, 1, 1.0
        self.expected: list[tuple[int, float]] = []
        self.logits = {
            knob.name: student.add_tensor(
                f"nas_logits.{place}", nn.Parameter(torch.zeros(len(knob.choices)))
            )
            for place, knob in enumerate(space.knobs)
        }
        self._ranks = {
            knob.name: torch.tensor(_ranks(order.get(knob.name), knob.choices[0]))
            for knob in space.knobs
        }
        self._bill = _Bill(elastic, space, order)
        whole = {knob.name: torch.eye(len(knob.choices))[0] for knob in space.knobs}
        self._whole = float(self._bill(whole))
        self._masked: StandIn | None = None
        self._drawn: Probabilities = {}

    def begin(self, program: Program, plan: Plan) -> None:
        """The length decides when the temperature falls; the optimizer, how far logits move."""
        self._steps, self._each = plan.steps or 1, plan.accumulate or 1
        adam = plan.optimizer == "adamw"
        self._scale = _ADAM_STEP / (plan.lr or 1.0) if adam else _SGD_SCALE
        self.expected.clear()  # of trial steps
        del program

    def tensors(self) -> Mapping[str, Tensor]:
        """What was expected so far."""
        return {"expected": torch.tensor(self.expected, dtype=torch.float64).reshape(-1, 2)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        self.expected = [(int(step), part) for step, part in tensors["expected"].tolist()]

    def around(self, objective: Objective) -> Objective:
        """The objective of the network that is drawn, and the penalty on what all would cost."""

        def relaxed(forward: Forward, batch: Any, number: int) -> Loss:
            if number < 0:
                return objective(forward, batch, number)
            self._draw(number)
            loss = objective(self._forward(), batch, number)
            part = self._bill(self._probabilities(torch.softmax)) / self._whole
            if number % max(self._steps * self._each // 10, 1) == 0:
                self.expected.append((number // self._each, float(part.detach())))
            over = (part / self._target).clamp(min=1.0).log()
            return Loss(loss.value + self._strength * self._done(number) * over, loss.samples)

        return relaxed

    def best(self, excess: Excess) -> Member:
        """The likeliest member within a budget: the least likelihood is given up, all room used."""
        held = self._probabilities(torch.log_softmax)
        logs = [held[knob.name].detach().tolist() for knob in self._space.knobs]
        genes = [max(range(len(row)), key=row.__getitem__) for row in logs]
        while excess(self._space.member(genes)) > 0:
            falls = [
                (row[gene] - row[gene + 1], place)
                for place, (row, gene) in enumerate(zip(logs, genes, strict=True))
                if gene + 1 < len(row)
            ]
            genes[min(falls)[1]] += 1
        rises = sorted(
            (row[gene] - row[gene - 1], place)
            for place, (row, gene) in enumerate(zip(logs, genes, strict=True))
            if gene
        )
        for _, place in rises:
            genes[place] -= 1
            if excess(self._space.member(genes)) > 0:
                genes[place] += 1
        return self._space.member(genes)

    def remove(self) -> None:
        """Take the logits out of the Program again."""
        self._student.drop_unused()

    # one step -----------------------------------------------------------------------------

    def _done(self, number: int) -> float:
        return min(number / (self._steps * self._each), 1.0)

    def _probabilities(self, of: Callable[..., Tensor]) -> dict[str, Tensor]:
        return {
            knob: of(self._scale * self._student.tensor(name), 0)
            for knob, name in self.logits.items()
        }

    def _draw(self, number: int) -> None:
        """One choice of every knob, one-hot forward and soft backward."""
        generator = torch.Generator().manual_seed(mixed(self._seed, number, _STREAM))
        hot, cold = self._temperature
        temperature = hot * (cold / hot) ** self._done(number)
        drawn: dict[str, Tensor] = {}
        for knob, name in self.logits.items():
            logits = self._scale * self._student.tensor(name)
            uniform = torch.rand(len(logits), generator=generator).clamp(1e-9, 1 - 1e-9)
            noise = -(-uniform.log()).log()
            soft = torch.softmax((logits + noise.to(logits.device)) / temperature, 0)
            hard = torch.zeros_like(soft).scatter(0, soft.argmax(0, keepdim=True), 1.0)
            drawn[knob] = hard + soft - soft.detach()
        self._drawn = drawn

    def _forward(self) -> Forward:
        """The network with masks; its graph is made once."""
        if self._masked is None:
            made = _gated(self._elastic, self._space, self._student)
            self._masked = StandIn(made.recompile(), self._tensor_views(made))
        return self._masked

    def _tensor_views(self, masked: Program) -> dict[str, Callable[[], Tensor | None]]:
        views: dict[str, Callable[[], Tensor | None]] = {}
        masks: dict[str, list[tuple[Group, Carrier, Knob]]] = {}
        for knob in self._space.knobs:
            if knob.kind == "width":
                group = self._elastic.groups.find(knob.site)
                for member in _masked_members(group):
                    masks.setdefault(member.tensor, []).append((group, member, knob))
        gates = _gates(self._elastic, self._space)
        for name in tensor_names(masked):
            own = masked.aliases.get(name, name)
            if own in gates:
                views[name] = partial(self._gate, *gates[own])
            else:
                views[name] = partial(self._masked_tensor, own, masks.get(own, []))
        return views

    def _masked_tensor(self, name: str, masks: Sequence[tuple[Group, Carrier, Knob]]) -> Tensor:
        tensor = self._student.tensor(name)
        for group, member, knob in masks:
            index = group.index(member).to(tensor.device)
            mask = torch.cat([self._kept(knob), tensor.new_ones(1)])[index]  # -1: the last
            tensor = tensor * mask.reshape(-1, *[1] * (tensor.ndim - 1 - member.dim))
        return tensor

    def _gate(self, knob: Knob, place: int) -> Tensor:
        return self._kept(knob)[place]

    def _kept(self, knob: Knob) -> Tensor:
        """Of each index whether it is there: float `[size]`."""
        drawn = self._drawn[knob.name]
        there = torch.tensor(knob.choices)[:, None] > self._ranks[knob.name][None]
        return (drawn[:, None] * there.to(drawn)).sum(0)


def _ranks(order: Sequence[int] | None, size: int) -> list[int]:
    """Place of every index in its order."""
    found = list(range(size))
    for rank, index in enumerate(order or range(size)):
        found[index] = rank
    return found


def _masked_members(group: Group) -> Sequence[Carrier]:
    """Where a zero takes an index out: in what reads it, else in all that writes it."""
    return group.by_role("consumer") or [m for m in group.members if m.role != "consumer"]


def _gates(elastic: Elastic, space: Space) -> dict[str, tuple[Knob, int]]:
    """Names of the gates in the graph → knob and place of the branch in its stage."""
    knobs = {knob.site: knob for knob in space.knobs if knob.kind == "depth"}
    return {
        f"nas_gates.{number}.{place}": (knobs[stage.name], place)
        for number, stage in enumerate(elastic.stages)
        if stage.name in knobs
        for place in range(len(stage.branches))
    }


def _gated(elastic: Elastic, space: Space, student: Program) -> Program:
    """The student's graph with a gate behind every branch that may go."""
    made = elastic.program.clone().to(next(t.device for _, t in student.tensors()))
    there = {node.name: node for node in made.graph.nodes}
    varying = {knob.site for knob in space.knobs if knob.kind == "depth"}
    for number, stage in enumerate(elastic.stages):
        for place, branch in enumerate(stage.branches if stage.name in varying else ()):
            total, end = there[branch.total.name], there[branch.end.name]
            with made.graph.inserting_before(total):
                name = made.add_tensor(f"nas_gates.{number}.{place}", torch.ones(()))
                gate = made.graph.get_attr(name)
                scaled = made.graph.call_function(torch.ops.aten.mul.Tensor, (end, gate))
            total.update_arg(1 - branch.place, scaled)
    made.dropout = student.dropout
    return made.train()


class _Bill:
    """Expected multiply-adds per sample, with gradients."""

    def __init__(self, elastic: Elastic, space: Space, order: Order) -> None:
        self._atoms = {group.name: group.atom for group in elastic.groups}
        self._knobs = space.knobs
        batch, batched = elastic.program.batch_size(), depends_on_batch(elastic.program)
        branches = _branch_of(elastic, space, order)
        self._lines = [
            (terms, batch if node in batched else 1, branches.get(node))
            for node, monomials in elastic.groups.equations.multiply_adds.items()
            for terms in monomials
        ]

    def __call__(self, held: Probabilities) -> Tensor:
        sizes: dict[Atom, Any] = {}
        for knob in self._knobs:
            if knob.kind == "width":
                counts = held[knob.name].new_tensor(knob.choices)
                sizes[self._atoms[knob.site]] = (held[knob.name] * counts).sum()
        total: Any = next(iter(held.values())).new_zeros(())
        for terms, by, branch in self._lines:
            count: Any = math.prod((axes.new_size(term, sizes) for term in terms), start=1.0) / by
            if branch is not None:
                knob, rank = branch
                there = torch.tensor([choice > rank for choice in knob.choices])
                count = count * held[knob.name][there.to(held[knob.name].device)].sum()
            total = total + count
        return total


def _branch_of(elastic: Elastic, space: Space, order: Order) -> dict[fx.Node, tuple[Knob, int]]:
    """Operators in branches → the knob of their stage and the rank of the branch."""
    knobs = {knob.site: knob for knob in space.knobs if knob.kind == "depth"}
    found: dict[fx.Node, tuple[Knob, int]] = {}
    for stage in elastic.stages:
        if stage.name in knobs:
            ranks = _ranks(order.get(f"depth:{stage.name}"), len(stage.branches))
            for rank, branch in zip(ranks, stage.branches, strict=True):
                found |= dict.fromkeys(branch.inner, (knobs[stage.name], rank))
    return found
