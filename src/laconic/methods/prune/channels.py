"""Structured pruning: cut whole channels, heads and hidden units, and let the rest make up for it.

Idea: axes of several tensors that must shrink together are one group. A score says what each index
of a group is worth, an allocation says how many every group keeps so that multiply-adds, parameters
or channels fall by `ratio`, surgery cuts the graph, and what is left is refitted by least squares
against the network before the cut, front to back, batch norms included. No labels, no training.

Papers: groups as in DepGraph (Fang et al. 2023); scores l1 (Li et al. 2017), taylor (Molchanov et
al. 2019), fisher (Theis et al. 2018), obs (Hassibi & Stork 1993, ZipLM 2023); refit (He et al.
2017, Hubara et al. 2021).

Helps: convolutional networks and the feed-forward part and heads of transformers, wherever layers
have more width than they need; it is the one kind of pruning every runtime turns into speed.
Does not help: networks bound by the number of operators rather than their width (small ones at
batch 1); grouped and depthwise convolutions keep their weights and are only recalibrated. Data
matter: a network is oversure on images it was trained on, so give augmented or unseen ones as
`calibration`, and raise `temperature` if its predictions are still near 0 and 1.

Cost: obs with refit takes about one forward and backward pass over `samples` and one matrix product
per layer: about two minutes for a ResNet-56 and 1,024 images on one core. l1 and l2 without refit
need no data and take seconds for any network.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from laconic.core import registry
from laconic.core.suggest import nearest
from laconic.methods.base import Context, Method, Outcome
from laconic.program.cost import CostModel
from laconic.program.groups import Groups, groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.program.surgery import Changes, cut
from laconic.solvers import channel_block, selection
from laconic.solvers.allocate import Of, Scope
from laconic.solvers.compensate import Report, compensate
from laconic.solvers.importance.base import Scene
from laconic.solvers.recalibrate import norms
from laconic.solvers.selection import Keep, Wish
from laconic.statistics.batches import Batches, Flat
from laconic.statistics.convoy import affordable
from laconic.statistics.gradients import sampled_loss

_BATCH = 128  # samples that go through the network side by side


class PruneChannels(Method):
    """Options of `prune.channels`.

    Attributes:
        ratio: part of the cost that is to go, from 0 to below 1; or glob → part, each for the
            groups it matches (with `of: channels` only).
        of: the cost: multiply-adds or parameters of the whole program, or channels of the
            selected groups.
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
        ratios = self.ratio.values() if isinstance(self.ratio, dict) else [self.ratio]
        for ratio in ratios:
            if not 0 <= ratio < 1:
                raise ValueError(
                    f"ratio {ratio} is not from 0 to below 1 (it is the part that goes)"
                )
        if isinstance(self.ratio, dict) and self.of != "channels":
            raise ValueError("ratios by site need of: channels")
        if isinstance(self.block, int) and self.block < 1:
            raise ValueError(f"block {self.block} is below 1")
        known = registry.names("laconic.solvers.importance")
        if self.importance not in known:
            raise ValueError(f"no score {self.importance!r}; {nearest(self.importance, known)}")
        return self

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Cut the chosen groups and let the rest make up for it.

        Raises:
            RecipeError: sites match nothing, or only groups that cannot shrink.
            BudgetError: the ratio cannot be reached; says how far it can go and what is in the way.
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        dense = _ready(program, context.device)
        found = groups(dense)
        job = _Job(self, dense, found, context)
        if self.keep is None:
            keep, block = job.choose(sites)
        else:
            keep = {name: torch.tensor(kept) for name, kept in sorted(self.keep.items())}
            block = self.block
        return job.finish(program, keep, block)


class _Job:
    """One application: the dense program on its device, its groups, its data."""

    def __init__(
        self, method: PruneChannels, dense: Program, found: Groups, context: Context
    ) -> None:
        self.method, self.dense, self.found, self.context = method, dense, found, context
        self.notes: list[str] = []
        self._batches: list[Flat] | None = None

    def choose(self, sites: Sites) -> tuple[Keep, int | str]:
        """Score and allocate; the kept indices and the block that was used."""
        names = selection.chosen(self.found, sites)
        method = self.method
        if not names:
            self.notes += [f"{group.name}: {group.frozen}" for group in self.found.frozen]
            self.notes.append("no group of this program can shrink")
            return {}, method.block
        ratios = method.ratio if isinstance(method.ratio, dict) else {"*": method.ratio}
        if not any(ratios.values()):
            self.notes.append("ratio is 0: nothing is cut")
            return {}, method.block
        wishes = self._wishes(names, ratios)
        score = selection.load(method.importance)
        scene = Scene(
            self.dense,
            (),
            self.batches() if score.needs_data else (),
            sampled_loss(self.context.task, self.context.generator(), method.temperature),
            self.context.seed,
            self.context.progress,
            self.notes,
        )
        keep = selection.select(scene, self.found, wishes, method.rounds, self._shrink)
        return keep, wishes[0].block

    def _wishes(self, names: Sequence[str], ratios: Mapping[str, float]) -> list[Wish]:
        """One wish for all, or one for every pattern of `ratio`."""
        method, context = self.method, self.context
        block = method.block
        adapt = block == "auto"
        if isinstance(block, str):
            block = channel_block.block_for(context.runtime, context.threads)
        wishes: list[Wish] = []
        left = list(names)
        for pattern, ratio in ratios.items():
            chosen = Sites.of(pattern).choose(left)
            left = [name for name in left if name not in chosen]
            wishes.append(
                Wish(
                    tuple(chosen),
                    ratio,
                    method.of,
                    method.importance,
                    method.scope,
                    block,
                    adapt,
                    method.limit,
                )
            )
        return wishes

    def _shrink(self, keep: Keep) -> tuple[Program, Groups]:
        small = self._cut(keep)[0]
        return small, groups(small)

    def _cut(self, keep: Keep) -> tuple[Program, Changes, Report]:
        """Cut and compensate."""
        method = self.method
        small, changes = cut(self.dense, keep, self.found)
        wanted = method.compensate or (method.recalibrate and bool(norms(small)))
        if not changes or not wanted:
            return small, changes, Report()
        report = compensate(
            self.dense,
            small,
            changes,
            self.batches(),
            refit=method.compensate,
            consumers_only=method.refit == "consumers",
            recalibrate=method.recalibrate,
            seed=self.context.seed,
            progress=self.context.progress,
        )
        return small, changes, report

    def batches(self) -> list[Flat]:
        """The calibration data, as many samples as fit into memory in both programs."""
        if self._batches is None:
            afford = affordable(self.dense, walks=2)
            if afford < self.method.samples:
                self.notes.append(
                    f"calibration was held to {afford} samples, more do not fit into memory"
                )
            samples = min(self.method.samples, afford)
            held = Batches(
                self.dense, self.context.task, samples=samples, device=self.context.device,
                size=_BATCH,
            )  # fmt: skip
            self._batches = list(held)
            if all(_constant(batch) for batch in self._batches):
                self.notes.append(
                    "every calibration sample is the same constant: scores and refits mean nothing"
                )
        return self._batches

    def finish(self, program: Program, keep: Keep, block: int | str) -> Outcome:
        """The result, with what replays it and what it cost and saved."""
        small, changes, report = self._cut(keep)
        device = _device(program)
        if _device(small) != device:
            small = small.to(device)
        model = CostModel(self.dense, self.found)
        sizes = {name: len(kept) for name, kept in keep.items()}
        resolved = self.method.model_dump(mode="json", exclude_defaults=True)
        resolved |= {"keep": {name: kept.tolist() for name, kept in keep.items()}, "block": block}
        figures: dict[str, Any] = {
            "macs": [model.macs({}), model.macs(sizes)],
            "parameters": [model.params({}), model.params(sizes)],
            "kept": {name: [self.found.find(name).size, size] for name, size in sizes.items()},
            "refit_error": report.errors,
            "recalibrated": len(report.recalibrated),
        }
        return Outcome(
            program=small,
            resolved=resolved,
            changes=changes,
            notes=[*dict.fromkeys([*self.notes, *report.notes])],
            figures=figures,
        )


def _ready(program: Program, device: torch.device) -> Program:
    """The program in eval mode on `device`; the input is left as it is."""
    if not program.training and _device(program) == device:
        return program
    work = program.clone()
    return work if _device(work) == device else work.to(device)


def _device(program: Program) -> torch.device:
    return next((tensor.device for _, tensor in program.tensors()), torch.device("cpu"))


def _constant(batch: Flat) -> bool:
    return all(bool((t == t.flatten()[:1]).all()) for t in batch if t.numel())
