"""Training a network together with its sub-networks, which share its weights.

Every step trains the largest or the smallest network, in turn, and a few random ones on the same
objective and the same batch. Or (the sandwich rule with in-place distillation) the largest on the
objective, and the smallest and a few random ones on what the largest gives.
Sub-networks are cut graphs that compute what they have to and no more; their tensors are slices of
the shared ones, so that gradients come together there. They normalise by the batch and leave the
running statistics alone, which stay those of the largest.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.solvers.search.elastic import Cut, Elastic
from laconic.solvers.search.search_space import KINDS, Member, Space
from laconic.training.attendant import Attendant
from laconic.training.distillation import Distillation
from laconic.training.feed import mixed
from laconic.training.job import Forward, Loss, Objective
from laconic.training.plan import Plan
from laconic.training.teacher import Teacher

_HELD = 8  # cut graphs that are kept
_STREAM = 7  # of random numbers, apart from those of the loop
_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)


class StandIn:
    """A graph that runs on other tensors than those it was made with."""

    def __init__(
        self,
        run: Callable[..., tuple[Tensor, ...]],
        views: Mapping[str, Callable[[], Tensor | None]],
    ) -> None:
        """`run`: a Program's function; `views`: of every name in its graph the value, when run."""
        self._run, self._views = run, views

    def __call__(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Flat outputs; gradients reach what the views are made of."""
        place = SimpleNamespace()
        for name, view in self._views.items():
            *path, leaf = name.split(".")
            at = place
            for part in path:
                if not hasattr(at, part):
                    setattr(at, part, SimpleNamespace())
                at = getattr(at, part)
            setattr(at, leaf, view())
        return self._run(place, *flat)


class Slice(StandIn):
    """A sub-network that runs on slices of another Program's tensors."""

    def __init__(self, cut: Cut, shared: Program) -> None:
        """`cut`: of a Program with the same tensors as `shared`, whose values are used."""
        held = dict(shared.tensors())
        made = cut.program.to(next((t.device for t in held.values()), torch.device("cpu")))
        made.dropout = shared.dropout
        made.train()
        views: dict[str, Callable[[], Tensor | None]] = {}
        for name in tensor_names(made):
            own = made.aliases.get(name, name)
            # what the cut wrote out itself is a constant
            views[name] = _view(cut, shared, own) if own in held else partial(made.tensor, own)
        for name in _statistics(made):
            views[name] = _nothing
        super().__init__(made.recompile(), views)


def tensor_names(program: Program) -> set[str]:
    """Names of the stored tensors as the graph has them."""
    return {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}


def _nothing() -> None:
    """Batch statistics need no running ones."""


def _view(cut: Cut, shared: Program, name: str) -> Callable[[], Tensor]:
    kept = [(dim, *_run_of(places)) for dim, places in cut.changes.get(name, {}).items()]
    side = cut.crops.get(name)

    def view() -> Tensor:
        tensor = shared.tensor(name)
        for dim, length, places in kept:
            if places is None:
                tensor = tensor.narrow(dim, 0, length)
            else:
                tensor = tensor.index_select(dim, places.to(tensor.device))
        if side is not None:
            lost = (tensor.shape[-1] - side) // 2
            for dim in range(2, tensor.ndim):
                tensor = tensor.narrow(dim, lost, side)
        return tensor

    return view


def _run_of(places: Tensor) -> tuple[int, Tensor | None]:
    """How many positions there are, and which ones unless they are the leading ones."""
    leading = torch.equal(places, torch.arange(len(places)))
    return len(places), None if leading else places


def _statistics(program: Program) -> set[str]:
    """Running statistics, which training-mode norms move."""
    held: list[Any] = [
        argument
        for node in program.graph.nodes
        if node.target in _NORMS
        for argument in node.args[3:5]
    ]
    return {str(node.target) for node in held if node is not None}


class Sandwich(Attendant):
    """Adds the losses of sub-networks to a run's objective."""

    def __init__(
        self,
        elastic: Elastic,
        space: Space,
        *,
        members: int,
        shrink: float,
        seed: int,
        inplace: bool = False,
    ) -> None:
        """Prepare.

        Args:
            elastic: of the Program that is trained, as it is before.
            space: its sub-networks, which keep leading indices.
            members: random ones in each step, besides the largest or the smallest.
            shrink: share of the steps in which the space opens.
            seed: of what is drawn.
            inplace: the largest teaches the others, in every step.
        """
        self._elastic, self._space = elastic, space
        self._members, self._shrink, self._seed = members, shrink, seed
        self._inplace = inplace
        self._steps, self._each = 0, 1
        self._cuts: OrderedDict[tuple[tuple[str, int], ...], Slice] = OrderedDict()
        self._student: Program | None = None

    def begin(self, program: Program, plan: Plan) -> None:
        """The run's length decides when the space opens."""
        del program
        self._steps, self._each = plan.steps or 1, plan.accumulate or 1

    def judged(self, step: int) -> bool:
        """States count once every choice has been trained."""
        return step >= self._shrink * self._steps

    def around(self, objective: Objective) -> Objective:
        """The objective with the sub-networks' part; theirs is a `Distillation`."""
        assert isinstance(objective, Distillation)
        self._student = objective.student
        learning = self._in_place if self._inplace else self._in_turn

        def together(forward: Forward, batch: Any, number: int) -> Loss:
            if number < 0:  # validation looks at the largest only
                return objective(forward, batch, number)
            return learning(objective, forward, batch, number)

        return together

    def _in_turn(self, objective: Distillation, forward: Forward, batch: Any, number: int) -> Loss:
        """The largest or the smallest, and others, on one objective."""
        # every process of a step runs the same end: gradients of the other one are none
        largest = (number // self._each) % 2 == 0
        once = replace(objective, teacher=_Once(objective.teacher))
        small = replace(once, features=0.0, seen=None)
        members = self.drawn(number, least=not largest)
        losses = [once(forward, batch, number)] if largest or not members else []
        losses += [small(self._slice(member), batch, number) for member in members]
        return Loss(torch.stack([loss.value for loss in losses]).sum(), losses[0].samples)

    def _in_place(self, objective: Distillation, forward: Forward, batch: Any, number: int) -> Loss:
        """The largest on the objective, others on what it gives."""
        given: list[Sequence[Tensor]] = []

        def watched(*flat: Tensor) -> tuple[Tensor, ...]:
            out = forward(*flat)
            given.append([tensor.detach() for tensor in out])
            return out

        loss = objective(watched, batch, number)
        taught = [t.float() if t.is_floating_point() else t for t in given[0]]
        small = _learning_from(objective, taught)
        value = loss.value
        for member in self.drawn(number):
            value = value + small(self._slice(member), batch, number).value
        return Loss(value, loss.samples)

    def drawn(self, number: int, *, least: bool = True) -> list[Member]:
        """The sub-networks of a batch, without the largest and each once."""
        space = self._space.opened(opened(self._space, self._part(number)))
        generator = torch.Generator().manual_seed(mixed(self._seed, number, _STREAM))
        found = [space.random(generator) for _ in range(self._members)]
        found = [space.least(), *found] if least else found
        unique = {space.genes(member): member for member in found}
        unique.pop(space.genes(space.full()), None)
        return list(unique.values())

    def _part(self, number: int) -> float:
        """How much of the opening is over; all of it while nobody knows how long the run is."""
        if not self._steps or not self._shrink:
            return 1.0
        return min(number // self._each / (self._shrink * self._steps), 1.0)

    def _slice(self, member: Member) -> Slice:
        assert self._student is not None
        key = tuple(member.items())
        if key not in self._cuts:
            cut = self._elastic.cut(member, checked=False)
            self._cuts[key] = Slice(cut, self._student)
        self._cuts.move_to_end(key)
        while len(self._cuts) > _HELD:
            self._cuts.popitem(last=False)
        return self._cuts[key]


def opened(space: Space, part: float) -> Mapping[str, float]:
    """How far each kind of knob is open when `part` of the opening is over.

    Kernels open first, then depth, width and bits, each for an equal time and one choice after the
    other; the resolution is open from the beginning.
    """
    there = [kind for kind in KINDS[1:] if any(knob.kind == kind for knob in space.knobs)]
    found = {"resolution": 1.0}
    for place, kind in enumerate(there):
        found[kind] = min(max(part * len(there) - place, 0.0), 1.0)
    return found


class _Once:
    """A teacher that is asked once about a batch."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._told: list[Tensor] | None = None

    def __call__(self, flat: Sequence[Tensor], number: int) -> list[Tensor]:
        """Outputs, then tapped values; the same whenever asked again."""
        if self._told is None:
            self._told = self._teacher(flat, number)
        return self._told


def _learning_from(objective: Distillation, taught: Sequence[Tensor]) -> Distillation:
    """The loss against given outputs alone."""

    def teacher(flat: Sequence[Tensor], number: int) -> list[Tensor]:
        del flat, number
        return list(taught[: objective.outputs])

    return replace(objective.held_out(), teacher=teacher, voices=())
