"""Run a recipe: steps in order, each kept as soon as it is done, undone where it does not pay."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from laconic.core.errors import LaconicError
from laconic.core.recipe import Recipe, Step
from laconic.engine.result import StepRecord, changes_from_json, changes_to_json, plain
from laconic.engine.store import Store, fingerprint, key_of
from laconic.methods.base import Changes, Context, Method, Outcome, method_of
from laconic.program.cost import cost
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.program.sites import Sites

Score = Callable[[Program], float]


class Judge(Protocol):
    """Says whether a step pays where it counts."""

    def __call__(self, before: Program, after: Program) -> str:
        """Why `after` is no better than `before`; empty if it is better, or was not made to be."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a recipe made.

    Attributes:
        program: the last Program.
        recipe: the steps that were kept, with their resolved options.
        changes: tensor → dimension → kept positions, in the original.
        steps: a record of every step, undone ones included.
        key: names the last Program in the store.
    """

    program: Program
    recipe: Recipe
    changes: Changes
    steps: Sequence[StepRecord]
    key: str


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the engine needs besides recipe and Program.

    Attributes:
        context: handed to every method.
        store: where finished steps are kept.
        judge: decides whether a step is kept; None keeps all.
        score: a Program's score on validation data, for the record; None records none.
    """

    context: Context
    store: Store
    judge: Judge | None = None
    score: Score | None = None


def check(recipe: Recipe) -> list[Method]:
    """The methods of a recipe, every option checked before anything runs.

    Raises:
        RecipeError: unknown method or option, or a value out of range; names the step.
    """
    return [method_of(step, f"step {number}") for number, step in enumerate(recipe, 1)]


def run(program: Program, recipe: Recipe, bench: Bench, *, start: str = "") -> Ran:
    """Apply a recipe to a Program, which is left as it was.

    Finished steps come from `bench.store`. An error of a step gets a note that names the step;
    what was finished before it stays in the store.

    Args:
        program: the Program to start from; `bench.context.original` is the teacher.
        recipe: its steps.
        bench: everything else.
        start: names `program` in the store; by default a hash of its graph and tensors.

    Raises:
        RecipeError: the recipe does not fit (before anything runs, where that can be known).
        LaconicError: what a method raises.
    """
    methods = check(recipe)
    key = start or key_of(fingerprint(program), bench.context.seed, str(bench.context.device))
    now, changes = program, Changes()
    records: list[StepRecord] = []
    kept: list[Step] = []
    state = _State(bench, _figures(program, key, bench))
    for number, (step, method) in enumerate(zip(recipe, methods, strict=True), 1):
        key = key_of(key, step.to_plain(), _judged(bench))
        try:
            after, record, cut = state.step(now, step, method, key)
        except LaconicError as error:
            error.add_note(f"in step {number} ({step.method}) of {recipe.name!r}")
            raise
        records.append(record)
        if record.kept:
            now, changes = after, compose(changes, cut)
            kept.append(Step(method=step.method, sites=step.sites, options=dict(record.options)))
    resolved = Recipe(steps=tuple(kept), name=recipe.name, resolved=True)
    own = {name for name, _ in program.tensors()}
    changes = {name: dims for name, dims in changes.items() if name in own}
    return Ran(program=now, recipe=resolved, changes=changes, steps=records, key=key)


class _State:
    """The figures of the Program so far, and how one step is done or found done."""

    def __init__(self, bench: Bench, figures: dict[str, float]) -> None:
        self.bench = bench
        self.figures = figures

    def step(
        self, program: Program, step: Step, method: Method, key: str
    ) -> tuple[Program, StepRecord, Changes]:
        found = self.bench.store.get(key)
        if found is None:
            found = self._do(program, step, method, key)
        after = program
        if found["kept"]:
            held = self.bench.store.program(key, program)
            if held is None:  # the file was cut short: made again
                found = self._do(program, step, method, key)
                held = self.bench.store.program(key, program)
            after = held or program
        record = StepRecord(
            method=step.method,
            sites=[step.sites] if isinstance(step.sites, str) else list(step.sites),
            kept=found["kept"],
            seconds=found["seconds"],
            before=self.figures,
            after=found["after"],
            reason=found["reason"],
            options=found["options"],
            notes=found["notes"],
            figures=found["figures"],
        )
        if found["kept"]:
            self.figures = dict(found["after"])
        return after, record, changes_from_json(found["changes"])

    def _do(self, program: Program, step: Step, method: Method, key: str) -> dict[str, Any]:
        bench = self.bench
        context = replace(bench.context, workdir=bench.store.workdir(key))
        context.progress.say(f"{step.method}: {_options(step)}")
        began = time.perf_counter()
        outcome = method.apply(program, Sites.of(step.sites), context)
        seconds = time.perf_counter() - began
        reason = "" if bench.judge is None else bench.judge(program, outcome.program)
        if reason:
            context.progress.say(f"{step.method} undone: {reason}")
        data = {
            "kept": not reason,
            "reason": reason,
            "seconds": seconds,
            "after": _figures(outcome.program, key, bench),
            "options": plain(_resolved(step, outcome)),
            "notes": list(outcome.notes),
            "figures": plain(outcome.figures),
            "changes": changes_to_json(outcome.changes),
        }
        if not reason:
            bench.store.put_program(key, outcome.program)
        bench.store.put(key, data)  # last: what has this file is complete
        return data


def _judged(bench: Bench) -> str:
    return "" if bench.judge is None else repr(bench.judge)


def _options(step: Step) -> str:
    return ", ".join(f"{key}={value}" for key, value in step.options.items()) or "default options"


def _resolved(step: Step, outcome: Outcome) -> Mapping[str, Any]:
    return {**step.options, **outcome.resolved}


def _figures(program: Program, key: str, bench: Bench) -> dict[str, float]:
    """MACs, parameters, bytes and validation score of a Program."""
    kept = bench.store.get(f"{key}-figures")
    if kept is not None:
        return kept
    total = cost(freeze(program))
    figures: dict[str, float] = {
        "macs": total.macs,
        "parameters": total.params,
        "bytes": total.bytes,
    }
    if bench.score is not None:
        figures["score"] = bench.score(program)
    found = {name: float(value) for name, value in figures.items()}
    bench.store.put(f"{key}-figures", found)
    return found


def compose(first: Changes, second: Changes) -> Changes:
    """What two cuts in a row keep of the original: positions of the first, chosen by the second.

    >>> import torch
    >>> a, b = torch.tensor([0, 2, 5]), torch.tensor([1, 2])
    >>> compose({"w": {0: a}}, {"w": {0: b}})["w"][0].tolist()
    [2, 5]
    """
    total: Changes = {name: dict(dims) for name, dims in first.items()}
    for name, dims in second.items():
        held = total.setdefault(name, {})
        for dim, kept in dims.items():
            held[dim] = held[dim][kept] if dim in held else kept
    return total
