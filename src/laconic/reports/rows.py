"""Pairs of measurements, original beside compressed, ready to be shown."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from laconic.core.measurement import Measurement
from laconic.engine.result import Result

_ORDER = ("accuracy", "score", "latency", "size", "macs", "parameters", "memory")
_TELLING = ("runtime", "precision", "batch", "threads", "split", "file")
_HIGHER = {"accuracy", "score", "cosine"}


@dataclass(frozen=True)
class Row:
    """One quantity before and after.

    Attributes:
        name: what was measured.
        where: the conditions that tell it from others of the name, in words.
        before: the original's, or None.
        after: the compressed one's, or None.
        conditions: the telling conditions.
    """

    name: str
    where: str
    before: Measurement | None
    after: Measurement | None
    conditions: Mapping[str, Any]

    @property
    def ratio(self) -> float | None:
        """How many times less the compressed one needs; None for scores and for lone values."""
        if self.before is None or self.after is None or self.name in _HIGHER:
            return None
        if not self.after.value or self.before.unit in ("%", "nats/token", ""):
            return None
        return self.before.value / self.after.value


def rows(result: Result) -> list[Row]:
    """All measurements of a result in pairs, in reading order."""
    sides = [_keyed(result.measurements.get(side, ())) for side in ("original", "compressed")]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    made = [
        Row(key[0], _words(dict(key[1])), sides[0].get(key), sides[1].get(key), dict(key[1]))
        for key in keys
    ]
    return sorted(made, key=lambda row: (_rank(row.name), row.where))


def best_latency(result: Result) -> list[Row]:
    """Per runtime and batch: each side at the precision that is fastest for it."""
    every = [row for row in rows(result) if row.name == "latency"]
    places = dict.fromkeys((r.conditions.get("runtime"), r.conditions.get("batch")) for r in every)
    made: list[Row] = []
    for runtime, batch in places:
        here = [
            r
            for r in every
            if (r.conditions.get("runtime"), r.conditions.get("batch")) == (runtime, batch)
        ]
        before = _fastest(r.before for r in here)
        after = _fastest(r.after for r in here)
        words = f"{runtime}, batch {batch}, best precision"
        made.append(Row("latency", words, before, after, {"runtime": runtime, "batch": batch}))
    return made


def text(measurement: Measurement | None) -> str:
    """A value with its spread, in a unit a person reads."""
    if measurement is None:
        return "–"
    value, unit = humane(measurement.value, measurement.unit)
    shown = f"{value} {unit}".strip()
    precision = measurement.conditions.get("precision")
    if measurement.low is not None and measurement.high is not None:
        low = humane(measurement.low, measurement.unit, unit)[0]
        high = humane(measurement.high, measurement.unit, unit)[0]
        shown += f" [{low}–{high}]"
    return f"{shown} {precision}" if measurement.name == "latency" and precision else shown


def humane(value: float, unit: str, like: str | None = None) -> tuple[str, str]:
    """Digits and unit for people: 1,234,567 B is 1.23 MB."""
    if unit in ("B", "MAC", "") and value == int(value) or unit in ("B", "MAC"):
        for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            fits = like == prefix + unit if like is not None else abs(value) >= factor
            if fits:
                return _digits(value / factor), prefix + unit
        return f"{value:,.0f}", unit
    return (f"{value:.2f}" if unit == "%" else _digits(value)), unit


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _fastest(measurements: Iterable[Measurement | None]) -> Measurement | None:
    present = [m for m in measurements if m is not None]
    return min(present, key=lambda m: m.value) if present else None


def _keyed(
    measurements: Iterable[Measurement],
) -> dict[tuple[str, tuple[tuple[str, Any], ...]], Measurement]:
    return {
        (m.name, tuple((k, m.conditions[k]) for k in _TELLING if k in m.conditions)): m
        for m in measurements
    }


def _words(conditions: Mapping[str, Any]) -> str:
    parts = [
        f"{key} {value}" if key in ("batch", "threads") else str(value)
        for key, value in conditions.items()
        if key != "threads"
    ]
    return ", ".join(parts)


def _rank(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)
