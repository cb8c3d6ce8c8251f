"""What a compression hands back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laconic.core.measurement import Measurement
from laconic.core.recipe import Recipe
from laconic.methods.base import Changes
from laconic.program.program import Program


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one step did and cost.

    Attributes:
        method: its name, and `sites` it was applied to.
        kept: False where it did not pay and was undone; `reason` says why.
        seconds: wall time.
        before: MACs, parameters, bytes and validation score before the step.
        after: the same after it.
        notes: what was refused, and fallbacks.
        figures: the method's own numbers.
    """

    method: str
    sites: Sequence[str]
    kept: bool
    seconds: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    reason: str = ""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One recipe the budget loop tried.

    Attributes:
        name: for a person, for example "channels 50 % + int8".
        drop: measured loss of the metric on validation, with its upper bound at the confidence.
        accepted: within the budget; `chosen`: the one handed back; `reason` says why (not).
        objective: what is minimised, as measured (ms, bytes, MACs); `points` extra figures.
    """

    name: str
    recipe: Recipe
    drop: Measurement
    objective: Measurement
    accepted: bool
    chosen: bool
    reason: str
    seconds: float
    points: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One row of the per-layer table (original beside compressed; None where it is gone)."""

    name: str
    operator: str
    shape_before: Sequence[int]
    shape_after: Sequence[int] | None
    macs_before: float
    macs_after: float
    bytes_before: int
    bytes_after: int
    form: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """A compressed Program with everything known about it.

    Attributes:
        program: the compressed Program.
        original: the Program it came from.
        recipe: the resolved recipe; replaying it is bit-exact on a CPU.
        changes: what was cut of the original: tensor → dimension → kept positions.
        measurements: original and compressed, side by side: "original" / "compressed" →
            measurements (accuracy, latency per runtime, precision and batch, bytes, MACs, memory).
        parity: per exported artifact, how it compares with the Program.
        steps: what each step did.
        candidates: what the budget loop tried.
        layers: the per-layer table.
        verdict: one plain sentence: what was gained, what it cost, whether the budget is met.
        refused: what could not be done and why, one sentence each.
        provenance: versions, machine, seeds, hashes, command, seconds.
    """

    program: Program
    original: Program
    recipe: Recipe
    changes: Changes = field(default_factory=dict)
    measurements: Mapping[str, Sequence[Measurement]] = field(default_factory=dict)
    parity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    steps: Sequence[StepRecord] = ()
    candidates: Sequence[Candidate] = ()
    layers: Sequence[Layer] = ()
    verdict: str = ""
    refused: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
