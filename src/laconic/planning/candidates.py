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
BITS = (6, 5, 4)  # of weights; they still run as int8
_EPOCHS = 5
_STEPS = 2000  # fewer do not give back the last images: LAB.md, digits
_EMA, _AVERAGED = 0.998, 1000
_MINUTES = 3.0  # the longest recovery where the budget sets no time
_REST = 1.7  # teacher and optimizer, beside the student's forward and backward pass
_COARSE = {"pieces": 8, "tries": 3}  # each piece is an export and a measurement
_KINDS = (
    ("as it is", "fold", Step(method="simplify.fold")),
    ("integers", "int8", Step(method="quantize.static")),
)


@dataclass(frozen=True)
class Chain:
    """Candidates in order of strength; the first one beyond the budget ends the chain."""

    name: str
    recipes: Sequence[Recipe]


def basics() -> list[Chain]:
    """The network whole: as it is, and with integers."""
    return [Chain(kind, [Recipe(steps=(step,), name=name)]) for kind, name, step in _KINDS]


def pruned(program: Program, budget: Budget, recover: Step | None, kind: str) -> Chain:
    """Pruned ever more, mild to strong, of the kind "as it is" or "integers".

    Args:
        program: the original.
        budget: says what is minimised.
        recover: the training step that follows pruning, or None.
        kind: the name of one of the basics.
    """
    last, ending = next((step, name) for held, name, step in _KINDS if held == kind)
    of = "parameters" if budget.minimize == "size" else "macs"
    recipes = [_prune(share, of, recover) for share in REMOVED] if len(groups(program)) else []
    return Chain(
        f"pruned, {kind}",
        [Recipe(steps=(*r.steps, last), name=f"{r.name} + {ending}") for r in recipes],
    )


def finer(recipe: Recipe) -> Chain:
    """An integer recipe with ever fewer bits for its weights: as fast, in a smaller file."""
    *before, last = recipe.steps
    recipes: list[Recipe] = []
    if last.method == "quantize.static" and "bits" not in last.options:
        for bits in BITS:
            step = Step(
                method=last.method, sites=last.sites, options={**last.options, "bits": bits}
            )
            recipes.append(Recipe(steps=(*before, step), name=f"{recipe.name}, {bits}-bit weights"))
    return Chain("fewer bits", recipes)


def paying(recipe: Recipe, budget: Budget) -> Chain:
    """The same with integers only where they save measured time, in floats elsewhere."""
    *before, last = recipe.steps
    if budget.minimize != "latency":
        return Chain("integers where they pay", [])
    steps = [last] if last.method == "quantize.static" else [_KINDS[1][2]]
    steps.append(Step(method="quantize.where", options={"batch": budget.batch, **_COARSE}))
    made = Recipe(steps=(*before, *steps), name=f"{recipe.name}, integers where they pay")
    return Chain("integers where they pay", [made])


def _prune(share: float, of: str, recover: Step | None) -> Recipe:
    cut = Step(method="prune.channels", options={"ratio": share, "of": of})
    words = "MACs" if of == "macs" else of
    return Recipe(
        steps=(cut,) if recover is None else (cut, recover), name=f"{100 * share:g} % fewer {words}"
    )


def recovery(program: Program, task: Task, budget: Budget) -> Step | None:
    """The training step after pruning, as long as the data and the time make sense of it.

    Five passes over the training data, at least 2,000 steps, at most three minutes (or an
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
    options = {"steps": steps, **_targets(task)}
    if steps >= _AVERAGED:  # a mean of late states loses fewer of the original's answers
        options["ema"] = _EMA
    return Step(method="distill.logits", options=options)


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
        return {} if task.split(batch)[1] is None else {"alpha": 0.5, "temperature": 2.0}
    return {}
