"""One compression as the command line runs it: written down first, so that it can be resumed."""

import shutil
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from laconic.core.budget import Budget
from laconic.core.errors import BudgetError, LaconicError, StorageError, TaskError
from laconic.core.recipe import Recipe

STATE = ".laconic"
_JOB = "job.json"


class Job(BaseModel):
    """Everything `laconic compress` was asked for.

    Attributes:
        task: the task file, as it was typed.
        task_sha256: hash of the task file; a changed one is another job.
        budget: what may be lost and what is minimised.
        recipe: given steps, or None for the budget loop.
        device: where calibration and training run.
        seed: all random choices are drawn from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    task_sha256: str
    budget: Budget
    recipe: Recipe | None = None
    device: str = "cpu"
    seed: int = 0


def budget_of(**options: Any) -> Budget:
    """A budget from the command line's options.

    Raises:
        BudgetError: a value out of range; names the option.
    """
    try:
        return Budget(**options)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise BudgetError(f"found {first['input']!r}: {first['msg']}", where=option) from error


def read_job(out: Path) -> Job:
    """The job that was begun in a folder.

    Raises:
        StorageError: there is none, it is finished, or it is damaged.
    """
    path = out / STATE / _JOB
    if not path.exists():
        finished = (out / "result.json").exists()
        raise StorageError(
            "is finished: there is nothing to resume" if finished else "holds no job to resume",
            where=str(out),
            hint="laconic report shows it" if finished else "give the --out folder of compress",
        )
    try:
        return Job.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise StorageError("is damaged", where=str(path), hint="start compress again") from error


def run_job(job: Job, out: Path) -> None:
    """Run a job, keep its state under `out` until it is done, write the result, show it.

    Raises:
        LaconicError: whatever stops it; state is kept.
    """
    from dataclasses import replace

    from laconic.api import PAGES
    from laconic.cli._load import captured
    from laconic.cli._progress import Shown
    from laconic.engine.store import write_text
    from laconic.engine.taskfile import read_task_file
    from laconic.planning.compress import Settings, compress
    from laconic.reports import console as tables

    console = Console()
    progress = Shown(console)
    progress.say(f"running {job.task}")
    found = read_task_file(job.task)
    if found.sha256 != job.task_sha256:
        raise TaskError(
            "changed since the job was begun",
            where=job.task,
            hint="start again with compress; what still fits is taken from the state",
        )
    state = out / STATE
    state.mkdir(parents=True, exist_ok=True)
    write_text(state / _JOB, job.model_dump_json(indent=1))
    program = captured(found)
    facts = {"name": Path(job.task).stem, "command": command(), "task file": job.task_sha256[:16]}
    settings = Settings(
        device=job.device, seed=job.seed, workdir=state, progress=progress, facts=facts
    )
    result = replace(
        compress(program, found.task, recipe=job.recipe, budget=job.budget, settings=settings),
        pages=PAGES,
    )
    result.save(out)
    shutil.rmtree(state, ignore_errors=True)
    tables.show(result, console)
    progress.say(f"wrote {out}: " + ", ".join(sorted(p.name for p in out.iterdir() if p.is_file())))


def resumable(out: Path, error: BaseException) -> str:
    """How to go on after what stopped a job; empty where nothing was begun."""
    if not (out / STATE / _JOB).exists():
        return ""
    if isinstance(error, LaconicError) and not isinstance(error, (BudgetError, StorageError)):
        return ""
    return f"what was done is kept; `laconic resume {out}` goes on"


def command() -> str:
    """The command line as it was typed, without the program's folder."""
    return " ".join(["laconic", *sys.argv[1:]])
