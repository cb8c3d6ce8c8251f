"""The main job: a model, its task and a budget (or a recipe) in, a measured Result out."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.core.budget import Budget
from laconic.core.errors import DataError, ExportError
from laconic.core.progress import SILENT, Progress
from laconic.core.recipe import Recipe, Step
from laconic.core.task import Task
from laconic.engine import final
from laconic.engine.check import capture_for, check_task
from laconic.engine.deploy import Deployed, Yard
from laconic.engine.layers import layers
from laconic.engine.pays import Pays
from laconic.engine.provenance import data_hashes, provenance
from laconic.engine.result import Candidate, Result
from laconic.engine.run import Bench, Ran, check, run
from laconic.engine.store import Store, key_of
from laconic.methods.base import Context
from laconic.planning import guard
from laconic.planning.candidates import basics, pruned, recovery
from laconic.planning.objective import Objective, choose_runtime
from laconic.planning.search import Search
from laconic.planning.verdict import verdict
from laconic.program.capture import Dynamic
from laconic.program.program import Program
from laconic.training.feed import beginnings

Steps = Recipe | Sequence[Step | Mapping[str, Any]]

_SPLITS = ("train", "calibration", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a job is run.

    Attributes:
        device: where calibration and training run.
        seed: all random choices are drawn from it.
        workdir: where state is kept, so that a stopped job goes on; None keeps it in memory.
        progress: shows what goes on.
        facts: further entries of the provenance (the command, the hash of a task file).
        pages: further files that `Result.save` writes: name → writer.
    """

    device: str = "cpu"
    seed: int = 0
    workdir: Path | None = None
    progress: Progress = SILENT
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    pages: Mapping[str, Callable[[Result, Path], object]] = field(
        default_factory=dict[str, Callable[[Result, Path], object]]
    )


def compress(
    model: nn.Module | Program,
    task: Task,
    *,
    recipe: Steps | None = None,
    budget: Budget | None = None,
    example_inputs: Any = None,
    dynamic: Dynamic = "batch",
    settings: Settings | None = None,
) -> Result:
    """Make a model smaller and faster, and measure what came of it.

    With a recipe its steps are run, and those that do not pay are undone (not those of a resolved
    recipe, whose replay is bit-exact). Without one, recipes are tried from mild to strong and the
    strongest is kept whose drop on validation data is certified to be within the budget. Methods
    see the `train` and `calibration` splits only; `test` is looked at once, at the end.

    Args:
        model: an `nn.Module`, or a Program already captured; left as it is.
        task: data, loss and metric.
        recipe: a list of steps.
        budget: what may be lost and what is minimised; the default is `Budget()`.
        example_inputs: for capture; by default the inputs of the task's first batch.
        dynamic: which dimensions may change, see `capture`.
        settings: device, seed, state, progress.

    Raises:
        CaptureError: the model does not export.
        DataError: data that do not fit, NaN, an empty loader.
        RecipeError: an unknown method or option.
        BudgetError: nothing meets the budget; what was tried stays in the workdir.
    """
    settings, budget = settings or Settings(), budget or Budget()
    steps = None if recipe is None else Recipe.of(recipe)
    if steps is not None:
        check(steps)
    began = time.monotonic()
    with ExitStack() as stack:
        job = _prepare(stack, model, task, budget, (example_inputs, dynamic), settings)
        if steps is None:
            ran, candidates, compressed, refused = job.search()
        else:
            ran, candidates, compressed, refused = job.follow(steps)
        return job.result(ran, candidates, compressed, refused, began)


def _prepare(
    stack: ExitStack,
    model: nn.Module | Program,
    task: Task,
    budget: Budget,
    inputs: tuple[Any, Dynamic],
    settings: Settings,
) -> "_Job":
    progress, device = settings.progress, _device(settings.device)
    if isinstance(model, Program):
        program = model
    else:
        progress.say("capturing the model")
        program = capture_for(model, task, *inputs)
    check_task(program, task)
    folder = settings.workdir
    if folder is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="laconic-")))
    seen = [] if settings.workdir is None else beginnings(getattr(task, s) for s in _SPLITS)
    store = Store(settings.workdir, key_of(seen) if any(seen) else "")
    yard = Yard(
        folder / "files", store, threads=budget.threads, device=device, progress=progress, task=task
    )
    return _Job(program, task, budget, settings, yard, device)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).strip().splitlines() or ["unknown"])[0]
        raise DataError(f"cannot be used: {first}", where=f"device {name!r}") from error
    return device


class _Job:
    """One compression under way."""

    def __init__(
        self,
        program: Program,
        task: Task,
        budget: Budget,
        settings: Settings,
        yard: Yard,
        device: torch.device,
    ) -> None:
        self.program, self.task, self.budget = program, task, budget
        self.settings, self.yard = settings, yard
        self.runtime = choose_runtime(program, budget, yard)
        settings.progress.say(f"measuring the original in {self.runtime}")
        self.objective = Objective(program, self.runtime, budget, yard)
        settings.progress.say(f"original, {self.objective.peer}: {self.objective.baseline}")
        self.context = Context(
            task=replace(task, validation=None, test=None),  # nothing is fitted to them
            original=program,
            seed=settings.seed,
            device=device,
            progress=settings.progress,
            runtime=self.runtime,
            threads=budget.threads,
        )

    def bench(self, *, judged: bool) -> Bench:
        judge = Pays(self.budget.minimize, self.runtime, self.budget.batch, self.yard)
        return Bench(
            context=self.context,
            store=self.yard.store,
            judge=judge if judged else None,
            score=self._score,
        )

    def _score(self, program: Program) -> float:
        scores = self.yard.program_scores(program, self.task, "validation")
        return float(scores.mean()) * self.task.scale

    def search(self) -> tuple[Ran, list[Candidate], Deployed, list[str]]:
        """The budget loop; candidates are whole recipes, so no single step of them is judged."""
        search = Search(self.task, self.budget, self.bench(judged=False), self.yard, self.objective)
        recover = self._recovery()
        chosen = search.run(basics(), lambda kind: pruned(self.program, self.budget, recover, kind))
        return chosen.ran, search.candidates(chosen), chosen.way, search.refused

    def _recovery(self) -> Step | None:
        """Kept in the store: a resumed job has to ask for the very same steps."""
        key = key_of(self.yard.key(self.program), self.budget.minutes, "recovery")
        held = self.yard.store.get(key)
        if held is None:
            step = recovery(self.program, self.task, self.budget)
            held = {"step": None if step is None else step.to_plain()}
            self.yard.store.put(key, held)
        return None if held["step"] is None else Step.from_plain(held["step"], "recovery")

    def follow(self, recipe: Recipe) -> tuple[Ran, list[Candidate], Deployed, list[str]]:
        """A given recipe."""
        ran = run(self.program, recipe, self.bench(judged=not recipe.resolved))
        ways = self.objective.ways(ran.program)
        if not ways:
            raise ExportError("cannot run what the recipe made", where=self.runtime)
        original = self.yard.program_scores(self.program, self.task, "validation")
        scores = self.yard.scores(ways[0], self.task, "validation")
        drop = guard.drop(original, scores, self.task, self.budget)
        held = Candidate(
            name=recipe.name,
            recipe=ran.recipe,
            drop=drop,
            objective=self.objective.measure(ways[0]),
            accepted=guard.within(drop, self.budget),
            chosen=True,
            reason=guard.reason(drop, self.task, self.budget),
            seconds=sum(step.seconds for step in ran.steps),
        )
        return ran, [held], ways[0], []

    def result(
        self,
        ran: Ran,
        candidates: Sequence[Candidate],
        compressed: Deployed,
        refused: Sequence[str],
        began: float,
    ) -> Result:
        self.settings.progress.say("measuring original and compressed side by side")
        figures = final.measure(
            self.objective.peer, compressed, self.task, self.yard, self.budget.batch
        )
        notes = [f"{step.method}: {note}" for step in ran.steps for note in step.notes]
        made = Result(
            program=ran.program,
            original=self.program,
            recipe=ran.recipe,
            changes=ran.changes,
            measurements=figures.measurements,
            parity=figures.parity,
            steps=ran.steps,
            candidates=candidates,
            layers=layers(self.program, ran.program),
            refused=[*self.program.lost, *refused, *figures.refused, *notes],
            provenance=self._provenance(began),
            deploy=(compressed.runtime, compressed.precision),
            pages=self.settings.pages,
        )
        return replace(made, verdict=verdict(made, self.budget, self.objective.peer))

    def _provenance(self, began: float) -> dict[str, Any]:
        settings = self.settings
        told = provenance(
            seed=settings.seed, device=self.context.device, threads=self.budget.threads
        )
        budget = {f"budget, {k}": v for k, v in self.budget.model_dump().items() if v is not None}
        return {
            **settings.facts,
            **told,
            **budget,
            "original": self.yard.key(self.program),
            **data_hashes(self.task),
            "seconds": round(time.monotonic() - began, 1),
        }
