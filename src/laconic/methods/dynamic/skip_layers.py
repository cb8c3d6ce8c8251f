"""Learned gates in front of residual units: each input runs the layers that it needs.

Idea: in a residual network a unit that is left out leaves the stream as it was, and easy inputs
need few of them. A gate in front of each unit looks at the mean of the stream and says for every
sample whether the unit runs. Gates and network are trained together towards the original's
outputs, under a penalty on what is spent beyond `share` of the units' multiply-adds; the network
learns to do without, the gates learn for whom. Then one threshold for all gates is set on held-out
data, so that they spend what was asked for. In a runtime the network is a chain of pieces: rows
that skip a unit cost nothing there.

Papers: Wang et al. 2018, "SkipNet" (arXiv 1711.09485); Veit & Belongie 2018, "ConvNet-AIG"
(1711.11503); straight-through gradients, Bengio et al. 2013 (1308.3432).

Helps: deep residual networks and transformers on inputs of mixed difficulty, where latency counts
sample by sample. Does not: networks without residual streams; shallow ones; hardware that is fast
in large batches only, because rows that go different ways leave smaller batches. A fixed choice
(`simplify.drop_layers`) is as fast and needs no gates where all inputs are alike: see the shares in
the figures.

Cost: training steps of the whole network; a gate costs a mean and a dot product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from laconic.core.errors import RecipeError
from laconic.methods.base import Context, Method, Outcome
from laconic.program.freezing import freeze, is_frozen, thaw
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.dynamic import gates
from laconic.solvers.dynamic.gates import Gate, LastState, Spending
from laconic.solvers.layers.residual import branches
from laconic.solvers.teaching.learning import Course, Learning, trainable
from laconic.statistics.batches import Batches, Flat
from laconic.training.taps import tapped

_HALVINGS = 12
_NEAR = 0.005  # of the units' cost: a limit that leaves less of the share unused will do
_REACH = 8.0  # thresholds are sought this far on both sides of a score of 0


class SkipLayers(Learning, Method):
    """Train gates that let samples skip units; see `Learning` and `Plan` for the other fields.

    Sites are names of residual branches (module paths).

    Attributes:
        share: part of the units' multiply-adds that is to be spent, on average over samples.
        unit: so many branches in a row are skipped together: 2 for a transformer whose layers are
            attention and perceptron.
        penalty: its strength in units of the loss, where everything is spent.
        samples: held-out samples on which the threshold is set.
        train: globs of the tensors that train; gates always do.
        units: names of the gated units, in place of choosing them (a replay has it).
        threshold: of all scores, in place of setting it (a replay has it).
    """

    trains: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {
        "samples": 8, "steps": 4, "evaluations": 1, "teacher": "torch", "precision": "fp32",
    }  # fmt: skip

    share: float = Field(default=0.7, gt=0, lt=1)
    unit: int = Field(default=1, ge=1)
    penalty: float = Field(default=1.0, ge=0)
    samples: int = Field(default=512, ge=1)
    train: tuple[str, ...] = ("*",)
    units: list[str] | None = None
    threshold: float | None = None

    def apply(self, program: Program, sites: Sites, context: Context) -> Outcome:
        """Train gates into a copy; the input stays as it was.

        Raises:
            RecipeError: sites match no branch; a unit that a replay names is not there.
            DataError: no training data, or data that do not fit.
            TrainingError: the loss diverged, or outputs differ in shape.
        """
        student = thaw(program) if is_frozen(program) else program.clone()
        student.propagate()
        names = sites.choose([branch.name for branch in branches(student)])
        found, notes = gates.units(student, names, self.unit)
        found = self._chosen(found)
        if not found:
            notes.append("no residual unit that could be left out: nothing is gated")
            own = self.model_dump(mode="json", exclude_defaults=True)
            return Outcome(program=program.clone(), resolved={**own, "units": []}, notes=notes)
        made = gates.insert(student, found)
        student.train()
        learned = self.learn(
            program, student, trainable(student, Sites.of([*self.train, "gates"])),
            Course.of(context),
            around=lambda inner: Spending(inner, student, made, self.share, self.penalty),
            attendant=LastState(),
        )  # fmt: skip
        gates.decide(student, made)
        held = _held_out(student, context, self.samples)
        limit = self._threshold(student, made, held)
        gates.set_thresholds(student, made, limit)
        opened = _opened(student, made, held)
        own = self.model_dump(mode="json", exclude_defaults=True)
        chosen = {"units": [gate.unit.name for gate in made], "threshold": limit}
        return Outcome(
            program=freeze(student) if is_frozen(program) else student,
            resolved={**own, **learned.resolved, **chosen},
            notes=[*notes, *learned.notes, *_same_for_all(opened)],
            figures={
                **learned.figures,
                "executed": {name: float(rows.double().mean()) for name, rows in opened.items()},
                "unit_share": {gate.unit.name: gate.unit.share for gate in made},
                "spent": _spent(made, opened),
            },
        )

    def _chosen(self, found: Sequence[gates.Unit]) -> list[gates.Unit]:
        if self.units is None:
            return list(found)
        known = {unit.name: unit for unit in found}
        for name in self.units:
            if name not in known:
                raise RecipeError(f"no unit {name!r} can be left out", where="units",
                                  hint=f"there are {list(known)}")  # fmt: skip
        return [known[name] for name in self.units]

    def _threshold(self, program: Program, made: Sequence[Gate], held: Sequence[Flat]) -> float:
        """The lowest limit with which the samples spend no more than the share."""
        if self.threshold is not None:
            return self.threshold
        low, high = -_REACH, _REACH
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            gates.set_thresholds(program, made, middle)
            left = self.share - _spent(made, _opened(program, made, held))
            low, high = (low, middle) if left >= 0 else (middle, high)
            if 0 <= left < _NEAR:  # every look runs the network on all samples
                break
        return high


def _held_out(program: Program, context: Context, samples: int) -> list[Flat]:
    """Validation inputs, or calibration inputs where there are none."""
    task = context.task
    if task.validation is not None:
        task = replace(task, calibration=task.validation)
    device = next((tensor.device for _, tensor in program.tensors()), None)
    return list(Batches(program, task, samples=samples, device=device, size=64))


@torch.no_grad()
def _opened(program: Program, made: Sequence[Gate], held: Sequence[Flat]) -> dict[str, Tensor]:
    """Unit → bool for each sample: whether it ran."""
    rows: list[list[Tensor]] = [[] for _ in made]
    with tapped(program, [gate.open.name for gate in made]):
        for flat in held:
            for kept, value in zip(rows, program.run_flat(*flat)[-len(made) :], strict=True):
                kept.append(value.cpu())
    pairs = zip(made, rows, strict=True)
    return {gate.unit.name: torch.cat(kept) for gate, kept in pairs}


def _spent(made: Sequence[Gate], opened: Mapping[str, Tensor]) -> float:
    """Part of the units' multiply-adds that was executed."""
    return sum(gate.unit.share * float(opened[gate.unit.name].double().mean()) for gate in made)


def _same_for_all(opened: Mapping[str, Tensor]) -> list[str]:
    """A sentence where no gate tells samples apart."""
    if any(bool(rows.any()) and not bool(rows.all()) for rows in opened.values()):
        return []
    return ["every gate says the same for all held-out samples: simplify.drop_layers does that "
            "without gates"]  # fmt: skip
