"""One self-contained HTML page: no network, no server, opens anywhere."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from laconic.engine.result import Result
from laconic.reports import charts
from laconic.reports.console import gain, shown_rows
from laconic.reports.rows import best_latency, humane, rows, text

_ROWS = 50  # of a history


def write(result: Result, path: str | Path) -> Path:
    """Write the page of a result; returns its path.

    The page holds Plotly's script (about 5 MB), so that charts can be hovered offline.
    """
    from plotly.offline import get_plotlyjs  # noqa: PLC0415 - five megabytes, only needed here

    target = Path(path)
    target.write_text(render(result, get_plotlyjs()), encoding="utf-8")
    return target


def render(result: Result, script: str) -> str:
    """The page as text; `script` is Plotly's."""
    figures = {
        "chart-latency": charts.latency(result),
        "chart-candidates": charts.candidates(result),
        "chart-macs": charts.layers(result, "macs"),
        "chart-bytes": charts.layers(result, "bytes"),
    }
    held = {name: figure for name, figure in figures.items() if figure}
    body = "".join(
        (
            _head(result),
            _cards(result),
            _section("Before and after", _before_after(result)),
            _section("Latency", _places(held, "chart-latency"), when="chart-latency" in held),
            _section(
                "Recipes tried",
                _places(held, "chart-candidates") + _candidates(result),
                when=bool(result.candidates),
            ),
            _section("What each step did and cost", _steps(result), when=bool(result.steps)),
            _section(
                "Layer by layer",
                _places(held, "chart-macs", "chart-bytes") + _layers(result),
                when=bool(result.layers),
            ),
            _section("Exports against the Program", _parity(result), when=bool(result.parity)),
            _section("Refused, and why", _list(result.refused), when=bool(result.refused)),
            _section("Provenance", _provenance(result)),
        )
    )
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    data = json.dumps(held).replace("<", "\\u003c")
    draw = (
        f"const figures = {data};"
        "for (const [id, f] of Object.entries(figures))"
        " Plotly.newPlot(id, f.data, f.layout, {responsive: true, displaylogo: false});"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>Laconic report</title><style>{style}</style>"
        f"<script>{script}</script></head><body><main>{body}</main>"
        f"<script>{draw}</script></body></html>"
    )


def _e(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, body: str, *, when: bool = True) -> str:
    return f"<section><h2>{_e(title)}</h2>{body}</section>" if when else ""


def _places(held: Mapping[str, Any], *names: str) -> str:
    return "".join(f'<div id="{name}"></div>' for name in names if name in held)


def _table(head: Sequence[str], body: Iterable[Sequence[str]], numbers: set[int]) -> str:
    def cell(tag: str, index: int, value: str) -> str:
        return f"<{tag}{' class=n' if index in numbers else ''}>{value}</{tag}>"

    top = "".join(cell("th", i, _e(v)) for i, v in enumerate(head))
    lines = (
        "<tr>" + "".join(cell("td", i, v) for i, v in enumerate(line)) + "</tr>" for line in body
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_e(line)}</li>" for line in lines) + "</ul>"


def _head(result: Result) -> str:
    name = result.provenance.get("name", "model")
    return f'<h1>Laconic report: {_e(name)}</h1><p class="verdict">{_e(result.verdict)}</p>'


def _cards(result: Result) -> str:
    cards: list[tuple[str, str]] = []
    every = rows(result)
    for row in every:
        if row.name in ("accuracy", "score") and row.before and row.after:
            unit = row.after.unit
            cards.append(
                (f"{row.after.value - row.before.value:+.2f} {unit}", f"{row.name}, {row.where}")
            )
    faster = [row for row in best_latency(result) if row.ratio]
    cards += [(f"{row.ratio:.2f}x faster", row.where) for row in faster]
    wanted = ("size", "macs", "parameters")
    for row in every:
        if row.name in wanted and row.ratio:
            words = {"size": "smaller", "macs": "fewer MACs", "parameters": "fewer parameters"}
            cards.append((f"{row.ratio:.2f}x {words[row.name]}", row.where or row.name))
    shown = "".join(
        f'<div class="card"><b>{_e(big)}</b><span>{_e(small)}</span></div>'
        for big, small in cards[:8]
    )
    return f'<div class="cards">{shown}</div>' if shown else ""


def _before_after(result: Result) -> str:
    body = [
        (
            _e(r.name),
            f'<span class="dim">{_e(r.where)}</span>',
            _e(text(r.before)),
            _e(text(r.after)),
            _e(gain(r)),
        )
        for r in shown_rows(result)
    ]
    return _table(("what", "conditions", "original", "compressed", "gain"), body, {2, 3, 4})


def _candidates(result: Result) -> str:
    lines: list[str] = []
    for c in result.candidates:
        mark = "chosen" if c.chosen else ""
        upper = "" if c.drop.high is None else f" (at most {c.drop.high:.3g})"
        verdict = _e(c.reason) if c.accepted else f'<span class="no">{_e(c.reason)}</span>'
        lines.append(
            f'<tr class="{mark}"><td>{_e(c.name)}</td>'
            f'<td class="n">{_e(f"{c.drop.value:.3g} {c.drop.unit}{upper}")}</td>'
            f'<td class="n">{_e(text(c.objective))}</td><td class="n">{c.seconds:.1f} s</td>'
            f"<td>{verdict}</td></tr>"
        )
    head = (
        "<thead><tr><th>recipe</th><th class=n>drop on validation</th><th class=n>objective</th>"
        "<th class=n>took</th><th>verdict</th></tr></thead>"
    )
    return f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"


def _steps(result: Result) -> str:
    def change(step: Any, key: str, unit: str) -> str:
        old, new = step.before.get(key), step.after.get(key)
        if old is None or new is None:
            return "–"
        return _e(f"{' '.join(humane(old, unit)).strip()} → {' '.join(humane(new, unit)).strip()}")

    body: list[tuple[str, ...]] = []
    for step in result.steps:
        notes = (_list(step.notes) if step.notes else "") + _figures(step.figures)
        options = ", ".join(f"{k}={_short(v)}" for k, v in step.options.items())
        kept = "kept" if step.kept else f'<span class="no">undone: {_e(step.reason)}</span>'
        body.append(
            (
                f'<b>{_e(step.method)}</b><br><span class="dim">{_e(options)}</span>{notes}',
                change(step, "macs", "MAC"),
                change(step, "bytes", "B"),
                change(step, "score", "%"),
                f"{step.seconds:.1f} s",
                kept,
            )
        )
    return _table(("step", "MACs", "bytes", "score", "took", ""), body, {1, 2, 3, 4})


def _figures(held: Mapping[str, Any]) -> str:
    """A method's own numbers, folded: scores, bounds and states kept; histories as tables."""
    tables = {key: value for key, value in held.items() if _is_table(value)}
    lines = [f"{key}: {_short(_number(held[key]))}" for key in held if key not in tables]
    shown = _list(lines) if lines else ""
    for key, value in tables.items():
        head = list(dict.fromkeys(column for row in value for column in row))
        body = [
            tuple(_e(_short(_number(row.get(column, "–")))) for column in head)
            for row in value[:_ROWS]
        ]
        more = f", the first {_ROWS} of {len(value)}" if len(value) > _ROWS else ""
        shown += f'<span class="dim">{_e(key + more)}</span>'
        shown += _table(head, body, set(range(len(head))))
    return f"<details><summary>figures</summary>{shown}</details>" if shown else ""


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _short(value: object) -> str:
    shown = str(value)
    return shown if len(shown) <= 60 else shown[:57] + "…"


def _layers(result: Result) -> str:
    body = [
        (
            f"<code>{_e(layer.name)}</code>",
            _e(layer.operator),
            _e("×".join(map(str, layer.shape_before))),
            _e("gone" if layer.shape_after is None else "×".join(map(str, layer.shape_after))),
            _e(" ".join(humane(layer.macs_before, "MAC"))),
            _e(" ".join(humane(layer.macs_after, "MAC"))),
            _e(" ".join(humane(layer.bytes_before, "B"))),
            _e(" ".join(humane(layer.bytes_after, "B"))),
            _e(layer.form),
        )
        for layer in result.layers
    ]
    head = ("layer", "operator", "shape", "shape now", "MACs", "now", "bytes", "now", "form")
    table = _table(head, body, {4, 5, 6, 7})
    return f"<details><summary>All {len(body)} layers as a table</summary>{table}</details>"


def _parity(result: Result) -> str:
    keys = list(dict.fromkeys(k for held in result.parity.values() for k in held))
    body = [
        (f"<code>{_e(name)}</code>", *(_e(_number(held.get(key, "–"))) for key in keys))
        for name, held in result.parity.items()
    ]
    return _table(("artifact", *keys), body, set(range(1, len(keys) + 1)))


def _number(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_number(item) for item in cast("Sequence[Any]", value))
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _provenance(result: Result) -> str:
    body = [
        (_e(key), f"<code>{_e(_number(value))}</code>") for key, value in result.provenance.items()
    ]
    recipe = f"<pre>{_e(result.recipe.to_yaml())}</pre>"
    folded = f"<details><summary>Resolved recipe (YAML)</summary>{recipe}</details>"
    return _table(("what", "value"), body, set()) + folded
