"""`laconic resume`: go on with a compression that was stopped."""

from pathlib import Path
from typing import Annotated

import typer

from laconic.cli._app import Debug, verb
from laconic.cli._job import read_job
from laconic.cli.compress import guarded


@verb
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out folder of compress.")],
    debug: Debug = False,
) -> None:
    """Go on with a compression that was stopped; finished steps are not done again."""
    del debug
    guarded(read_job(folder), folder)
