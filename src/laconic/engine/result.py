"""What a compression hands back."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic import storage
from laconic.core.errors import StorageError
from laconic.core.measurement import Measurement
from laconic.core.recipe import Recipe
from laconic.engine import files
from laconic.engine.writeback import write_back
from laconic.methods.base import Changes
from laconic.program.program import Program
from laconic.runtimes.base import Precision


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

    def to_json(self) -> dict[str, Any]:
        """Plain data for `result.json`."""
        named = {"recipe": self.recipe.model_dump(mode="json"), "points": dict(self.points)}
        measured = {"drop": self.drop.to_json(), "objective": self.objective.to_json()}
        return plain({**vars(self), **named, **measured})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Candidate":
        """The inverse of `to_json`."""
        fields: dict[str, Any] = {
            **data,
            "recipe": Recipe.model_validate(data["recipe"]),
            "drop": Measurement.from_json(data["drop"]),
            "objective": Measurement.from_json(data["objective"]),
        }
        return cls(**fields)


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
        original: the Program it came from; None for a result that was read from a folder.
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
        deploy: runtime and precision it was chosen for, for example ("openvino", "bf16").
        pages: further files that `save` writes: name → writer of that file (the report).
    """

    program: Program
    original: Program | None = None
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
    deploy: tuple[str, Precision] | None = None
    pages: Mapping[str, Callable[["Result", Path], object]] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write the models, `result.json`, `recipe.yaml` and the pages; all or none.

        `model.laconic`, `model.onnx`, `model.xml` with `model.bin` (OpenVINO). A file that a
        runtime cannot express is left out and named in `result.json` under "refused".

        Raises:
            StorageError: the disk is full or not writable; earlier files are untouched.
        """
        target = Path(folder)
        with files.staged(target) as stage:
            refused = files.write_models(self.program, stage, self.deploy)
            told = replace(self, refused=[*self.refused, *refused])
            text = json.dumps(told.to_json(), indent=1, allow_nan=False)
            (stage / "result.json").write_text(text, encoding="utf-8")
            (stage / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
            for name, write in self.pages.items():
                write(told, stage / name)
        return target

    @classmethod
    def read(cls, folder: str | Path) -> "Result":
        """A saved result, without its original.

        Raises:
            StorageError: the folder holds none, or a file is damaged.
        """
        path = Path(folder) / "result.json"
        hint = "give the folder that `laconic compress --out` or `result.save` wrote"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(
                f"cannot be read: {error.strerror}", where=str(path), hint=hint
            ) from error
        except ValueError as error:
            raise StorageError(f"is damaged: {error}", where=str(path)) from error
        program = storage.load(Path(folder) / f"{files.NAME}.laconic")
        try:
            return cls(program=program, **_from_json(data))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(
                f"is not a result of this version: {error!r}", where=str(path)
            ) from error

    def write_back(self, model: nn.Module) -> list[str]:
        """Copy the values into the user's own model; see `engine.writeback.write_back`."""
        return write_back(self.program, model)

    def to_json(self) -> dict[str, Any]:
        """Plain data: all but the Programs."""
        sides = {k: [m.to_json() for m in v] for k, v in self.measurements.items()}
        return {
            "verdict": self.verdict,
            "deploy": list(self.deploy) if self.deploy else None,
            "measurements": plain(sides),
            "parity": plain(self.parity),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "steps": [plain(asdict(step)) for step in self.steps],
            "refused": list(self.refused),
            "layers": [plain(asdict(layer)) for layer in self.layers],
            "recipe": self.recipe.model_dump(mode="json"),
            "changes": changes_to_json(self.changes),
            "provenance": plain(self.provenance),
        }


def _from_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Result but its Programs."""
    sides = {k: [Measurement.from_json(m) for m in v] for k, v in data["measurements"].items()}
    return {
        "recipe": Recipe.model_validate(data["recipe"]),
        "changes": changes_from_json(data["changes"]),
        "measurements": sides,
        "parity": data["parity"],
        "steps": [StepRecord(**step) for step in data["steps"]],
        "candidates": [Candidate.from_json(candidate) for candidate in data["candidates"]],
        "layers": [Layer(**layer) for layer in data["layers"]],
        "verdict": data["verdict"],
        "refused": data["refused"],
        "provenance": data["provenance"],
        "deploy": tuple(data["deploy"]) if data["deploy"] else None,
    }


def changes_to_json(changes: Changes) -> dict[str, dict[str, list[int]]]:
    """Plain data: tensor → dimension → kept positions."""
    return {
        name: {str(dim): kept.tolist() for dim, kept in dims.items()}
        for name, dims in changes.items()
    }


def changes_from_json(data: Mapping[str, Mapping[str, Sequence[int]]]) -> Changes:
    """The inverse of `changes_to_json`."""
    return {
        name: {int(dim): torch.tensor(kept, dtype=torch.int64) for dim, kept in dims.items()}
        for name, dims in data.items()
    }


def plain(value: Any) -> Any:
    """`value` as JSON: tensors and NumPy values become lists and numbers, NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bool, int, str, type(None))):
        return value
    return (
        plain(value.tolist()) if isinstance(value, (Tensor, np.ndarray, np.generic)) else str(value)
    )
