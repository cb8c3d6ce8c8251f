"""Cut whole attention heads, and let the rest make up for them.

Idea: a head's rows of query, key and value and its columns of the output projection are one index
of a group, like a channel; so heads are scored, allocated, cut and compensated as `prune.channels`
does it, with only these groups to choose from. With grouped queries the unit is a key/value head
together with all its queries, so that no query is left without a key; with `queries: true` the
number of queries for each key/value head may shrink as well, in all of them alike.

Papers: heads differ widely in worth (Michel et al. 2019, "Are Sixteen Heads Really Better than
One?"; Voita et al. 2019); scores, refit and latency budget as in `prune.channels`.

Helps: encoders of text and images, where a part of the heads does next to nothing; attention is the
part of a transformer whose cost grows with the square of the length. Does not help: networks whose
time is in the feed-forward layers (prune those with `prune.channels`; both may be given one after
the other, or one budget for both: `prune.channels` counts heads among its groups), nor models with
few heads, of which each is then a large part.

Cost: that of `prune.channels`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from laconic.core.errors import RecipeError
from laconic.methods.base import Context, Method, Outcome
from laconic.program.groups import Group, Groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import selection
from laconic.solvers.channels.allocate import Scope
from laconic.solvers.channels.shrinking import Plan, Shrinking
from laconic.solvers.search.stopwatch import Stopwatch, Timer


class PruneHeads(Method):
    """Options of `prune.heads`.

    Attributes:
        ratio: part of the cost that is to go, from 0 to below 1; or glob → part, each for the
            layers it matches (with `of: heads` only).
        count: how many heads go instead: in total, or from every layer with `scope: layer`.
        of: the cost: "heads", "macs" or "parameters" of the whole program, or "ms": milliseconds
            of the whole program, measured in the run's runtime.
        importance: score, as in `prune.channels`.
        scope: "global" takes where it harms least for what it saves, "layer" the same everywhere.
        queries: whether queries of a grouped attention may go without their key and value.
        limit: largest part of one layer's heads that may go; one always stays.
        compensate: refit what is left by least squares against the network before the cut.
        rounds: cut in so many steps, each scored on what the steps before have left.
        samples: calibration samples, unlabelled, at most.
        temperature: the predictions' logits are divided by it before sampling and scoring.
        keep: group → kept indices, in place of everything that chooses them (a replay has it).
    """

    quick: ClassVar[Mapping[str, Any]] = {"ratio": 0.3, "samples": 16}

    ratio: float | dict[str, float] = 0.25
    count: int | None = Field(default=None, ge=0)
    of: Literal["heads", "macs", "parameters", "ms"] = "heads"
    importance: str = "obs"
    scope: Scope = "global"
    queries: bool = False
    limit: float = Field(default=0.9, ge=0, lt=1)
    compensate: bool = True
    rounds: int = Field(default=1, ge=1, le=100)
    samples: int = Field(default=1024, ge=1)
    temperature: float = Field(default=4.0, gt=0)
    keep: dict[str, list[int]] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        selection.check(self.ratio, self.importance)
        if self.of != "heads" and (isinstance(self.ratio, dict) or self.count is not None):
            raise ValueError("a count and ratios by site need of: heads")
        if self.count is not None and "ratio" in self.model_fields_set:
            raise ValueError("count takes the place of ratio: give one of them")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Cut the chosen heads and let the rest make up for them.

        Raises:
            RecipeError: sites match no heads, or a count that a layer does not have.
            BudgetError: the cost cannot fall so far; says how far it can and what is in the way.
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        job = Shrinking(self._plan(), program, context, self.timer(context))
        if self.keep is None:
            names = selection.chosen(job.found, sites, self._is_head)
            if names:
                job.plan = self._plan(self._ratios(job.found, names))
                keep, _ = job.choose(names)
            else:
                job.notes += _why_none(job.found)
                keep = {}
        else:
            keep = {name: torch.tensor(kept) for name, kept in sorted(self.keep.items())}
        made = job.finish(keep)
        resolved = self.model_dump(mode="json", exclude_defaults=True)
        resolved |= {"keep": {name: kept.tolist() for name, kept in keep.items()}}
        return Outcome(
            program=made.program,
            resolved=resolved,
            changes=made.changes,
            notes=made.notes,
            figures=made.figures,
        )

    def timer(self, context: Context) -> Timer:
        """What measures milliseconds: the runtime whose speed counts, in fp32 at batch 1."""
        return Stopwatch(context.runtime, context.threads)

    def _is_head(self, group: Group) -> bool:
        return group.atom.hint == "heads" or self.queries and group.atom.hint == "heads_per_kv"

    def _ratios(self, found: Groups, names: list[str]) -> dict[str, float]:
        """Glob → part that goes; a count as the part half a head below it, free of rounding."""
        if self.count is None:
            return self.ratio if isinstance(self.ratio, dict) else {"*": self.ratio}
        if not self.count:
            return {"*": 0.0}
        sizes = {name: found.find(name).size for name in names}
        pools = sizes if self.scope == "layer" else {"*": sum(sizes.values())}
        for name, size in pools.items():
            if self.count >= size:
                raise RecipeError(
                    f"{self.count} heads are to go, there are {size}",
                    where=name if name in sizes else "all layers",
                    hint="at least one head stays in every layer",
                )
        return {name: (self.count - 0.5) / size for name, size in pools.items()}

    def _plan(self, ratios: dict[str, float] | None = None) -> Plan:
        return Plan(
            ratios=ratios or {},
            of="channels" if self.of == "heads" else self.of,
            importance=self.importance,
            scope=self.scope,
            limit=self.limit,
            compensate=self.compensate,
            rounds=self.rounds,
            samples=self.samples,
            temperature=self.temperature,
        )


def _why_none(found: Groups) -> list[str]:
    """Why there are no heads to cut, in words."""
    frozen = [group for group in found.frozen if group.atom.hint == "heads"]
    if frozen:
        return [f"{group.name}: {group.frozen}" for group in frozen]
    return ["this program has no attention whose heads are an axis of its weights"]
