"""Progress on a terminal: bars with time left, and lines worth telling."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from laconic.core.progress import Bar, Progress


class Shown(Progress):
    """Draws nested bars; where there is no terminal, only the lines are printed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Bars | None = None

    @contextmanager
    def task(self, what: str, total: float | None = None) -> Generator[Bar]:
        """Open a bar for the length of a `with` block."""
        outermost = self._bars is None
        if self._bars is None:
            self._bars = _bars(self.console)
            self._bars.start()
        bars = self._bars
        made = bars.add_task(what, total=total, note="")
        try:
            yield _Shown(bars, made)
        finally:
            bars.remove_task(made)
            if outermost:
                bars.stop()
                self._bars = None

    def say(self, text: str) -> None:
        """One line worth telling a person."""
        self.console.print(text, markup=False, highlight=False)


@dataclass
class _Shown:
    bars: Bars
    made: TaskID

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.bars.advance(self.made, steps)
        if note:
            self.bars.update(self.made, note=note)


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
