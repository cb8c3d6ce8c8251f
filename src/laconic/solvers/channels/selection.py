"""Which indices every group keeps: score, allocate, and again on the smaller network if wanted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from laconic.core import registry
from laconic.core.errors import BudgetError, RecipeError
from laconic.core.suggest import nearest
from laconic.program.cost import CostModel
from laconic.program.groups import Group, Groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.program.surgery import cut
from laconic.solvers.channels.allocate import Choice, Costs, Of, Scope, allocate, choice
from laconic.solvers.importance.base import Importance, Scene
from laconic.solvers.search.latency_budget import Goal
from laconic.solvers.weights.elimination import Removal

Keep = dict[str, Tensor]
NARROW = 4  # a block that was not asked for leaves every group at least so many choices


def chosen(
    found: Groups, sites: Sites, wanted: Callable[[Group], bool] = lambda _: True
) -> list[str]:
    """Names of the groups that may shrink, are `wanted`, and are selected.

    Raises:
        RecipeError: only frozen groups match, or none at all.
    """
    free = [group.name for group in found if wanted(group)]
    matching = [name for name in free if sites.match(name)]
    frozen = [group for group in found.frozen if wanted(group) and sites.match(group.name)]
    if free and not matching and frozen:
        raise RecipeError(
            f"sites {list(sites.patterns)} match only groups that cannot shrink",
            where=frozen[0].name,
            hint=str(frozen[0].frozen),
        )
    return matching or sites.choose(free)


def check(ratio: float | Mapping[str, float], importance: str) -> None:
    """Refuse a ratio out of range and a score that does not exist.

    Raises:
        ValueError: names what was found and what may be.
    """
    for part in ratio.values() if isinstance(ratio, Mapping) else [ratio]:
        if not 0 <= part < 1:
            raise ValueError(f"ratio {part} is not from 0 to below 1 (it is the part that goes)")
    known = registry.names("laconic.solvers.importance")
    if importance not in known:
        raise ValueError(f"no score {importance!r}; {nearest(importance, known)}")


def check_block(block: int | str) -> None:
    """Refuse a block that no count is a multiple of.

    Raises:
        ValueError: names what was found.
    """
    if isinstance(block, int) and block < 1:
        raise ValueError(f"block {block} is below 1")


@dataclass(frozen=True)
class Wish:
    """What is to be selected.

    Attributes:
        names: the groups that may shrink.
        ratio: part of the cost that is to go, 0 to 1.
        of: the cost: "channels" counts the indices of these groups, "macs" and "parameters" are
            those of the whole program, "ms" is its measured latency.
        importance: name of a score.
        scope: "global" or "layer".
        block: kept channels are to be a multiple of it.
        adapt: let groups narrower than `NARROW` blocks use a smaller one.
        limit: largest part of one group that may go.
    """

    names: tuple[str, ...]
    ratio: float
    of: Of = "macs"
    importance: str = "obs"
    scope: Scope = "global"
    block: int = 1
    adapt: bool = False
    limit: float = 0.9


Shrink = Callable[[Keep], tuple[Program, Groups]]


def load(name: str) -> Importance:
    """The score `name`.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    found: Any = registry.load("laconic.solvers.importance", name, Importance)
    return found()


def select(
    scene: Scene,
    found: Groups,
    wishes: Sequence[Wish],
    rounds: int,
    shrink: Shrink,
    latency: Goal | None = None,
) -> Keep:
    """Group name → kept indices of the program in `scene`, ascending; groups kept whole left out.

    Args:
        scene: the program and its calibration data; `groups` is filled in here.
        found: groups of that program.
        wishes: what goes from where; no group in two of them.
        rounds: in how many steps; each is scored on what the steps before have left.
        shrink: makes the program (and its groups) that keeps certain indices, compensated.
        latency: what measures; needed by a wish of "ms".

    Raises:
        BudgetError: a wish that cannot be met.
    """
    sizes = {group.name: group.size for group in found}
    full = {wish.names: _costs(scene.program, found, wish) for wish in wishes}
    keep: Keep = {}
    for number in range(1, rounds + 1):
        for wish in wishes:
            part = (1 - wish.ratio) ** (number / rounds)
            last = number == rounds
            step = _Round(scene, found, wish, sizes, part, full[wish.names], latency, last)
            keep |= step.reached(keep)
        if number < rounds:
            program, found = shrink(keep)
            scene = replace(scene, program=program)
    return {name: kept for name, kept in keep.items() if len(kept) < sizes[name]}


def _costs(program: Program, found: Groups, wish: Wish) -> Costs | None:
    """Costs that are counted; None for those that have to be measured."""
    if wish.of == "ms":
        return None
    return Costs(CostModel(program, found), wish.of, wish.names)


@dataclass(frozen=True)
class _Round:
    """One wish in one round.

    Attributes:
        sizes: of the groups of the original program.
        part: of the original cost that may stay.
        full: the original costs, None for latency.
        latency: what measures it.
        last: whether it is the last round. Before it no group falls to a single index, which would
            be the end of it: a convolution of one group has no groups.
    """

    scene: Scene
    found: Groups
    wish: Wish
    sizes: Mapping[str, int]
    part: float
    full: Costs | None
    latency: Goal | None
    last: bool

    def reached(self, before: Mapping[str, Tensor]) -> Keep:
        """The same as `keep`; what cannot be met half-way is left to the last round."""
        try:
            return self.keep(before)
        except BudgetError:
            if self.last:
                raise
            return {}

    def keep(self, before: Mapping[str, Tensor]) -> Keep:
        """Indices of the original program that are kept when this wish's cost is met."""
        chosen = [self.found.find(name) for name in self.wish.names]
        costs = _costs(self.scene.program, self.found, self.wish)
        whole = int(self.full.of(self.full.full)[0]) if self.full else 0
        target = whole * (self.part + 1e-9)  # 0.2 of 400 is 80, not 79.99
        if costs is not None and int(costs.of(costs.full)[0]) <= target:
            return {}
        removals = load(self.wish.importance).removals(replace(self.scene, groups=chosen))
        choices = [self._choice(group, removals.get(group.name)) for group in chosen]
        if costs is not None:
            counts = allocate(choices, costs, target, scope=self.wish.scope)
        else:
            counts = self._measured(choices, removals)
        return {
            name: before.get(name, torch.arange(self.sizes[name]))[kept]
            for name, kept in self._kept(removals, counts).items()
        }

    def _choice(self, group: Group, removal: Removal | None) -> Choice:
        size = self.sizes[group.name]
        floor = max(ceil(size * (1 - self.wish.limit) - 1e-9), 1 if self.last else 2)
        return choice(group, removal, block=_block(size, self.wish), floor=floor)

    def _kept(self, removals: Mapping[str, Removal], counts: Mapping[str, int]) -> Keep:
        """Indices of this round's program."""
        return {
            name: removals[name].kept(counts[name])
            for name in self.wish.names
            if name in removals and counts[name] < self.found.find(name).size
        }

    def _measured(
        self, choices: Sequence[Choice], removals: Mapping[str, Removal]
    ) -> dict[str, int]:
        if self.latency is None:
            raise BudgetError("latency is measured, but nothing was given that measures it")

        def cutter(counts: Mapping[str, int]) -> Program:
            kept = self._kept(removals, counts)
            return cut(self.scene.program, kept, self.found)[0] if kept else self.scene.program

        return self.latency.sizes(
            self.found,
            choices,
            self.part,
            cutter,
            scope=self.wish.scope,
            progress=self.scene.progress,
        )


def _block(size: int, wish: Wish) -> int:
    """The block of a group of that size; a narrow one gets a smaller block if it may."""
    block = wish.block
    while wish.adapt and block > 1 and block * NARROW > size:
        block = ceil(block / 2)
    return block
