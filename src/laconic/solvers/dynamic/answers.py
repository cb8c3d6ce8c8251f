"""Whether outputs have a confidence, and what several answers come to on held-out samples."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.core.errors import DataError, RecipeError
from laconic.core.task import Task, to_device
from laconic.measuring import intervals
from laconic.program.program import Program
from laconic.solvers.dynamic.confidence import Answers, Floats, Limits, Measure, doubts
from laconic.solvers.setting import Setting
from laconic.statistics.batches import check_inputs, flat_inputs


def classes_of(program: Program, task: Task, measure: Measure | None) -> tuple[Measure, int, int]:
    """The measure of doubt, how many classes there are, and which output holds their scores.

    Of several outputs that is the one which `task.logits` picks.

    Raises:
        RecipeError: outputs that have no confidence, or of which `task.logits` picks none.
    """
    flat: Any = program.output_node.args[0]
    if "shape" not in flat[0].meta:
        program = program.clone()
        program.propagate()
        flat = program.output_node.args[0]
    place = _picked(program, task) if len(flat) > 1 else 0
    shape, dtype = flat[place].meta["shape"], flat[place].meta["dtype"]
    if len(shape) != 2 or shape[1] < 2 or dtype is None or not dtype.is_floating_point:
        of = f"as output {place} of {len(flat)}, the one judged, " if len(flat) > 1 else ""
        raise RecipeError(
            f"the model gives {of}{dtype} {list(shape)}, which has no confidence to leave by",
            where="outputs",
            hint="it takes class scores, float [batch, classes]; of several outputs the task's "
            "`logits` names them",
        )
    if measure is None and not task.binary:
        raise RecipeError(
            f"a {task.name} task scores by {task.metric_name}, not by right and wrong: its outputs "
            "have no confidence to leave by",
            where="outputs",
            hint='where they are class scores all the same, give measure: "max"',
        )
    return measure or "max", int(shape[1]), place


def _picked(program: Program, task: Task) -> int:
    """Which of several outputs `task.logits` gives."""
    flat: Any = program.output_node.args[0]
    values = tuple(torch.zeros(node.meta["shape"], dtype=node.meta["dtype"]) for node in flat)
    found = task.logits(program.signature.arrange(values))
    for place, value in enumerate(values):
        if value is found:
            return place
    raise RecipeError(
        f"the model gives {len(flat)} outputs, and the task's `logits` is none of them as it is: "
        "it is unclear which holds class scores",
        where="outputs",
        hint="give the Task a `logits` function that picks one",
    )


def check_held_out(task: Task) -> None:
    """Refuse a task whose validation data cannot keep a promise, by their first batch.

    Raises:
        DataError: there are none, or they have no targets.
    """
    for batch in task.batches("validation"):
        if task.split(batch)[1] is None:
            raise _without_targets(0)
        return


def _without_targets(number: int) -> DataError:
    return DataError("has no targets to compare with", where=f"validation batch {number}")


@torch.no_grad()
def judged(
    program: Program,
    nodes: Sequence[Sequence[str]],
    place: int,
    reference: Program | None,
    measure: Measure,
    costs: Floats,
    context: Setting,
) -> Answers:
    """Doubt and scores of the answers of `nodes`, the last of which is final, on validation data.

    Args:
        program: in eval mode; its graph is not changed.
        nodes: all outputs of each answer, in the order in which they are asked.
        place: which of them holds class scores.
        reference: whose accuracy is promised; None if it is that of the last node.
        measure: of doubt.
        costs: of staying at each node.
        context: task, device and progress.

    Raises:
        DataError: no validation data, without targets, or data that do not fit.
    """
    asked = _asking(program, [name for answer in nodes for name in answer]).to(context.device)
    before = None if reference is None else reference.clone().to(context.device)
    task, loader = context.task, context.task.batches("validation")
    parts: list[tuple[Floats, Floats, Floats]] = []
    for number, batch in enumerate(context.progress.track(loader, "asking the exits")):
        inputs, targets = task.split(batch)
        flat = flat_inputs(program, inputs, f"validation batch {number}")
        check_inputs(program, flat, f"validation batch {number}")
        moved = to_device(flat, context.device)
        targets = to_device(targets, context.device)
        if targets is None:
            raise _without_targets(number)
        values = iter(asked.run_flat(*moved))
        given = [tuple(islice(values, len(answer))) for answer in nodes]
        held = [_scores(program, task, each, targets) for each in given]
        wanted = held[-1]
        if before is not None:
            wanted = _scores(program, task, before.run_flat(*moved), targets)
        doubt = [doubts(each[place], measure).double().cpu().numpy() for each in given[:-1]]
        parts.append((np.stack(doubt, 1), np.stack(held, 1), wanted))
    doubt, scores, wanted = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Answers(doubt, scores, wanted, costs)


def _asking(program: Program, nodes: Sequence[str]) -> Program:
    """A copy that gives the values of `nodes`."""
    copy = program.clone()
    by_name = {node.name: node for node in copy.graph.nodes}
    copy.output_node.args = (tuple(by_name[name] for name in nodes),)
    copy.recompile()
    return copy


def _scores(program: Program, task: Task, outputs: Sequence[Tensor], targets: Any) -> Floats:
    return task.metric(program.signature.arrange(outputs), targets).double().cpu().numpy()


def figures_of(solved: Limits, task: Task, max_drop: float) -> dict[str, Any]:
    """What limits come to, as plain data."""
    return {
        "limits": list(solved.values),
        "leaving": list(solved.leaving),
        "expected_cost": solved.cost,
        "promised": max_drop,
        "confidence": solved.drop.confidence,
        "drop": solved.drop.value,
        "bound": solved.drop.bound,
        "unit": task.unit,
        "tested_on": solved.samples,
        "steps_that_held": solved.tested,
    }


def why_none(solved: Limits, task: Task, max_drop: float, confidence: float) -> list[str]:
    """A sentence if nobody may leave early."""
    if not solved.none:
        return []
    unit = "points" if task.unit == "%" else task.unit
    promise = f"{max_drop:g} {unit} at {100 * confidence:g} % confidence"
    least = intervals.drop_bound(0, 0, solved.samples, confidence) if task.binary else 0.0
    if least * task.scale > max_drop:
        why = f"{solved.samples} validation samples cannot certify {promise}, even without a loss"
    else:
        why = f"no limit keeps the promise of {promise}"
    return [f"nobody may leave early: {why}; nothing was changed"]
