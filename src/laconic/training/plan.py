"""How to train: length, optimizer, schedule, precision. Every default lives here, once."""

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from laconic.program.program import Program
from laconic.training.normalization import has_batch_norm

Optimizer = Literal["auto", "sgd", "adamw"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "bf16", "fp32"]

DEFAULT_EPOCHS = 5.0


class Plan(BaseModel):
    """How to train. A method that trains inherits these fields; they are its recipe keys.

    At most one of `steps`, `epochs` and `minutes` is given; five epochs if none is. A step is one
    move of the optimizer.

    Attributes:
        steps: length in steps.
        epochs: length in passes over the training data; a part of one is allowed.
        minutes: length in time, turned into steps by timing a few; a replay takes the steps.
        optimizer: "sgd" (Nesterov momentum) or "adamw"; "auto": SGD where the network has batch
            normalisation, AdamW elsewhere.
        lr: peak learning rate; None takes 0.02 for SGD and 5e-5 for AdamW.
        momentum: of SGD; the first beta of AdamW.
        weight_decay: not on vectors; None takes 1e-4 for SGD, 0 for AdamW.
        schedule: what the learning rate does after the warm-up, down to zero at the end.
        warmup: share of the steps in which the learning rate rises from zero.
        clip: largest norm of the gradient; None does not clip.
        precision: "bf16" runs convolutions and matrix products in bfloat16 and keeps the weights
            in float32; "auto" takes it where the hardware computes in it.
        dropout: keep the network's dropout while it trains. Off: a network that was made smaller
            and learns from the original is short of capacity, not of noise.
        ema: decay of a running mean of the weights that is evaluated and kept instead of them.
        accumulate: batches that make one step, in all processes together; None takes one for each
            process. The result does not depend on the number of processes, only on this.
        evaluations: how often the state is judged on validation data; the best state is kept.
        patience: stop after so many evaluations without a better one; None never does.
        compile: run the training step through `torch.compile`; takes minutes before the first step.
        save_every: seconds between states on disk, where a folder for them is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    optimizer: Optimizer = "auto"
    lr: float | None = Field(default=None, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float | None = Field(default=None, ge=0)
    schedule: Schedule = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    clip: float | None = Field(default=5.0, gt=0)
    precision: Precision = "auto"
    dropout: bool = False
    ema: float | None = Field(default=None, gt=0, lt=1)
    accumulate: int | None = Field(default=None, ge=1)
    evaluations: int = Field(default=6, ge=1)
    patience: int | None = Field(default=None, ge=1)
    compile: bool = False
    save_every: float = Field(default=60.0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [n for n in ("steps", "epochs", "minutes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of steps, epochs and minutes, not {' and '.join(given)}")
        return self

    def settled(self, program: Program, device: torch.device, processes: int) -> "Plan":
        """This plan with everything but the length decided for a program and a machine."""
        optimizer = self.optimizer
        if optimizer == "auto":
            optimizer = "sgd" if has_batch_norm(program) else "adamw"
        sgd = optimizer == "sgd"
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if computes_bf16(device) else "fp32"
        return self.model_copy(
            update={
                "optimizer": optimizer,
                "lr": self.lr if self.lr is not None else (0.02 if sgd else 5e-5),
                "weight_decay": self.weight_decay
                if self.weight_decay is not None
                else (1e-4 if sgd else 0.0),
                "precision": precision,
                "accumulate": self.accumulate or processes,
            }
        )

    def of_steps(self, steps: int) -> "Plan":
        """This plan with its length in steps."""
        return self.model_copy(update={"steps": steps, "epochs": None, "minutes": None})

    def rate(self, step: int) -> float:
        """Learning rate of step `step` (from 0) of a plan whose length is in steps."""
        peak, steps = self.lr or 0.0, self.steps or 1
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return peak * (step + 1) / (rising + 1)
        left = 1 - (step - rising) / max(1, steps - rising)
        if self.schedule == "constant":
            return peak
        return peak * (left if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


def steps_within(
    seconds: float, first: Sequence[float], later: Sequence[float], fresh: int
) -> tuple[int, float]:
    """How many steps fit into a time, one at the least, and the mean seconds of a step.

    first: seconds of a few trial steps, of which the very first does not count; later: of the same
    batches once more, if they come again after `fresh` steps, else nothing.
    """
    each = sorted(first[1:])[len(first[1:]) // 2]
    if later and seconds > fresh * each:
        again = sorted(later[1:])[len(later[1:]) // 2]
        steps = int(fresh + (seconds - fresh * each) / again)
        return max(1, steps), seconds / max(1, steps)
    return max(1, int(seconds / each)), each


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16, so that using it is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    ask = getattr(torch.cpu, "get_capabilities", dict)  # not in every torch we allow
    found = ask()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
