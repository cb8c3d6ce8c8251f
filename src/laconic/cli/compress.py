"""`laconic compress`: the main job."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from laconic.cli._app import Batch, Debug, Engine, Out, Threads, choice, runtime_name, verb
from laconic.cli._job import Job, budget_of, resumable, run_job
from laconic.core.recipe import Recipe


@verb
def compress(
    task: Annotated[
        Path, typer.Argument(metavar="TASK.py", help="Defines model() and task(); plain Python.")
    ],
    max_drop: Annotated[
        float, typer.Option(help="What may be lost, in the task's unit (points of accuracy).")
    ] = 0.5,
    minimize: Annotated[str, typer.Option(help="latency, size or macs.")] = "latency",
    runtime: Engine = "auto",
    batch: Batch = 1,
    threads: Threads = None,
    minutes: Annotated[
        float | None, typer.Option(help="How long the search may take; as long as it needs.")
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="How sure the promise about the loss has to be.")
    ] = 0.95,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file with the steps; no search then.")
    ] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(help='A step, "METHOD key=value ..."; instead of --recipe, repeatable.'),
    ] = None,
    device: Annotated[str, typer.Option(help="Where training runs: cpu, cuda ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="All random choices are drawn from it.")] = 0,
    out: Out = Path("artifacts"),
    debug: Debug = False,
) -> None:
    """Compress the model of a task file, measure it, and write everything that ships.

    Recipes are tried from mild to strong. The strongest is kept whose loss on validation data is
    certified to be within --max-drop; files, report and recipe go to --out. Ctrl-C keeps what was
    done: laconic resume goes on.
    """
    del debug
    choice(minimize, ("latency", "size", "macs"), "--minimize")
    budget = budget_of(
        max_drop=max_drop,
        confidence=confidence,
        minimize=minimize,
        runtime=runtime_name(runtime),
        batch=batch,
        threads=threads,
        minutes=minutes,
    )
    job = Job(
        task=str(task),
        task_sha256=hashlib.sha256(_read(task)).hexdigest(),
        budget=budget,
        recipe=_recipe(recipe, step or []),
        device=device,
        seed=seed,
    )
    guarded(job, out)


def guarded(job: Job, out: Path) -> None:
    """Run a job; whatever stops it, say how to go on."""
    try:
        run_job(job, out)
    except (Exception, KeyboardInterrupt) as error:
        way_on = resumable(out, error)
        if way_on:
            error.add_note(way_on)
        raise


def _read(task: Path) -> bytes:
    from laconic.core.errors import TaskError

    try:
        return task.read_bytes()
    except OSError as error:
        raise TaskError(
            f"cannot be read: {error.strerror}",
            where=str(task),
            hint="a task file defines model() -> nn.Module and task() -> laconic.Task",
        ) from error


def _recipe(path: Path | None, steps: list[str]) -> Recipe | None:
    from laconic.methods.base import method_of

    if path is not None and steps:
        raise typer.BadParameter("give --recipe or --step, not both")
    if path is None and not steps:
        return None
    made = Recipe.read(path) if path is not None else Recipe.of([_step(text) for text in steps])
    for number, each in enumerate(made, 1):
        method_of(each, f"{path or 'step'}, step {number}" if path else f"step {number}")
    return made


def _step(text: str) -> dict[str, object]:
    """`prune.channels ratio=0.5 sites=layer3.*` as a mapping; values are YAML."""
    import yaml

    name, *options = text.split()
    made: dict[str, object] = {"method": name}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise typer.BadParameter(f"{option!r} is not key=value", param_hint="--step")
        try:
            made[key] = value if key == "sites" else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"{option!r}: {error}", param_hint="--step") from error
    return made
