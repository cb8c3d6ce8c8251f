"""Run a recipe: steps in order, each kept in the store as soon as it is done.

Whether a step pays shows at the end only (pruning that gains nothing in bf16 can gain a lot under
int8), so steps are judged on the finished recipe: each that changed the operators or their shapes
is left out in turn, last first, and stays out where the rest alone is as good.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from laconic.core.errors import LaconicError, StorageError
from laconic.core.recipe import Recipe, Step
from laconic.engine.result import StepRecord, changes_from_json, changes_to_json, plain
from laconic.engine.store import Store, digests, fingerprint, key_of
from laconic.methods.base import Changes, Context, Method, Outcome, method_of
from laconic.program.cost import cost
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.program.sites import Sites

Score = Callable[[Program], float]


class Judge(Protocol):
    """Says whether a step pays where it counts."""

    def concerns(self, before: Program, after: Program) -> bool:
        """Whether what a step changed is the judge's business."""
        ...

    def __call__(self, without: Program, made: Program) -> str:
        """Why `made` is no better than the recipe without a step; empty where it is better."""
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
        judge: decides which steps are kept; None keeps all.
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
    """Apply a recipe to a Program, which is left as it was; undo what does not pay.

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
    check(recipe)
    start = start or key_of(fingerprint(program), bench.context.seed, str(bench.context.device))
    left, undone = list(range(len(recipe))), dict[int, StepRecord]()
    while True:
        ran, stages = _through(program, recipe, left, bench, start)
        found = _idle(stages, recipe, left, bench, start)
        if found is None:
            break
        at, reason = found
        bench.context.progress.say(f"{recipe.steps[left[at]].method} undone: {reason}")
        undone[left[at]] = replace(ran.steps[at], kept=False, reason=reason)
        del left[at]
    records = {**dict(zip(left, ran.steps, strict=True)), **undone}
    return replace(ran, steps=[records[number] for number in range(len(recipe))])


def _through(
    program: Program, recipe: Recipe, which: Sequence[int], bench: Bench, key: str
) -> tuple[Ran, list[Program]]:
    """The steps `which` of a recipe in a row; also the Program before and after each."""
    stages, changes = [program], Changes()
    records: list[StepRecord] = []
    resolved: list[Step] = []
    state = _State(bench, _figures(program, key, bench))
    for number in which:
        step = recipe.steps[number]
        try:
            method = method_of(step, f"step {number + 1}")
            held = digests(method.files())
            key = key_of(key, step.to_plain(), *([held] if held else []))
            after, record, cut = state.step(stages[-1], step, method, key)
        except LaconicError as error:
            error.add_note(f"in step {number + 1} ({step.method}) of {recipe.name!r}")
            raise
        stages.append(after)
        records.append(record)
        changes = compose(changes, cut)
        resolved.append(Step(method=step.method, sites=step.sites, options=dict(record.options)))
    own = {name for name, _ in program.tensors()}
    ran = Ran(
        program=stages[-1],
        recipe=Recipe(steps=tuple(resolved), name=recipe.name, resolved=True),
        changes={name: dims for name, dims in changes.items() if name in own},
        steps=records,
        key=key,
    )
    return ran, stages


def _idle(
    stages: Sequence[Program], recipe: Recipe, left: Sequence[int], bench: Bench, start: str
) -> tuple[int, str] | None:
    """A step without which the rest is as good, the last such one: (its place, why).

    For the comparison the rest is run without the steps that leave the operators alone, training
    above all: they cost the most and change nothing that is compared.
    """
    judge = bench.judge
    if judge is None:
        return None
    pairs = list(zip(stages, stages[1:], strict=False))
    concerned = [judge.concerns(before, after) for before, after in pairs]
    for at in reversed(range(len(left))):
        if not concerned[at]:
            continue
        rest = [left[i] for i in range(len(left)) if i < at or (i > at and concerned[i])]
        try:
            without = _through(stages[0], recipe, rest, bench, start)[0].program
        except LaconicError:  # a later step needs this one
            continue
        reason = judge(without, stages[-1])
        if reason:
            return at, reason
    return None


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
        after = self.bench.store.program(key, program)
        if after is None:  # the file was cut short: made again
            found = self._do(program, step, method, key)
            after = self.bench.store.program(key, program)
        if after is None:
            raise StorageError("a finished step cannot be read back", where=f"step {step.method}")
        record = StepRecord(
            method=step.method,
            sites=[step.sites] if isinstance(step.sites, str) else list(step.sites),
            kept=True,
            seconds=found["seconds"],
            before=self.figures,
            after=found["after"],
            options=found["options"],
            notes=found["notes"],
            figures=found["figures"],
        )
        self.figures = dict(found["after"])
        return after, record, changes_from_json(found["changes"])

    def _do(self, program: Program, step: Step, method: Method, key: str) -> dict[str, Any]:
        bench = self.bench
        context = replace(bench.context, workdir=bench.store.workdir(key))
        context.progress.say(f"{step.method}: {_options(step)}")
        began = time.perf_counter()
        outcome = method.apply(program, Sites.of(step.sites), context)
        data = {
            "seconds": time.perf_counter() - began,
            "after": _figures(outcome.program, key, bench),
            "options": plain(_resolved(step, outcome)),
            "notes": list(outcome.notes),
            "figures": plain(outcome.figures),
            "changes": changes_to_json(outcome.changes),
        }
        bench.store.put_program(key, outcome.program)
        bench.store.put(key, data)  # last: what has this file is complete
        return data


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
