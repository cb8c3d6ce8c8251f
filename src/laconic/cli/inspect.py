"""`laconic inspect`: the layers of a model, what each costs and how long each takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from laconic.cli._app import Batch, Debug, Engine, Threads, runtime_name, verb

if TYPE_CHECKING:
    from laconic.program.cost import NodeCost
    from laconic.program.program import Program


@verb
def inspect(
    file: Annotated[Path, typer.Argument(help="A task file, a .laconic file, or a result folder.")],
    runtime: Engine = "openvino",
    batch: Batch = 1,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or int8; int8 where FILE is quantised.")
    ] = None,
    threads: Threads = None,
    groups: Annotated[bool, typer.Option("--groups", help="Also list what can shrink.")] = False,
    debug: Debug = False,
) -> None:
    """Show every layer: shape, multiply-adds, parameters, bytes, share of the measured time."""
    del debug
    name = runtime_name(runtime)
    name = "openvino" if name == "auto" else name
    if name == "inductor":
        raise typer.BadParameter("inductor reports no times per layer", param_hint="--runtime")
    from laconic import runtimes
    from laconic.cli._load import program_of
    from laconic.engine.files import pick_precision
    from laconic.engine.profile import OTHER, layer_times
    from laconic.program.cost import cost

    console = Console()
    program = program_of(file)
    kind = pick_precision(program, runtimes.get(name), precision)
    times = layer_times(program, name, kind, batch=batch, threads=threads)
    total, spent = cost(program), sum(times.values()) or 1.0
    table = Table(title=f"{file.name}, {name} {kind}, batch {batch}", title_justify="left")
    for column in ("layer", "operator", "weight", "MACs", "parameters", "bytes", "time"):
        table.add_column(column, justify="left" if column in ("layer", "operator") else "right")
    shown = {row.node for row in total.rows if row.macs or row.tensors}
    for row in total.rows:
        if row.node in shown:
            _row(table, row, program, times.get(row.node, 0.0) / spent)
    rest = sum(value for node, value in times.items() if node not in shown and node != OTHER)
    table.add_row("activations, reshapes ...", "", "", "", "", "", _share(rest / spent))
    table.add_row(
        "reorders of the runtime", "", "", "", "", "", _share(times.get(OTHER, 0) / spent)
    )
    table.add_section()
    sums = (f"{total.macs:,}", f"{total.params:,}", f"{total.bytes:,}", f"{spent:.3f} ms")
    table.add_row("total", "", "", *sums)
    console.print(table)
    for operator, nodes in total.unknown.items():
        console.print(f"not counted: {operator} ({len(nodes)} times)", highlight=False)
    for line in program.lost:
        console.print(f"lost in capture: {line}", highlight=False, markup=False)
    if groups:
        _groups(console, program)


def _row(table: Table, row: "NodeCost", program: "Program", share: float) -> None:
    from laconic.engine.layers import short
    from laconic.engine.profile import weight_of

    weight = weight_of(program, row.tensors)
    name = next((t for t in row.tensors if t.endswith("weight")), row.origin or row.node)
    table.add_row(
        escape(name),
        short(row.operator),
        "" if weight is None else "x".join(map(str, weight.shape)),
        f"{row.macs:,}",
        f"{row.params:,}",
        f"{row.bytes:,}",
        _share(share),
    )


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _groups(console: Console, program: "Program") -> None:
    from laconic.program.groups import groups

    found = groups(program)
    table = Table(title="groups of channels", title_justify="left")
    for column in ("group", "size", "tensors", "can shrink"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for group in (*found, *found.frozen):
        tensors = ", ".join(dict.fromkeys(member.tensor for member in group.members))
        table.add_row(
            escape(group.name), str(group.size), escape(tensors), escape(group.frozen or "yes")
        )
    console.print(table)
