"""Milliseconds of sub-networks, foretold from a table of layers, checked by timing whole networks.

The table knows each layer at every width (`latency_table`); layers of dropped branches take no
time, a cropped kernel or a smaller input takes its part of the multiply-adds' time. The whole
network and the least member, timed in turns, give the scale between table and clock, which also
takes in what stands between the layers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from laconic.core.progress import SILENT, Progress
from laconic.program import axes
from laconic.solvers.channels.allocate import Choice
from laconic.solvers.search.elastic import Elastic, Order
from laconic.solvers.search.latency_table import Kind, interpolate, measure
from laconic.solvers.search.search_space import Member, Space, named
from laconic.solvers.search.stopwatch import Timer


class Milliseconds:
    """The part of the whole network's latency that a member takes.

    Attributes:
        notes: layers that could not be timed.
    """

    def __init__(
        self,
        elastic: Elastic,
        order: Order,
        space: Space,
        timer: Timer,
        *,
        held: Mapping[str, Any] | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Measure the table and both ends, unless `held` has what `plain` gave before."""
        self._elastic, self._order, self._space, self._timer = elastic, order, space, timer
        self.notes: list[str] = []
        self._names = {group.name: place for place, group in enumerate(elastic.groups)}
        self._sizes = [group.size for group in elastic.groups]
        self._crops = {layer.node.name: name for name, layer in elastic.kernels.items()}
        if held is not None:
            self._kinds = [_kind(plain) for plain in held["kinds"]]
            self._milliseconds = dict(held["milliseconds"])
        else:
            choices = self._choices()
            table = measure(elastic.groups, choices, timer, progress=progress, notes=self.notes)
            self._kinds = list(table.kinds)
            ends = {"whole": space.full(), "least": space.least()}
            self._milliseconds = timer(
                {name: elastic.cut(member, order).program for name, member in ends.items()}
            )
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}
        self._gone: dict[tuple[int, ...], set[str]] = {}
        self._lines = [
            (node, number, columns)
            for number, kind in enumerate(self._kinds)
            for node, columns in zip(kind.nodes, kind.columns, strict=True)
        ]
        low, high = self._table(space.least()), self._table(space.full())
        fast = self._milliseconds["least"] / self._milliseconds["whole"]
        self._slope = (1 - fast) / (high - low) if high > low else 0.0
        self._high = high

    def plain(self) -> dict[str, Any]:
        """What was measured, JSON; `held` of the next one."""
        kinds = [
            {
                "nodes": list(kind.nodes),
                "columns": [[list(axis) for axis in node] for node in kind.columns],
                "knots": [knots.tolist() for knots in kind.knots],
                "milliseconds": kind.milliseconds.tolist(),
            }
            for kind in self._kinds
        ]
        return {"kinds": kinds, "milliseconds": self._milliseconds}

    def part(self, member: Member) -> float:
        """Foretold latency over that of the whole network."""
        return 1 - self._slope * (self._high - self._table(member))

    def measured(self, member: Member) -> tuple[float, float]:
        """Milliseconds of the whole network and of a member, timed in turns."""
        pair = {"whole": self._space.full(), "member": member}
        programs = {name: self._elastic.cut(one, self._order).program for name, one in pair.items()}
        times = self._timer(programs)
        return times["whole"], times["member"]

    def _choices(self) -> list[Choice]:
        """The sizes that the table covers: those of knobs, and of what else lies in a branch.

        A branch whose layers do not vary in width has to be in the table all the same, to be taken
        out of it: half of one of its groups is measured too.
        """
        counts = {knob.site: knob.choices for knob in self._space.knobs if knob.kind == "width"}
        atoms = {group.atom: group for group in self._elastic.groups}
        lines = self._elastic.groups.equations.multiply_adds
        depths = {knob.site for knob in self._space.knobs if knob.kind == "depth"}
        inner = [
            node
            for stage in self._elastic.stages
            if stage.name in depths
            for branch in stage.branches
            for node in branch.inner
        ]
        for node in inner:
            terms = [term for terms in lines.get(node, ()) for term in terms]
            there = [atoms[a] for term in terms for a in axes.atoms(term) if a in atoms]
            if there and not any(group.name in counts for group in there):
                size = there[0].size
                counts[there[0].name] = tuple(sorted({size, max(size // 2, 1)}, reverse=True))
        return [
            Choice(g.name, g.size, np.array(row, dtype=np.int64), np.zeros(len(row)))
            for g in self._elastic.groups
            for row in [counts.get(g.name, (g.size,))]
        ]

    def _table(self, member: Member) -> float:
        """Milliseconds of all layers of a member by the table."""
        sizes = list(self._sizes)
        for site, count in named(member, "width"):
            sizes[self._names[site]] = count
        sides = dict(named(member, "kernel"))
        gone = self._missing(member)
        total = 0.0
        for node, kind, columns in self._lines:
            if node not in gone:
                places = tuple(sum(sizes[column] for column in axis) for axis in columns)
                total += self._milliseconds_of(kind, places) * self._cropped(node, sides)
        return total * self._area(member)

    def _milliseconds_of(self, kind: int, places: tuple[int, ...]) -> float:
        """One layer at these sizes of its axes, remembered."""
        if (kind, places) not in self._known:
            held = self._kinds[kind]
            along = [np.array([place], dtype=np.float64) for place in places]
            found = interpolate(held.knots, held.milliseconds, along)
            self._known[kind, places] = float(found.reshape(-1)[0])
        return self._known[kind, places]

    def _missing(self, member: Member) -> set[str]:
        """Names of the operators in dropped branches."""
        key = tuple(count for _, count in named(member, "depth"))
        if key not in self._gone:
            dropped = self._elastic.dropped(member, self._order)
            self._gone[key] = {node.name for branch in dropped for node in branch.inner}
        return self._gone[key]

    def _cropped(self, node: str, sides: Mapping[str, int]) -> float:
        name = self._crops.get(node, "")
        if name not in sides:
            return 1.0
        layer = self._elastic.kernels[name]
        return sides[name] ** layer.space / layer.taps

    def _area(self, member: Member) -> float:
        """Part of the input's positions."""
        part = 1.0
        for site, side in named(member, "resolution"):
            part *= (side / self._elastic.inputs[site]) ** 2
        return part


def _kind(plain: Mapping[str, Any]) -> Kind:
    columns = tuple(tuple(tuple(axis) for axis in node) for node in plain["columns"])
    knots = tuple(np.array(row, dtype=np.float64) for row in plain["knots"])
    values = np.array(plain["milliseconds"], dtype=np.float64)
    return Kind(tuple(plain["nodes"]), columns, knots, values)
