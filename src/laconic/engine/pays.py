"""Whether a step pays where it counts: measured in the runtime, at the best precision of each side.

A step pays if the result is better in what the budget minimises, or as good and its file smaller.
Steps that leave the operators and their shapes alone (training, compensation) are not judged: what
they are for is seen in the score.
"""

from dataclasses import dataclass, field

from torch import fx

from laconic import storage
from laconic.core.budget import Objective
from laconic.engine.deploy import Yard, fastest, least
from laconic.program.cost import cost
from laconic.program.freezing import freeze
from laconic.program.program import Program

_TIE = 0.02  # two measurements of one file differ by about that


@dataclass(frozen=True)
class Pays:
    """A judge of steps; see `engine.run.Judge`."""

    minimize: Objective
    runtime: str
    batch: int
    yard: Yard = field(repr=False, compare=False)

    def __call__(self, before: Program, after: Program) -> str:
        """Why `after` is not worth having over `before`; empty where it is."""
        if skeleton(before) == skeleton(after):
            return ""
        old_bytes, new_bytes = (storage.predict(freeze(p)).total for p in (before, after))
        smaller = new_bytes < old_bytes
        if self.minimize == "size":
            return "" if smaller else f"the file is {new_bytes:,} bytes, was {old_bytes:,}"
        if self.minimize == "macs":
            old, new = cost(before).macs, cost(after).macs
            return "" if new < old or (new == old and smaller) else f"{new:,} MACs, was {old:,}"
        return self._slower(before, after, smaller)

    def _slower(self, before: Program, after: Program, smaller: bool) -> str:
        ways = {
            f"{side} {way.precision}": way
            for side, program in (("before", before), ("after", after))
            for way in self.yard.ways(program, self.runtime)
        }
        measured = self.yard.latencies(ways, self.batch)
        old = measured[fastest({k: v for k, v in measured.items() if k.startswith("before")})]
        after_only = {k: v for k, v in measured.items() if k.startswith("after")}
        if not after_only:
            return f"{self.runtime} cannot run it"
        new = measured[fastest(after_only)]
        now, then = least(new), least(old)
        if now < then * (1 - _TIE) or (now <= then * (1 + _TIE) and smaller):
            return ""
        return (
            f"{now:.3g} ms in {new.conditions['precision']} is no gain over "
            f"{then:.3g} ms in {old.conditions['precision']} before it "
            f"({self.runtime}, batch {self.batch})"
        )


def skeleton(program: Program) -> list[tuple[str, object]]:
    """Operators and the shapes they give: what a runtime's speed depends on."""
    return [
        (str(node.target), node.meta.get("shape")) for node in program.graph.nodes if _runs(node)
    ]


def _runs(node: fx.Node) -> bool:
    return node.op == "call_function"
