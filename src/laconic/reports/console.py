"""Tables for a terminal."""

from rich.console import Console
from rich.table import Table

from laconic.engine.result import Result
from laconic.reports.rows import Row, best_latency, rows, text


def before_after(result: Result) -> Table:
    """One row per measured quantity: original, compressed, ratio.

    Latency stands once per runtime and batch, each side at its fastest precision.
    """
    table = Table(title="before and after", title_justify="left", header_style="bold")
    table.add_column("what")
    table.add_column("conditions", style="dim")
    for side in ("original", "compressed"):
        table.add_column(side, justify="right")
    table.add_column("gain", justify="right")
    for row in shown_rows(result):
        table.add_row(row.name, row.where, text(row.before), text(row.after), gain(row))
    return table


def shown_rows(result: Result) -> list[Row]:
    """The rows of the before/after table."""
    others = [row for row in rows(result) if row.name != "latency"]
    scores = [row for row in others if row.ratio is None]
    rest = [row for row in others if row.ratio is not None]
    return [*scores, *best_latency(result), *rest]


def gain(row: Row) -> str:
    """How many times less, or how many points more or less."""
    if row.ratio is not None:
        return f"{row.ratio:.2f}x"
    if row.before is None or row.after is None:
        return ""
    return f"{row.after.value - row.before.value:+.2f}"


def steps(result: Result) -> Table:
    """What each step did and cost."""
    table = Table(title="steps", title_justify="left", header_style="bold")
    for name in ("step", "MACs", "bytes", "score", "seconds", "kept"):
        table.add_column(name, justify="left" if name in ("step", "kept") else "right")
    for step in result.steps:
        table.add_row(
            step.method,
            _change(step.before, step.after, "macs"),
            _change(step.before, step.after, "bytes"),
            _change(step.before, step.after, "score"),
            f"{step.seconds:.1f}",
            "yes" if step.kept else f"no: {step.reason}",
        )
    return table


def show(result: Result, console: Console) -> None:
    """Print the tables and the verdict."""
    console.print(before_after(result))
    if result.steps:
        console.print(steps(result))
    for line in result.refused:
        console.print(f"[yellow]refused[/] {line}")
    console.print(f"[bold]{result.verdict}[/]")


def _change(before: object, after: object, key: str) -> str:
    old = before.get(key) if isinstance(before, dict) else None
    new = after.get(key) if isinstance(after, dict) else None
    if old is None or new is None:
        return "–"
    return f"{old:,.4g} → {new:,.4g}"
