"""What validation data say during training: the score, and how far student and teacher are apart.

A student that learns a few batches by heart comes ever closer to its teacher there and moves away
from it elsewhere; only data that are not trained on show that.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from laconic.core.task import Task
from laconic.program.program import Program
from laconic.training.distillation import Distillation
from laconic.training.evaluation import labelled, mean_loss, mean_score
from laconic.training.job import Objective, Trained
from laconic.training.processes import Processes

Measure = Callable[[Program, str], float]
_GROWN = 1.05  # a divergence that is that much above its least has turned
_ROUNDING = 1e-6  # of divergences, which may come out below zero by it


def figures_of(trained: Trained, task: Task, watch: str) -> dict[str, Any]:
    """Steps, best step, score, divergence, history, seconds: what a run came to, JSON."""
    sign = 1.0 if task.higher_is_better else -1.0
    unit = sign * task.scale if labelled(task) and watch == "score" else -1.0

    def shown(score: float | None) -> float | None:
        return None if score is None else unit * score

    history: list[dict[str, Any]] = [
        {"step": step, "loss": loss, "score": shown(score)}
        for step, loss, score in trained.evaluations
    ]
    for entry, seen in zip(history, trained.watched, strict=False):
        entry["divergence"] = seen
    if watch == "divergence":
        history = [{**entry, "divergence": entry["score"]} for entry in history]
    kept = [entry for entry in history if entry["step"] == trained.best_step]
    return {
        "steps": trained.plan.steps,
        "best_step": trained.best_step,
        "score": shown(trained.score),
        "divergence": kept[-1].get("divergence") if kept else None,
        "history": history,
        "seconds": trained.seconds,
    }


def turned(figures: Mapping[str, Any]) -> list[str]:
    """A sentence if the held-out divergence from the teacher rose again after a while."""
    told = [(e.get("divergence"), e["step"]) for e in figures["history"]]
    seen = [(value, step) for value, step in told if value is not None and math.isfinite(value)]
    limit = _GROWN * max(min(seen)[0], 0.0) + _ROUNDING if seen else 0.0
    if not seen or seen[-1][0] <= limit or min(seen) == seen[0]:
        return []
    (least, step), (last, end) = min(seen), seen[-1]
    return [
        f"the held-out divergence from the teacher was least at step {step} ({least:.3g}) and "
        f"{last:.3g} at step {end}: from there on the training data were learned by heart; the "
        f"state of step {figures['best_step']} was kept"
    ]


def score_of(
    task: Task, objective: Objective, device: torch.device, seen: Measure | None = None
) -> Measure | None:
    """The validation metric, higher is better; without labels the loss; None without data.

    With `seen` it is that which counts, lower being better.
    """
    validation = task.validation
    if validation is None:
        return None
    measured = labelled(task)

    def score(program: Program, precision: str) -> float:
        shared = Processes.current()
        if seen is not None:
            return -seen(program, precision)
        if not measured:
            return -mean_loss(program, objective, validation, device, precision, shared)
        mean = mean_score(program, task, validation, device, precision, shared)
        return mean if task.higher_is_better else -mean

    return score


def divergence(objective: Distillation) -> Measure | None:
    """Mean divergence of student and teacher on validation data; None where there is none."""
    validation = objective.task.validation
    if validation is None or not objective.compares:
        return None
    alone = objective.held_out()

    def measured(program: Program, precision: str) -> float:
        shared = Processes.current()
        return mean_loss(program, alone, validation, objective.device, precision, shared)

    return measured
