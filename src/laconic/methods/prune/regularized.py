"""Regularised pruning: what is to go fades under a penalty during training, then it is cut.

Idea: cutting at once leaves a hole that training has to mend; a penalty that grows slowly makes the
network move what it needs elsewhere first. A part is selected at the start; in every step the
penalty is as strong as it must be for the norm of that part to follow a plan from all to nothing,
so a strength is never given, it is found (and stands in the figures). When the part is zero it is
cut: single weights become zeros that last, whole channels leave the network while it trains, and
the remaining steps train what is left, without any penalty. The cut itself changes nothing.

Papers: growing regularization (Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021,
arXiv 2012.09243); group lasso over coupled groups (Fang et al., "DepGraph", CVPR 2023); proximal
steps (Parikh & Boyd 2014).

Helps: where there are training data and minutes to spend, at ratios that one-shot pruning does not
survive. Does not: without training data; where few steps are affordable, cutting first and
distilling afterwards trains a smaller network for the same time (a LeNet-300-100 without 80 % of
its neurons, 200 steps: 85.3 % here, 85.6 % by cutting the same ones first, 86.0 % with
`prune.channels` by obs and refit). A layer norm over a group that shrinks divides by another width
after the cut: the change that this makes is measured and noted.

Cost: training steps of the whole network for `fade` of the steps, of the small one afterwards, and
one pass over the selected weights in each step. Selecting by obs, taylor or fisher costs one pass
over `samples`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from laconic.methods.base import Context, Method, Outcome
from laconic.program.cost import CostModel
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.groups import Groups, groups
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import group_choice, selection
from laconic.solvers.channels.fading import Fading, FadingGroups, FadingWeights
from laconic.solvers.channels.selection import Keep
from laconic.solvers.teaching.learning import Course, Learned, Learning, trainable
from laconic.solvers.weights.weight_masks import Amount, Pruning
from laconic.solvers.weights.weight_scores import magnitudes

_NEGLIGIBLE = 1e-3
_ALL = Sites()
_FOR_GROUPS = ("of", "importance", "block", "limit", "samples", "keep")


class Regularized(Learning, Method):
    """Fade a part of the weights or channels, then cut it; see `Learning` and `Plan` for the rest.

    Attributes:
        penalty: "l1" or "l2" on single weights (chosen by magnitude), or "group": a group lasso
            over the coupled groups (channels, heads, hidden units), which are cut away.
        ratio: part that goes, from 0 to below 1: of the weights, or of `of`.
        scope: "global": where it harms least; "layer": the same part everywhere.
        fade: share of the steps in which the part fades; the others train what is left.
        pace: power of time in the plan: 1 fades evenly, more begins gently and ends fast.
        of: for groups, the cost: multiply-adds or parameters of the program, or channels.
        importance: for groups, the score that selects: any that `prune.channels` knows.
        block: for groups, kept channels are multiples of it; "auto" measures what the runtime
            likes.
        limit: for groups, largest part of one that may go.
        samples: for groups, calibration samples that the score sees, at most.
        keep: for groups, kept indices in place of choosing them (a replay has it).
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {
        "ratio": 0.3, "block": 1, "samples": 16, "steps": 6, "evaluations": 2, "teacher": "torch",
        "precision": "fp32",
    }  # fmt: skip

    penalty: Literal["l1", "l2", "group"] = "group"
    ratio: float = Field(default=0.5, ge=0, lt=1)
    scope: Literal["global", "layer"] = "global"
    fade: float = Field(default=0.5, gt=0, le=1)
    pace: float = Field(default=2.0, gt=0)
    of: group_choice.Of = "macs"
    importance: str = "obs"
    block: Literal["auto"] | int = "auto"
    limit: float = Field(default=0.9, ge=0, lt=1)
    samples: int = Field(default=1024, ge=1)
    keep: dict[str, list[int]] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        selection.check(self.ratio, self.importance)
        selection.check_block(self.block)
        if self.penalty != "group":
            self._refuse_group_options()
        return self

    def _refuse_group_options(self) -> None:
        fields = type(self).model_fields
        unused = [name for name in _FOR_GROUPS if getattr(self, name) != fields[name].default]
        if unused:
            raise ValueError(
                f"{', '.join(unused)}: for penalty: group only; {self.penalty} takes single "
                "weights, by their magnitude"
            )

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Select, fade, cut, and train what is left; the input stays as it was.

        Raises:
            RecipeError: sites match nothing, or only groups that cannot shrink.
            BudgetError: the ratio cannot be reached; says how far it can go and what is in the way.
            DataError: no training data, or data that do not fit.
            TrainingError: the loss diverged.
        """
        if self.penalty == "group":
            return self._groups(program, sites, context)
        return self._weights(program, sites, context)

    def _weights(self, program: Program, sites: Sites, context: Context) -> Outcome:
        work = Pruning(program, sites, context.device)
        scope = "tensor" if self.scope == "layer" else "global"
        keep = Amount(ratio=self.ratio, scope=scope).kept(magnitudes(work.weights(), "l1"))
        if all(bool(stays.all()) for stays in keep.values()):
            return self._nothing(program, work.notes)
        assert self.penalty != "group"
        fading = FadingWeights(keep, self.penalty, self.fade, self.pace)
        learned = self._learn(program, work.program.train(), fading, context)
        made = work.finish()
        return self._outcome(made, learned, fading, {}, work.figures, work.notes)

    def _groups(self, program: Program, sites: Sites, context: Context) -> Outcome:
        student = thaw(program) if is_frozen(program) else program.clone()
        dense = student.clone().to(context.device)
        found = groups(dense)
        keep, block, notes = self._choose(dense, found, sites, context)
        if not keep:
            return self._nothing(program, notes)
        fading = FadingGroups(keep, self.fade, self.pace)
        learned = self._learn(program, student.train(), fading, context)
        chosen = {"keep": {name: kept.tolist() for name, kept in keep.items()}, "block": block}
        if fading.change is not None and fading.change > _NEGLIGIBLE:
            notes.append(
                f"the cut changed the outputs by {fading.change:.2%}: a normalisation divides by "
                "another width than before"
            )
        figures = {**_sizes(dense, found, keep), "cut_change": fading.change}
        made = freeze(student) if is_frozen(program) else student
        outcome = self._outcome(made, learned, fading, chosen, figures, notes)
        return replace(outcome, changes=fading.changes)

    def _choose(
        self, dense: Program, found: Groups, sites: Sites, context: Context
    ) -> tuple[Keep, int | str, list[str]]:
        """Kept indices, the block that was used, and what to know about it."""
        if self.keep is not None:
            held = {name: torch.tensor(kept) for name, kept in sorted(self.keep.items())}
            found.kept(held)  # refuses what does not fit
            return held, self.block, []
        wanted = bool(self.ratio and selection.chosen(found, sites))
        choosing = group_choice.Choosing(
            program=dense,
            found=found,
            ratio=self.ratio,
            of=self.of,
            scope=self.scope,
            block=group_choice.block_of(
                self.block if wanted else 1, context.runtime, context.threads
            ),
            adapt=self.block == "auto",
            limit=self.limit,
        )
        keep = choosing.by_importance(
            sites, self.importance, context.task, self.samples, context.seed, context.device,
            context.progress,
        )  # fmt: skip
        return keep, choosing.block, choosing.notes

    def _learn(
        self, program: Program, student: Program, fading: Fading, context: Context
    ) -> Learned:
        names, course = trainable(student, _ALL), Course.of(context)
        return self.learn(program, student, names, course, attendant=fading)

    def _nothing(self, program: Program, notes: list[str]) -> Outcome:
        own = self.model_dump(mode="json", exclude_defaults=True)
        notes = [*notes, "nothing is to go"]
        return Outcome(program=program.clone(), resolved=own, notes=notes)

    def _outcome(
        self,
        made: Program,
        learned: Learned,
        fading: Fading,
        chosen: Mapping[str, Any],
        figures: Mapping[str, Any],
        notes: list[str],
    ) -> Outcome:
        own = self.model_dump(mode="json", exclude_defaults=True)
        return Outcome(
            program=made,
            resolved={**own, **learned.resolved, **chosen},
            notes=[*dict.fromkeys([*notes, *learned.notes])],
            figures={**learned.figures, **figures, "strength": fading.strengths},
        )


def _sizes(dense: Program, found: Groups, keep: Keep) -> dict[str, Any]:
    model = CostModel(dense, found)
    sizes = {name: len(kept) for name, kept in keep.items()}
    return {
        "macs": [model.macs({}), model.macs(sizes)],
        "parameters": [model.params({}), model.params(sizes)],
        "kept": {name: [found.find(name).size, size] for name, size in sizes.items()},
    }
