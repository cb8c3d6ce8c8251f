"""What may be lost and what must be gained."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Objective = Literal["latency", "size", "macs"]


class Budget(BaseModel):
    """What a compression may cost and what it is for.

    Attributes:
        max_drop: how much of the task's metric may be lost, in the metric's unit.
        confidence: the level at which the drop has to be certified on the validation split.
        minimize: what "strongest" means.
        runtime: the runtime it is measured in; "auto" takes the fastest for the original, OpenVINO
            where that is not clear.
        batch: batch size of the latency that counts.
        threads: intra-op threads of the runtime; None means all cores.
        minutes: how long the search may take; None means as long as the candidates need.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_drop: float = Field(default=0.5, ge=0)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    minimize: Objective = "latency"
    runtime: str = "auto"
    batch: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
