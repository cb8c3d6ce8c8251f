"""Structured pruning: cut whole channels, heads and hidden units, and let the rest make up for it.

Idea: axes of several tensors that must shrink together are one group. A score says what each index
of a group is worth, an allocation says how many every group keeps so that multiply-adds,
parameters, channels or measured milliseconds fall by `ratio`, surgery cuts the graph, and what is
left is refitted by least squares against the network before the cut, front to back, batch norms
included. No labels, no training.

Papers: groups as in DepGraph (Fang et al. 2023); scores l1 (Li et al. 2017), taylor (Molchanov et
al. 2019), fisher (Theis et al. 2018), obs (Hassibi & Stork 1993, ZipLM 2023); refit (He et al.
2017, Hubara et al. 2021); a latency table and a knapsack as in HALP (Shen et al. 2022).

`of: ms` fills a table of every layer's time at multiples of the block, in the run's runtime (fp32,
batch 1), solves for the milliseconds, and corrects by timing the cut networks: the reduction is the
measured one on this machine, give or take its noise. A replay by `keep` measures nothing.

Helps: convolutional networks and the feed-forward part and heads of transformers, wherever layers
have more width than they need; it is the one kind of pruning every runtime turns into speed.
Does not help: networks bound by the number of operators rather than their width (small ones at
batch 1); grouped and depthwise convolutions keep their weights and are only recalibrated. Data
matter: a network is oversure on images it was trained on, so give augmented or unseen ones as
`calibration`, and raise `temperature` if its predictions are still near 0 and 1.

Cost: obs with refit takes about one forward and backward pass over `samples` and one matrix product
per layer: about two minutes for a ResNet-56 and 1,024 images on one core. l1 and l2 without refit
need no data and take seconds for any network. `of: ms` exports and times about ten small programs
for every distinct shape of layer, a second each (with Inductor, which compiles them, far more).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from laconic.methods.base import Context, Method, Outcome
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import selection
from laconic.solvers.channels.allocate import Of, Scope
from laconic.solvers.channels.shrinking import Against, Plan, Shrinking
from laconic.solvers.search.stopwatch import Stopwatch, Timer


class PruneChannels(Method):
    """Options of `prune.channels`.

    Attributes:
        ratio: part of the cost that is to go, from 0 to below 1; or glob → part, each for the
            groups it matches (with `of: channels` only).
        of: the cost: "macs" or "parameters" of the whole program, "channels" of the selected
            groups, or "ms": milliseconds of the whole program, measured in the run's runtime.
        against: what `ratio` is a part of: the cost of the program that the step is given
            ("input"), or of the run's original ("original"), so that what earlier steps have saved
            counts: one budget for dropped layers, heads and widths together.
        importance: score: obs, fisher, taylor, l1, l2, entropy, apoz, bn_scale, geometric_median,
            or random (the control).
        scope: "global" takes where it harms least for what it saves, "layer" takes the same part
            of every group.
        block: kept channels are multiples of it; "auto" measures which one the runtime likes, and
            lets narrow groups use a smaller one.
        limit: largest part of one group that may go.
        compensate: refit what is left by least squares against the network before the cut.
        refit: "all" layers behind a cut, or only the "consumers" of what was cut.
        recalibrate: measure batch norms anew that no refit rewrote.
        rounds: cut in so many steps, each scored on what the steps before have left.
        samples: calibration samples, unlabelled, at most.
        temperature: the predictions' logits are divided by it before sampling and scoring.
        keep: group → kept indices, in place of everything that chooses them (a replay has it).
    """

    quick: ClassVar[Mapping[str, Any]] = {"ratio": 0.3, "block": 1, "samples": 16}

    ratio: float | dict[str, float] = 0.5
    of: Of = "macs"
    against: Against = "input"
    importance: str = "obs"
    scope: Scope = "global"
    block: Literal["auto"] | int = "auto"
    limit: float = Field(default=0.9, ge=0, lt=1)
    compensate: bool = True
    refit: Literal["all", "consumers"] = "all"
    recalibrate: bool = True
    rounds: int = Field(default=1, ge=1, le=100)
    samples: int = Field(default=1024, ge=1)
    temperature: float = Field(default=4.0, gt=0)
    keep: dict[str, list[int]] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        selection.check(self.ratio, self.importance)
        if isinstance(self.ratio, dict) and self.of != "channels":
            raise ValueError("ratios by site need of: channels")
        if self.against == "original" and self.of == "channels":
            raise ValueError("against: original needs of: macs, parameters or ms")
        selection.check_block(self.block)
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Cut the chosen groups and let the rest make up for it.

        Raises:
            RecipeError: sites match nothing, or only groups that cannot shrink.
            BudgetError: the ratio cannot be reached; says how far it can go and what is in the way.
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        job = Shrinking(self._plan(), program, context, self.timer(context))
        if self.keep is None:
            keep, block = job.choose(selection.chosen(job.found, sites))
        else:
            keep = {name: torch.tensor(kept) for name, kept in sorted(self.keep.items())}
            block = self.block
        made = job.finish(keep)
        resolved = self.model_dump(mode="json", exclude_defaults=True)
        resolved |= {"keep": {name: kept.tolist() for name, kept in keep.items()}, "block": block}
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

    def _plan(self) -> Plan:
        return Plan(
            ratios=self.ratio if isinstance(self.ratio, dict) else {"*": self.ratio},
            of=self.of,
            against=self.against,
            importance=self.importance,
            scope=self.scope,
            block=self.block,
            limit=self.limit,
            compensate=self.compensate,
            refit=self.refit,
            recalibrate=self.recalibrate,
            rounds=self.rounds,
            samples=self.samples,
            temperature=self.temperature,
        )
