"""`laconic measure`: artifacts side by side, taking turns in one run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from laconic.cli._app import Batch, Debug, Threads, verb

if TYPE_CHECKING:
    from laconic.engine.artifact import Artifact


@verb
def measure(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help=".laconic, .onnx, .xml or .pt2 files.")
    ],
    batch: Batch = 1,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32, bf16 or int8; repeatable. All that a file has, if not given."),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="For .onnx files: onnxruntime, openvino; repeatable."),
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--input", metavar="INPUT.npz", help="Real inputs; else noise.")
    ] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Time files against each other and compare what they give; the first one is the baseline."""
    del debug
    from laconic.cli._progress import Shown
    from laconic.cli.run import read_arrays
    from laconic.engine import artifact as artifacts
    from laconic.measuring import latency

    console = Console()
    given = None if inputs is None else read_arrays(inputs)
    opened: dict[str, Artifact] = {}
    feeds: dict[str, Any] = {}
    for path in files:
        declared = given or artifacts.declared_inputs(path, batch)
        for label, held in artifacts.every_way(path, declared, runtime, precision, threads):
            opened[label], feeds[label] = held, artifacts.arrange(declared, held)
    calls = {
        label: (lambda held=held, feed=feeds[label]: held.run(feed))
        for label, held in opened.items()
    }
    found = latency.compare(calls, baseline=next(iter(calls)), progress=Shown(console))
    console.print(_table(opened, feeds, found))


def _table(opened: Mapping[str, "Artifact"], feeds: Mapping[str, Any], found: Any) -> Table:
    from laconic.engine.artifact import cosine, shipped_bytes

    table = Table(title="side by side, in turns", title_justify="left")
    for column in ("file", "runtime", "batch", "bytes", "latency", "speed-up", "cosine to first"):
        table.add_column(column, justify="left" if column in ("file", "runtime") else "right")
    first: Any = None
    for label, held in opened.items():
        output = held.run(feeds[label])[0]
        first = output if first is None else first
        time = found.latency[label]
        table.add_row(
            held.path.name,
            f"{held.conditions['runtime']} {held.conditions['precision']}",
            str(len(feeds[label][0])),
            f"{shipped_bytes(held.path):,}",
            f"{time.value:.4g} ms [{time.low:.3g}, {time.high:.3g}]",
            f"{found.ratio[label].value:.2f}x",
            cosine(first, output),
        )
    return table
