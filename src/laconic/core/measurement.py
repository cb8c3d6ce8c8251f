"""A number with the conditions it was taken under."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured value.

    Attributes:
        name: what was measured, for example "latency".
        value: the central value (a median for times, a mean for accuracies).
        unit: "ms", "%", "B", "MAC", "MiB", "x" ...
        low: lower end of the spread or of the confidence interval, in the same unit.
        high: upper end.
        repeats: how many turns or samples stand behind the value.
        conditions: runtime, precision, batch, threads, machine, split, confidence ...
    """

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    repeats: int = 1
    conditions: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        """Plain data for `result.json`."""
        return {**asdict(self), "conditions": dict(self.conditions)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Measurement":
        """The inverse of `to_json`."""
        return cls(**data)

    def __str__(self) -> str:
        spread = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g} {self.unit}{spread}"
