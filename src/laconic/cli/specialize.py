"""`laconic specialize`: compile a model for the shapes it will see."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from laconic.cli._app import Debug, Member, Out, Threads, runtime_name, verb
from laconic.core.errors import DataError

if TYPE_CHECKING:
    from laconic.engine.dispatch import Dispatcher


@verb
def specialize(
    file: Annotated[Path, typer.Argument(help="A .laconic file, or a task file.")],
    lengths: Annotated[
        str,
        typer.Option(
            metavar="FILE|1,16,32",
            help="A sample of what will come: a file with one size a line, or a list. With more "
            "than one dimension: 8x224x224, in the order of the inputs.",
        ),
    ],
    runtime: Annotated[str, typer.Option(help="openvino, inductor or onnxruntime.")] = "openvino",
    out: Out = Path("buckets"),
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or int8; int8 where FILE is quantised.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Sizes to compile for, at most.")] = 8,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch sizes to compile for; repeatable.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Compiling has to pay within so many requests.")
    ] = None,
    ahead: Annotated[
        bool, typer.Option(help="Keep OpenVINO's compiled code, a small file a size.")
    ] = True,
    model: Member = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Choose sizes to compile for, write the files, check them against the Program, time them."""
    del debug
    from laconic.api import specialize as specialized
    from laconic.cli._load import member_of, program_of
    from laconic.cli._progress import Shown

    name = runtime_name(runtime, auto=False)
    sample = read_sizes(lengths)
    console = Console()
    made = specialized(
        member_of(program_of(file), model), sample, out=out, runtime=name, precision=precision,
        count=count, batches=batch, requests=requests, ahead=ahead, threads=threads,
        progress=Shown(console),
    )  # fmt: skip
    console.print(_table(made))
    for note in made.held.notes:
        console.print(note, highlight=False, markup=False)
    for path in made.held.files():
        typer.echo(f"wrote {path} ({path.stat().st_size:,} bytes)")


def read_sizes(text: str) -> list[list[int]]:
    """The sizes in a list, or in a file with one entry a line.

    Raises:
        DataError: an entry is no size; names the line.
    """
    path = Path(text)
    place, entries = "--lengths", text.split(",")
    if path.is_file():
        place, entries = text, path.read_text(encoding="utf-8").splitlines()
    found: list[list[int]] = []
    for number, entry in enumerate(entries, 1):
        if not entry.strip():
            continue
        try:
            found.append([int(size) for size in entry.strip().split("x")])
        except ValueError:
            raise DataError(
                f"entry {number} is {entry.strip()!r}, expected a size such as 16 or 8x224x224",
                where=place,
                hint="an existing file with one entry a line, or a list",
            ) from None
    return found


def _table(made: "Dispatcher") -> Table:
    from laconic.engine.buckets import elements

    held = made.held
    free = held.open_cost()
    table = Table(title=f"{held.runtime} {held.precision}", title_justify="left")
    for column in ("compiled for", "latency", "in any shape", "compiling"):
        table.add_column(column, justify="left" if column == "compiled for" else "right")
    for bucket in held.buckets:
        anyway = free(elements(bucket.sizes))
        table.add_row(
            bucket.name, f"{bucket.ms:.3g} ms", f"{anyway:.3g} ms", f"{bucket.seconds:.2g} s"
        )
    table.add_row("any shape", "", "", "")
    return table
