"""Several candidates side by side: a table and a chart in one self-contained page.

For figures that are no `Result` of one job: scores, methods or settings on one model. The chart is
drawn as SVG, so that the page is a few kilobytes and needs no script.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from laconic.reports._page import COLOURS, escaped, page

_LEFT, _WIDTH, _RIGHT, _BAR, _GAP = 190, 700, 90, 11, 10


@dataclass(frozen=True)
class Entry:
    """One candidate.

    Attributes:
        name: what it is called.
        values: series → its value; a series it lacks is left out.
        spread: series → lowest and highest value, where it was run several times.
        note: what is to be said about it.
        good: whether the note is good news; None is neither.
    """

    name: str
    values: Mapping[str, float]
    spread: Mapping[str, tuple[float, float]] = field(
        default_factory=dict[str, tuple[float, float]]
    )
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """What the page shows.

    Attributes:
        title: of the page.
        verdict: one sentence under it.
        series: names of the columns, in order.
        unit: of all values.
        entries: in the order in which they are shown.
        remarks: sentences about how it was measured.
        highest: right end of the chart; None takes the largest value.
    """

    title: str
    verdict: str
    series: Sequence[str]
    unit: str
    entries: Sequence[Entry]
    remarks: Sequence[str] = ()
    highest: float | None = None


def write(comparison: Comparison, path: str | Path) -> Path:
    """Write the page; returns its path."""
    target = Path(path)
    target.write_text(render(comparison), encoding="utf-8")
    return target


def render(comparison: Comparison) -> str:
    """The page as text."""
    parts = {"Chart": _chart(comparison), "Table": _table(comparison)}
    return page(comparison.title, comparison.verdict, parts, comparison.remarks)


def _table(comparison: Comparison) -> str:
    head = "".join(f"<th class=n>{escaped(name)} ({escaped(comparison.unit)})</th>"
                   for name in comparison.series)  # fmt: skip
    lines = "".join(
        f"<tr><td><b>{escaped(entry.name)}</b></td>"
        + "".join(f"<td class=n>{escaped(_shown(entry, name))}</td>" for name in comparison.series)
        + f"<td{' class=no' if entry.good is False else ''}>{escaped(entry.note)}</td></tr>"
        for entry in comparison.entries
    )
    return f"<table><thead><tr><th></th>{head}<th></th></tr></thead><tbody>{lines}</tbody></table>"


def _shown(entry: Entry, series: str) -> str:
    if series not in entry.values:
        return "–"
    low, high = entry.spread.get(series, (None, None))
    spread = "" if low is None or high is None else f" [{low:.2f}–{high:.2f}]"
    return f"{entry.values[series]:.2f}{spread}"


def _chart(comparison: Comparison) -> str:
    """Horizontal bars, one for each series of each entry; a line spans several runs."""
    held = [value for entry in comparison.entries for value in entry.values.values()]
    top = comparison.highest or max([*held, 1e-12])
    block = len(comparison.series) * _BAR + _GAP
    height = 34 + block * len(comparison.entries)
    shapes = [_legend(comparison.series)]
    for row, entry in enumerate(comparison.entries):
        y = 30 + row * block
        middle = y + (block - _GAP) / 2 + 4
        shapes.append(f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end">'
                      f"{escaped(entry.name)}</text>")  # fmt: skip
        for place, series in enumerate(comparison.series):
            if series in entry.values:
                colour = COLOURS[place % len(COLOURS)]
                shapes.append(_bar(entry, series, y + place * _BAR, top, colour))
    box = f"0 0 {_LEFT + _WIDTH + _RIGHT} {height}"
    label = escaped(comparison.title)
    font = 'font-family="system-ui,sans-serif" font-size="12"'
    head = f'<svg viewBox="{box}" width="100%" role="img" aria-label="{label}" {font}>'
    return f"{head}{''.join(shapes)}</svg>"


def _bar(entry: Entry, series: str, y: float, top: float, colour: str) -> str:
    def at(value: float) -> float:
        return _LEFT + _WIDTH * min(max(value / top, 0.0), 1.0)

    value = entry.values[series]
    low, high = entry.spread.get(series, (value, value))
    shown = escaped(_shown(entry, series))
    title = f"<title>{escaped(entry.name)}, {escaped(series)}: {shown}</title>"
    made = (f'<rect x="{_LEFT}" y="{y}" width="{at(value) - _LEFT:.1f}" height="{_BAR - 2}" '
            f'fill="{colour}">{title}</rect>')  # fmt: skip
    if high > low:
        made += (f'<line x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{y + 4.5}" y2="{y + 4.5}" '
                 'stroke="#1c2430" stroke-width="1.5"/>')  # fmt: skip
    end = max(at(value), at(high)) + 4
    return made + f'<text x="{end:.1f}" y="{y + 8.5}" font-size="9">{value:.1f}</text>'


def _legend(series: Sequence[str]) -> str:
    made, x = "", float(_LEFT)
    for place, name in enumerate(series):
        colour = COLOURS[place % len(COLOURS)]
        made += f'<rect x="{x}" y="4" width="12" height="12" fill="{colour}"/>'
        made += f'<text x="{x + 16}" y="14">{escaped(name)}</text>'
        x += 36 + 7 * len(name)
    return made
