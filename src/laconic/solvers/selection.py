"""Which indices every group keeps: score, allocate, and again on the smaller network if wanted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from laconic.core import registry
from laconic.core.errors import RecipeError
from laconic.program.cost import CostModel
from laconic.program.groups import Groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.allocate import Costs, Of, Scope, allocate, choice
from laconic.solvers.importance.base import Importance, Scene

Keep = dict[str, Tensor]
NARROW = 4  # a block that was not asked for leaves every group at least so many choices


def chosen(found: Groups, sites: Sites) -> list[str]:
    """Names of the groups that may shrink and are selected.

    Raises:
        RecipeError: only frozen groups match, or none at all.
    """
    free = [group.name for group in found]
    matching = [name for name in free if sites.match(name)]
    frozen = [group for group in found.frozen if sites.match(group.name)]
    if free and not matching and frozen:
        raise RecipeError(
            f"sites {list(sites.patterns)} match only groups that cannot shrink",
            where=frozen[0].name,
            hint=str(frozen[0].frozen),
        )
    return matching or sites.choose(free)


@dataclass(frozen=True)
class Wish:
    """What is to be selected.

    Attributes:
        names: the groups that may shrink.
        ratio: part of the cost that is to go, 0 to 1.
        of: the cost: "channels" counts the indices of these groups, "macs" and "parameters" are
            those of the whole program.
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
    scene: Scene, found: Groups, wishes: Sequence[Wish], rounds: int, shrink: Shrink
) -> Keep:
    """Group name → kept indices of the program in `scene`, ascending; groups kept whole left out.

    Args:
        scene: the program and its calibration data; `groups` is filled in here.
        found: groups of that program.
        wishes: what goes from where; no group in two of them.
        rounds: in how many steps; each is scored on what the steps before have left.
        shrink: makes the program (and its groups) that keeps certain indices, compensated.

    Raises:
        BudgetError: a wish that cannot be met.
    """
    sizes = {group.name: group.size for group in found}
    full = {wish.names: _full_cost(scene.program, found, wish) for wish in wishes}
    keep: Keep = {}
    for number in range(1, rounds + 1):
        for wish in wishes:
            goal = 1 - (1 - wish.ratio) ** (number / rounds)
            target = full[wish.names] * (1 - goal)
            keep |= _one_round(scene, found, wish, target, keep, sizes)
        if number < rounds:
            program, found = shrink(keep)
            scene = replace(scene, program=program)
    return {name: kept for name, kept in keep.items() if len(kept) < sizes[name]}


def _full_cost(program: Program, found: Groups, wish: Wish) -> int:
    costs = Costs(CostModel(program, found), wish.of, wish.names)
    return int(costs.of(costs.full)[0])


def _one_round(
    scene: Scene,
    found: Groups,
    wish: Wish,
    target: float,
    keep: Mapping[str, Tensor],
    sizes: Mapping[str, int],
) -> Keep:
    """Indices of the original program that are kept when this wish's cost is at most `target`."""
    chosen = [found.find(name) for name in wish.names]
    costs = Costs(CostModel(scene.program, found), wish.of, wish.names)
    if int(costs.of(costs.full)[0]) <= target:
        return {}
    removals = load(wish.importance).removals(replace(scene, groups=chosen))
    choices = [
        choice(
            group,
            removals.get(group.name),
            block=_block(sizes[group.name], wish),
            floor=max(ceil(sizes[group.name] * (1 - wish.limit) - 1e-9), 1),
        )
        for group in chosen
    ]
    counts = allocate(choices, costs, target, scope=wish.scope)
    made: Keep = {}
    for group in chosen:
        before = keep.get(group.name, torch.arange(sizes[group.name]))
        removal = removals.get(group.name)
        if removal is not None and counts[group.name] < group.size:
            made[group.name] = before[removal.kept(counts[group.name])]
    return made


def _block(size: int, wish: Wish) -> int:
    """The block of a group of that size; a narrow one gets a smaller block if it may."""
    block = wish.block
    while wish.adapt and block > 1 and block * NARROW > size:
        block = ceil(block / 2)
    return block
