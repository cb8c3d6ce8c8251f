"""Drop activations that hardly matter, and make one layer of the two that then meet.

Idea: what stands between two layers is only worth its place if the network needs the bend. Each
activation is replaced by a straight line (slope and shift of every channel, fitted by least squares
over the data); the one whose loss rises least goes first, the others are measured again, until the
budget is spent. Two layers that meet become one in the same step: two 3x3 convolutions a 5x5 one,
with the batch norms between and behind them and the identity beside them in a residual block. Where
the second one pads, the first one pads for both, so the outermost pixels change.

Papers: Dror et al. 2022, "Layer Folding" (arXiv 2106.09309); Fu et al. 2022, "DepthShrinker"
(2206.00843), whose padding this is; Kim et al. 2023, "Efficient latency-aware CNN depth compression
via two-stage dynamic programming" (2301.12187).

Helps: networks that wait for operators rather than for arithmetic; blocks whose first layer is
1x1 or changes the stride or the width, where the merged layer costs less than the two.
Does not: a 5x5 kernel costs 25/18 of two 3x3 ones of equal width, so `merge: cheaper` finds few
pairs in a plain ResNet; activations behind a sum of branches have nothing to merge with and stay.
Recover with `distill.logits` behind it in the recipe.
Cost: a pass over the samples for every activation, and a few for each one that goes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.methods.base import Context, Method, Outcome
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.layers.activations import Activation, LinearFit, activations, linearise, merge
from laconic.solvers.teaching.task_loss import TaskLoss
from laconic.statistics.batches import Batches, told_nothing
from laconic.statistics.collect import collect
from laconic.statistics.layers import layers

_BATCH = 64
_LOOK = 4  # the least of the round before are measured again

Lines = Mapping[str, tuple[Tensor, Tensor]]


class Linearize(Method):
    """Options of `simplify.linearize`. Sites are names of activations in the graph (`relu_3`).

    Attributes:
        rise: how much the task's loss may rise, over the calibration (or training) data; without
            labels, how far the outputs may get from the original's.
        count: at most so many go. With `rise` null, exactly so many as long as there are any.
        line: "fit" is the best slope and shift of each channel; "identity" takes x for f(x).
        merge: which activations may go: those between two layers that are "cheaper" as one in
            multiply-adds, "always" those between two layers that can be one, or any ("never"),
            which merges nothing.
        samples: calibration samples, for the lines and for the loss.
        drop: names of the activations that go, in place of everything that chooses (a replay).
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8, "count": 1, "rise": None, "merge": "always"}

    rise: float | None = Field(default=0.1, ge=0)
    count: int | None = Field(default=None, ge=0)
    line: Literal["fit", "identity"] = "fit"
    merge: Literal["cheaper", "always", "never"] = "cheaper"
    samples: int = Field(default=256, ge=1)
    drop: list[str] | None = None

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Replace activations by lines and merge what meets.

        Raises:
            RecipeError: sites or `drop` name no activation; neither `rise` nor `count` is given.
            DataError: calibration data that are missing or do not fit.
        """
        if self.drop is None and self.rise is None and self.count is None:
            raise RecipeError("rise and count are both null", hint="say how far to go with one")
        work = program.clone()
        work.propagate()
        found = activations(work)
        chosen = sites.choose([one.name for one in found])
        able = [one for one in found if self._may_go(one)]
        notes = self._left_alone([one for one in found if one.name in chosen])
        names, losses = self.drop or [], dict[str, float]()
        for name in names:
            if name not in {one.name for one in found}:
                raise RecipeError(
                    f"no activation is named {name!r}", hint=nearest(name, [o.name for o in found])
                )
        wanted = able if self.drop is None else [one for one in found if one.name in names]
        device = next((t.device for _, t in work.tensors()), None)
        data = Batches(work, context.task, samples=self.samples, device=device, size=_BATCH)
        lines = self._lines(work, wanted, data, context)
        if self.drop is None:
            search = _Search(self, work, lines, context)
            names = search.run([one.name for one in able if one.name in chosen])
            losses = search.losses
            notes += told_nothing(data) if losses else []
        made, merged, told = self.without(work, names, lines)
        if not names:
            notes.append(
                "no activation goes: none may, or the loss would rise by more than allowed"
            )
        before, after = cost(work), cost(made)
        return Outcome(
            program=made,
            resolved={**self.model_dump(mode="json", exclude_defaults=True), "drop": names},
            notes=[*notes, *told],
            figures={
                "dropped": names,
                "losses": losses,
                "merged": merged,
                "activations": [len(found), len(found) - len(names)],
                "layers": [len(layers(work)), len(layers(made))],
                "macs": [before.macs, after.macs],
            },
        )

    def _may_go(self, one: Activation) -> bool:
        if self.merge == "never":
            return True
        pair = one.pair
        return pair is not None and (self.merge == "always" or pair.macs[1] < pair.macs[0])

    def _left_alone(self, found: Sequence[Activation]) -> list[str]:
        """Sentences about pairs that one layer would not be cheaper than."""
        notes: list[str] = []
        for one in found:
            if one.pair is not None and not self._may_go(one):
                apart, joined = one.pair.macs
                both = f"{one.pair.first.weight} and {one.pair.second.weight}"
                notes.append(
                    f"{one.name} stays: {both} as one would cost "
                    f"{100 * (joined / apart - 1):.0f} % more multiply-adds"
                )
        return notes

    def _lines(
        self, program: Program, wanted: Sequence[Activation], data: Batches, context: Context
    ) -> Lines:
        if self.line == "identity" or not wanted:
            return {}
        fits = {one.name: LinearFit(one.node, one.axis) for one in wanted}
        requests = {name: (name, "input 0", fit) for name, fit in fits.items()}
        collect(program, data, requests, context.progress)
        return {name: fit.line() for name, fit in fits.items()}

    def without(
        self, program: Program, names: Sequence[str], lines: Lines
    ) -> tuple[Program, list[str], list[str]]:
        """The program with these activations linear, the merged weights, and notes."""
        made, merged, notes = program.clone(), list[str](), list[str]()
        made.propagate()
        for name in [node.name for node in program.graph.nodes if node.name in names]:
            one = next(one for one in activations(made) if one.name == name)
            pays = self.merge != "never" and self._may_go(one)
            linearise(made, one.node, one.axis, lines.get(name))
            made.propagate()
            made.recompile()
            joined = merge(made, one.pair) if pays and one.pair is not None else None
            if joined is not None:
                made, weight, border = joined
                merged.append(weight)
                if border:
                    notes.append(f"{weight}: merged, the outermost values see beyond the border")
            elif self.merge != "never":
                notes.append(f"{name}: linear, but the layers around it stay two")
        return made, merged, notes


class _Search:
    """The greedy choice; what was measured on the way."""

    def __init__(self, method: Linearize, program: Program, lines: Lines, context: Context) -> None:
        self.losses: dict[str, float] = {}
        self._method, self._program, self._lines = method, program, lines
        self._progress = context.progress
        self._task_loss = TaskLoss(context.task, context.original, method.samples, context.device)

    def run(self, names: Sequence[str]) -> list[str]:
        """Names of the activations that go, in the order of their going."""
        method = self._method
        gone: list[str] = []
        left = list(names)
        if not left or method.count == 0:
            return gone
        allowed = float("inf") if method.rise is None else self._loss([]) + method.rise
        looked = left
        with self._progress.task("dropping activations", len(left)) as bar:
            while left and (method.count is None or len(gone) < method.count):
                measured = {name: self._loss([*gone, name]) for name in looked}
                self.losses |= measured
                best = min(measured, key=measured.__getitem__)
                if measured[best] > allowed or math.isinf(measured[best]):
                    break
                gone.append(best)
                left.remove(best)
                bar.advance(1, best)
                looked = sorted(left, key=self.losses.__getitem__)[:_LOOK]
        return gone

    @torch.no_grad()
    def _loss(self, names: Sequence[str]) -> float:
        made, _, _ = self._method.without(self._program, names, self._lines)
        loss = self._task_loss(made)
        return loss if math.isfinite(loss) else float("inf")  # NaN would win every comparison
