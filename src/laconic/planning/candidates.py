"""Recipes from mild to strong, as the model and the data allow them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from laconic.core.budget import Budget
from laconic.core.recipe import Recipe, Step
from laconic.core.task import Inputs, Task
from laconic.engine.check import call
from laconic.program.groups import groups
from laconic.program.program import Program

REMOVED = (0.4, 0.6, 0.75, 0.85)  # share of the MACs (of the parameters, for size) cut away
_EPOCHS = 5
_STEPS = 800  # fewer than that do not recover a network, however small the data are
_MINUTES = 3.0  # the longest recovery where the budget sets no time
_REST = 1.7  # teacher and optimizer, beside the student's forward and backward pass


@dataclass(frozen=True)
class Chain:
    """Candidates in order of strength; the first one beyond the budget ends the chain."""

    name: str
    recipes: Sequence[Recipe]


def chains(program: Program, budget: Budget, recover: Step | None) -> list[Chain]:
    """What to try, mild to strong: as it is, with integers, pruned ever more with either.

    Args:
        program: the original.
        budget: says what is minimised.
        recover: the training step that follows pruning, or None.
    """
    fold, integers = Step(method="simplify.fold"), Step(method="quantize.static")
    made = [
        Chain("as it is", [Recipe(steps=(fold,), name="fold")]),
        Chain("integers", [Recipe(steps=(integers,), name="int8")]),
    ]
    if len(groups(program)):
        of = "parameters" if budget.minimize == "size" else "macs"
        pruned = [_prune(share, of, recover) for share in REMOVED]
        for name, last in (("int8", integers), ("float", fold)):
            recipes = [Recipe(steps=(*r.steps, last), name=f"{r.name} + {name}") for r in pruned]
            made.append(Chain(f"pruned, {name}", recipes))
    return made


def _prune(share: float, of: str, recover: Step | None) -> Recipe:
    cut = Step(method="prune.channels", options={"ratio": share, "of": of})
    words = "MACs" if of == "macs" else of
    return Recipe(
        steps=(cut,) if recover is None else (cut, recover), name=f"{100 * share:g} % fewer {words}"
    )


def recovery(program: Program, task: Task, budget: Budget) -> Step | None:
    """The training step after pruning, as long as the data and the time make sense of it.

    Five passes over the training data, at least 800 steps, at most three minutes (or an
    eighth of the budget's time), judged by timing a training step.
    """
    loader = task.train if task.train is not None else task.calibration
    if loader is None:
        return None
    student, batches, seconds = program.clone().train(), 0, math.inf
    for batch in loader:
        batches += 1
        if batches <= 4:  # the first calls warm up
            seconds = min(seconds, _timed(student, task.split(batch)[0], task))
    limit = 60 * (_MINUTES if budget.minutes is None else budget.minutes / 8)
    affordable = int(limit / max(seconds * _REST, 1e-4))
    steps = max(1, min(max(_EPOCHS * batches, _STEPS), affordable))
    return Step(method="distill.logits", options={"steps": steps, **_targets(task)})


def _timed(student: Program, inputs: Inputs, task: Task) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    task.logits(call(student, inputs)).float().mean().backward()
    return time.perf_counter() - began


def _targets(task: Task) -> dict[str, object]:
    """Labels help where there are any; otherwise the original's outputs are all there is."""
    if task.train is None:
        return {}
    for batch in task.train:
        return {} if task.split(batch)[1] is None else {"alpha": 0.9}
    return {}
