"""`laconic report`: the page of a saved result, made again."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from laconic.cli._app import Debug, verb


@verb
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compress wrote.")],
    debug: Debug = False,
) -> None:
    """Print the tables of a saved result and write its report.html again."""
    del debug
    from laconic.engine.files import staged
    from laconic.engine.result import Result
    from laconic.reports import console as tables
    from laconic.reports import page

    result = Result.read(folder)
    console = Console()
    tables.show(result, console)
    with staged(folder) as stage:
        page.write(result, stage / "report.html")
    console.print(f"wrote {folder / 'report.html'}", highlight=False)
