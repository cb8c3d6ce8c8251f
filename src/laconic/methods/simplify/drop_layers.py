"""Remove residual blocks, or the layers of a transformer, that change the stream the least.

Idea: what is added to a residual stream can be left out and the network still fits together.
Branches are found in the graph, from the sums; a score says what each is worth, the least are
dropped, and on request a linear map fitted by least squares takes a branch's place, or the branches
that stay are fitted anew to do the work of those that left.

Papers: Men et al. 2024, "ShortGPT" (arXiv 2403.03853) for block influence, 1 - cosine between a
block's input and output; Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper
layers" (2403.17887); Veit et al. 2016 (1605.06431) for residual networks; linear replacement as in
"ReplaceMe", Shopkhoev et al. 2025 (2505.02819).

Helps: deep residual networks and transformers, where runtimes are slow in proportion to depth: a
dropped layer is time gained on every device, unlike channels of odd counts. Of layers that share
their weights (ALBERT) it drops uses: time is gained, the weights stay while a use of them stays.
The norm behind a dropped sum (BERT's LayerNorm(x + f(x))) stays: its trained scale and shift are
part of what the next layer expects, and on trained weights the output stays nearer with them. With
`refit` it takes the place of the norm before it.
Does not: networks without residual streams, blocks that change the stream's shape (they stay),
shallow networks, where every block matters; without recovery accuracy falls fast.
Cost: weight norms need no data; influence a pass over the calibration data; taylor a backward pass;
loss one pass for each branch.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest
from laconic.methods.base import Context, Method, Outcome
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.finite import refuse_broken
from laconic.solvers.layers import branch_importance, branch_removal, depth
from laconic.solvers.layers.residual import Branch, branches
from laconic.solvers.teaching.task_loss import TaskLoss
from laconic.statistics.batches import Batches, Flat, told_nothing

_BATCH = 64


class DropLayers(Method):
    """Options of `simplify.drop_layers`. Sites are names of branches (module paths).

    Attributes:
        ratio: part of the selected branches that goes, rounded down; at least one above 0.
        count: how many branches go, in place of `ratio`.
        importance: "influence" is 1 - cosine of the stream before and after; "l1" and "l2" are mean
            and root mean square of the branch's weights; "taylor" is the first-order change of the
            loss when the branch's output goes; "loss" is the rise of the task's loss when it is
            skipped.
        unit: so many branches in a row on one stream go together, worth what they are worth
            together: 2 for a transformer whose layers are attention and perceptron.
        replace: "nothing"; "linear": a linear map of the stream, fitted on calibration data against
            the network before, takes the place of what was dropped where it is cheaper; "refit":
            the branches that stay are fitted anew to give what they and those that left gave
            together, at no cost at run time.
        samples: calibration samples.
        drop: names of the branches that go, in place of everything that chooses (a replay has it).
    """

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8}

    ratio: float = Field(default=0.25, ge=0, lt=1)
    count: int | None = Field(default=None, ge=0)
    importance: Literal["influence", "l1", "l2", "taylor", "loss"] = "influence"
    unit: int = Field(default=1, ge=1)
    replace: Literal["nothing", "linear", "refit"] = "nothing"
    samples: int = Field(default=256, ge=1)
    drop: list[str] | None = None

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Take the least important branches out.

        Raises:
            RecipeError: sites or `drop` name no branch; `count` is more than there are; norms are
                to tell branches apart that share their weights.
            DataError: calibration data that are needed and missing, or do not fit; or a parameter
                that is not finite.
        """
        refuse_broken(program)
        work = program.clone()
        work.propagate()
        found = branches(work)
        notes: list[str] = []
        if not found:
            notes.append("no residual branch: no sum of a value with what weights make of it alone")
        chosen = sites.choose([branch.name for branch in found])
        batches = _Data(self, work, context)
        scores: dict[str, float] = {}
        if self.drop is None:
            units = _units(work, chosen, self.unit)
            wanted = self._wanted(len(units))
            scores = self._scores(work, units, batches, context) if wanted else {}
            gone = [name for name in sorted(scores, key=scores.__getitem__)[:wanted]]
            names = [b.name for unit in units if _label(unit) in gone for b in unit]
            if scores and self.importance not in ("l1", "l2"):
                notes += told_nothing(batches.get())
            if found and not wanted:
                notes.append(f"nothing to drop: {self._asked()} of {len(units)} units is none")
        else:
            names = _known(self.drop, found)
        before = cost(work)
        dropped = [branch for branch in found if branch.name in names]
        errors: dict[str, float] = {}
        if self.replace == "linear" and dropped:
            errors = branch_removal.replace(work, dropped, batches.get(), notes, context.progress)
        elif self.replace == "refit" and dropped:
            fitted = branch_removal.compensated(
                work, dropped, batches.get(), seed=context.seed, progress=context.progress
            )
            errors, notes = fitted.errors, notes + fitted.notes
        else:
            branch_removal.remove(work, dropped)
        after = cost(work)
        return Outcome(
            program=work,
            resolved={**self.model_dump(mode="json", exclude_defaults=True), "drop": names},
            notes=notes,
            figures={
                "scores": scores,
                "dropped": names,
                "branches": [len(found), len(found) - len(dropped)],
                "macs": [before.macs, after.macs],
                "parameters": [before.params, after.params],
                "fit_error": errors,
            },
        )

    def _wanted(self, units: int) -> int:
        if self.count is None:
            return max(int(self.ratio * units), 1 if self.ratio and units > 1 else 0)
        if self.count > units:
            raise RecipeError(
                f"count {self.count} is more than the {units} units of {self.unit} that can go",
                hint="ask for fewer, or select more sites"
                if units
                else "no sum adds so many branches with weights to one stream",
            )
        return self.count

    def _asked(self) -> str:
        return f"ratio {self.ratio}" if self.count is None else f"count {self.count}"

    def _scores(
        self, program: Program, units: Sequence[Sequence[Branch]], data: "_Data", context: Context
    ) -> dict[str, float]:
        """Worth of every unit by its label."""
        if self.importance in ("l1", "l2"):
            _tell_apart(units)
            power = 1 if self.importance == "l1" else 2
            worth = [branch_importance.weight_norm(program, unit, power) for unit in units]
        elif self.importance == "influence":
            worth = branch_importance.influence(program, units, data.get())
        elif self.importance == "taylor":
            worth = branch_importance.taylor(
                program, units, data.get(), context.task, context.generator()
            )
        else:
            loss = TaskLoss(context.task, context.original, self.samples, context.device)
            worth = branch_importance.loss_when_skipped(program, units, loss, context.progress)
        return {_label(unit): score for unit, score in zip(units, worth, strict=True)}


class _Data:
    """Calibration data, read when first asked for."""

    def __init__(self, method: DropLayers, program: Program, context: Context) -> None:
        device = next((t.device for _, t in program.tensors()), None)
        self._source = Batches(
            program, context.task, samples=method.samples, device=device, size=_BATCH
        )
        self._held: list[Flat] | None = None

    def get(self) -> list[Flat]:
        if self._held is None:
            self._held = list(self._source)
        return self._held


def _units(program: Program, chosen: Collection[str], size: int) -> list[list[Branch]]:
    """Chosen branches in runs of `size` along one stream; what is left over at its end stays."""
    units: list[list[Branch]] = []
    for chain in depth.chains(program):
        held = [branch for layer in chain for branch in layer.branches if branch.name in chosen]
        units += [held[at : at + size] for at in range(0, len(held) // size * size, size)]
    return units


def _tell_apart(units: Sequence[Sequence[Branch]]) -> None:
    """Refuse norms of weights that several units share."""
    seen: dict[frozenset[str], str] = {}
    for unit in units:
        weights = frozenset(name for branch in unit for name in branch.tensors)
        if weights in seen:
            raise RecipeError(
                f"it shares all its weights with {seen[weights]}: no norm of them tells which of "
                "the two matters less",
                where=_label(unit),
                hint="take importance: influence, taylor or loss",
            )
        seen[weights] = _label(unit)


def _label(unit: Sequence[Branch]) -> str:
    return " + ".join(branch.name for branch in unit)


def _known(names: Sequence[str], found: Sequence[Branch]) -> list[str]:
    known = [branch.name for branch in found]
    for name in names:
        if name not in known:
            raise RecipeError(f"no residual branch is named {name!r}", hint=nearest(name, known))
    return list(names)
