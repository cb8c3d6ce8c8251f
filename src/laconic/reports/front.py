"""What is gained against what it costs: points of several series in one self-contained page.

For settings of one model, such as bits, on two axes, such as bytes and accuracy. The chart is drawn
as SVG, without a script; points that no other point beats in both are ringed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from laconic.reports._page import COLOURS, escaped, page

_LEFT, _TOP, _WIDTH, _HEIGHT, _FOOT = 64, 52, 820, 380, 44
_TICKS = 7  # at most


@dataclass(frozen=True)
class Point:
    """One setting: what it costs, what it reaches, what it is called."""

    cost: float
    value: float
    name: str


@dataclass(frozen=True)
class Front:
    """What the page shows.

    Attributes:
        title: of the page.
        verdict: one sentence under it.
        cost, value: what the axes mean, with units; costs are to be small, values large.
        series: name → its points.
        remarks: sentences about how it was measured.
        lowest: lower end of the value axis; None: a little below the lowest value.
    """

    title: str
    verdict: str
    cost: str
    value: str
    series: dict[str, Sequence[Point]]
    remarks: Sequence[str] = ()
    lowest: float | None = None


def write(front: Front, path: str | Path) -> Path:
    """Write the page; returns its path."""
    target = Path(path)
    parts = {"Chart": _chart(front), "Table": _table(front)}
    target.write_text(page(front.title, front.verdict, parts, front.remarks), encoding="utf-8")
    return target


def best(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats: none as cheap reaches more, none as good costs less."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.value)):
        if not found or point.value > found[-1].value:
            found.append(point)
    return found


def _table(front: Front) -> str:
    every = [(name, point) for name, points in front.series.items() for point in points]
    ringed = best([point for _, point in every])
    rows = "".join(
        f"<tr><td><b>{escaped(point.name)}</b></td><td>{escaped(name)}</td>"
        f"<td class=n>{point.cost:.4g}</td><td class=n>{point.value:.4g}</td>"
        f"<td>{'on the front' if point in ringed else ''}</td></tr>"
        for name, point in sorted(every, key=lambda held: held[1].cost)
    )
    head = f"<th></th><th></th><th class=n>{escaped(front.cost)}</th>"
    head += f"<th class=n>{escaped(front.value)}</th><th></th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _chart(front: Front) -> str:
    every = [point for points in front.series.values() for point in points]
    if not every:
        return "<p>Nothing measured yet.</p>"
    left, right = min(p.cost for p in every), max(p.cost for p in every)
    bottom = min(p.value for p in every) if front.lowest is None else front.lowest
    top = max(p.value for p in every)
    left, right = left - 0.04 * (right - left or 1), right + 0.04 * (right - left or 1)
    bottom, top = bottom - 0.02 * (top - bottom or 1), top + 0.06 * (top - bottom or 1)

    def at(point: Point) -> tuple[float, float]:
        x = _LEFT + _WIDTH * (point.cost - left) / (right - left)
        up = min(max((point.value - bottom) / (top - bottom), 0.0), 1.0)
        return x, _TOP + _HEIGHT * (1 - up)

    shapes = [_axes(front, (left, right), (bottom, top))]
    ringed, x = best(every), float(_LEFT)
    for place, (name, points) in enumerate(front.series.items()):
        colour = COLOURS[place % len(COLOURS)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(at, sorted(points, key=_by_cost)))
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{colour}" opacity="0.5"/>')
        for point in points:
            a, b = at(point)
            title = f"<title>{escaped(point.name)}: {point.cost:.4g}, {point.value:.4g}</title>"
            ring = ' stroke="#1c2430" stroke-width="2"' if point in ringed else ""
            shapes.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="5" fill="{colour}"{ring}>'
                          f"{title}</circle>")  # fmt: skip
        shapes.append(f'<rect x="{x}" y="4" width="12" height="12" fill="{colour}"/>'
                      f'<text x="{x + 16}" y="14">{escaped(name)}</text>')  # fmt: skip
        x += 36 + 7 * len(name)
    box = f"0 0 {_LEFT + _WIDTH + 20} {_TOP + _HEIGHT + _FOOT}"
    font = 'font-family="system-ui,sans-serif" font-size="12"'
    head = f'<svg viewBox="{box}" width="100%" role="img" aria-label="{escaped(front.title)}"'
    return f"{head} {font}>{''.join(shapes)}</svg>"


def _by_cost(point: Point) -> float:
    return point.cost


def _axes(front: Front, across: tuple[float, float], up: tuple[float, float]) -> str:
    made = ""
    for value in ticks(*up):
        y = _TOP + _HEIGHT * (1 - (value - up[0]) / (up[1] - up[0]))
        made += (
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>'
        )
    for value in ticks(*across):
        x = _LEFT + _WIDTH * (value - across[0]) / (across[1] - across[0])
        made += (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _HEIGHT}" stroke="#eee"/>'
            f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{value:.6g}</text>'
        )
    made += (
        f'<text x="{_LEFT + _WIDTH}" y="{_TOP + _HEIGHT + 36}" text-anchor="end">'
        f'{escaped(front.cost)}</text><text x="{_LEFT}" y="{_TOP - 6}">'
        f"{escaped(front.value)}</text>"
    )
    return made


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, few enough to be read.

    >>> ticks(61.6, 265.4)
    [100.0, 150.0, 200.0, 250.0]
    """
    least = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * part for part in (1, 2, 5, 10) if power * part >= least)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [index * step for index in range(first, last + 1)]
