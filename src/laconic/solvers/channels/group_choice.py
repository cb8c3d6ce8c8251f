"""How many and which indices of groups go, for methods that cut while they train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

import torch

from laconic.core.errors import RecipeError
from laconic.core.progress import Progress
from laconic.core.task import Task
from laconic.program.cost import CostModel
from laconic.program.groups import Groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import channel_block, selection
from laconic.solvers.channels.allocate import Costs, Scope, allocate, choice
from laconic.solvers.channels.selection import NARROW, Keep, Wish
from laconic.solvers.importance.base import Scene
from laconic.solvers.weights.elimination import Removal
from laconic.statistics.batches import Batches, Flat, told_nothing
from laconic.statistics.gradients import sampled_loss

Of = Literal["channels", "macs", "parameters"]
_BATCH = 128  # samples that go through the network side by side
_TEMPERATURE = 4.0  # as of prune.channels


def block_of(wish: int | str, runtime: str, threads: int | None) -> int:
    """The block that was asked for, or the one that a runtime likes on this machine ("auto")."""
    return channel_block.block_for(runtime, threads) if isinstance(wish, str) else wish


@dataclass(kw_only=True)
class Choosing:
    """What goes from where, and by how much.

    Attributes:
        program: whose groups these are.
        found: its groups.
        ratio: part of the cost that is to go.
        of: the cost.
        scope: "global" or "layer".
        block: kept indices are multiples of it.
        adapt: let narrow groups use a smaller block.
        limit: largest part of one group that may go.
        notes: sentences for the outcome.
    """

    program: Program
    found: Groups
    ratio: float
    of: Of
    scope: Scope
    block: int
    adapt: bool
    limit: float
    notes: list[str] = field(default_factory=list[str])

    def names(self, sites: Sites) -> list[str]:
        """The groups that may shrink and are selected.

        Raises:
            RecipeError: sites that match nothing, or only groups that cannot shrink.
        """
        names = selection.chosen(self.found, sites)
        if not names:
            self.notes += [f"{group.name}: {group.frozen}" for group in self.found.frozen]
            self.notes.append("no group of this program can shrink")
        return names

    def by_importance(
        self,
        sites: Sites,
        importance: str,
        task: Task,
        samples: int,
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> Keep:
        """Kept indices by a score of `solvers/importance`; groups kept whole are left out.

        Raises:
            RecipeError: sites that match nothing, or only groups that cannot shrink.
            BudgetError: the ratio cannot be reached.
            DataError: calibration data that are missing or do not fit.
        """
        names = self.names(sites)
        if not names or not self.ratio:
            return {}
        score = selection.load(importance)
        batches: Sequence[Flat] = ()
        if score.needs_data:
            batches = list(Batches(self.program, task, samples=samples, device=device, size=_BATCH))
            self.notes += told_nothing(batches)
        generator = torch.Generator().manual_seed(seed)
        loss = sampled_loss(task, generator, _TEMPERATURE)
        scene = Scene(self.program, (), batches, loss, seed, progress, self.notes)
        wish = Wish(
            tuple(names),
            self.ratio,
            self.of,
            importance,
            self.scope,
            self.block,
            self.adapt,
            self.limit,
        )
        return selection.select(scene, self.found, [wish], 1, _never)

    def full_cost(self, names: Sequence[str]) -> int:
        """The cost as it is."""
        costs = Costs(CostModel(self.program, self.found), self.of, names)
        return int(costs.of(costs.full)[0])

    def by_removals(
        self, removals: Mapping[str, Removal], sizes: Mapping[str, int], target: float
    ) -> Keep:
        """Kept indices for a cost of at most `target`; groups kept whole are left out.

        Args:
            removals: group → order of removal and harm.
            sizes: of the groups before anything was cut, for `limit` and narrow groups.
            target: cost allowed.

        Raises:
            BudgetError: it cannot be reached.
        """
        names = list(removals)
        if self.full_cost(names) <= target:
            return {}
        choices = [
            choice(
                self.found.find(name),
                removals[name],
                block=self._block(sizes[name]),
                floor=min(max(ceil(sizes[name] * (1 - self.limit) - 1e-9), 2), sizes[name]),
            )
            for name in names
        ]
        costs = Costs(CostModel(self.program, self.found), self.of, names)
        counts = allocate(choices, costs, target, scope=self.scope)
        return {
            name: removals[name].kept(count)
            for name, count in counts.items()
            if count < self.found.find(name).size
        }

    def _block(self, size: int) -> int:
        block = self.block
        while self.adapt and block > 1 and block * NARROW > size:
            block = ceil(block / 2)
        return block


def _never(keep: Keep) -> tuple[Program, Groups]:
    raise RecipeError(f"one round needs no second one: {sorted(keep)}")
