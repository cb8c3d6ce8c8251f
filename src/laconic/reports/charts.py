"""Plotly figures of a result; each is a plain dict of data and layout."""

from typing import Any

from laconic.engine.result import Result
from laconic.reports.rows import rows

BEFORE, AFTER, ACCENT = "#8a94a6", "#0f8b8d", "#c8553d"


def _layout(title: str, **more: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "title": {"text": title, "x": 0, "xanchor": "left", "font": {"size": 15}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 60, "r": 20, "t": 48, "b": 48},
        "legend": {"orientation": "h", "y": 1.12, "x": 1, "xanchor": "right"},
        "hoverlabel": {"namelength": -1},
    }
    return plain | more


def latency(result: Result) -> dict[str, Any] | None:
    """Latency with spread per runtime, precision and batch; None without measurements."""
    every = [row for row in rows(result) if row.name == "latency"]
    if not every:
        return None
    data: list[dict[str, Any]] = []
    for side, colour in (("before", BEFORE), ("after", AFTER)):
        held = [(row.where, getattr(row, side)) for row in every]
        held = [(where, m) for where, m in held if m is not None]
        data.append(
            {
                "type": "bar",
                "name": "original" if side == "before" else "compressed",
                "x": [where for where, _ in held],
                "y": [m.value for _, m in held],
                "marker": {"color": colour},
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [max(0.0, (m.high or m.value) - m.value) for _, m in held],
                    "arrayminus": [max(0.0, m.value - (m.low or m.value)) for _, m in held],
                    "color": "#444",
                    "thickness": 1,
                },
                "hovertemplate": "%{x}<br>%{y:.4g} ms<extra>%{fullData.name}</extra>",
            }
        )
    layout = _layout(
        "Latency, median and spread of the turns (log scale)",
        barmode="group",
        yaxis={"title": {"text": "ms"}, "type": "log", "gridcolor": "#ddd"},
        xaxis={"tickangle": -25, "automargin": True},
        height=420,
    )
    return {"data": data, "layout": layout}


def layers(result: Result, what: str) -> dict[str, Any] | None:
    """MACs or bytes per layer, original beside compressed; `what` is "macs" or "bytes"."""
    held = [layer for layer in result.layers if getattr(layer, f"{what}_before")]
    if not held:
        return None
    names = [layer.name for layer in held]
    data = [
        {
            "type": "bar",
            "name": name,
            "x": names,
            "y": [getattr(layer, f"{what}_{when}") for layer in held],
            "marker": {"color": colour},
            "hovertemplate": "%{x}<br>%{y:,.4g}<extra>%{fullData.name}</extra>",
        }
        for name, when, colour in (("original", "before", BEFORE), ("compressed", "after", AFTER))
    ]
    title = {"macs": "Multiply-accumulates per layer", "bytes": "Weight bytes per layer"}[what]
    layout = _layout(
        title,
        barmode="group",
        yaxis={"gridcolor": "#ddd"},
        xaxis={"showticklabels": len(names) <= 40, "tickangle": -45, "automargin": True},
        height=380,
    )
    return {"data": data, "layout": layout}


def candidates(result: Result) -> dict[str, Any] | None:
    """Every recipe that was tried: measured drop against what is minimised."""
    tried = result.candidates
    if not tried:
        return None
    kinds = (
        ("chosen", lambda c: c.chosen, ACCENT, "star", 16),
        ("within budget", lambda c: c.accepted and not c.chosen, AFTER, "circle", 10),
        ("beyond budget", lambda c: not c.accepted, BEFORE, "x", 9),
    )
    data: list[dict[str, Any]] = []
    for name, test, colour, symbol, size in kinds:
        held = [c for c in tried if test(c)]
        if not held:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [c.objective.value for c in held],
                "y": [c.drop.value for c in held],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [
                        max(
                            0.0,
                            (c.drop.value if c.drop.high is None else c.drop.high) - c.drop.value,
                        )
                        for c in held
                    ],
                    "arrayminus": [0.0] * len(held),
                    "thickness": 1,
                },
                "text": [f"{c.name}: {c.reason}" for c in held],
                "marker": {"color": colour, "symbol": symbol, "size": size},
                "hovertemplate": "%{text}<br>%{x:.4g}, drop %{y:.3f}<extra></extra>",
            }
        )
    first = tried[0]
    layout = _layout(
        "Recipes tried: drop on validation (bar: upper bound) against the objective",
        xaxis={"title": {"text": f"{first.objective.name} ({first.objective.unit})"}},
        yaxis={"title": {"text": f"drop ({first.drop.unit})"}, "gridcolor": "#ddd"},
        height=420,
    )
    return {"data": data, "layout": layout}
