"""Whether a step pays where it counts: measured in the runtime, at the best precision of each side.

A step pays if the result is better in what the budget minimises than the same recipe without it, or
as good and its file smaller. Steps that leave the operators and their shapes alone (training,
compensation) are not judged: what they are for is seen in the score.
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

    def concerns(self, before: Program, after: Program) -> bool:
        """Whether operators or shapes changed."""
        return skeleton(before) != skeleton(after)

    def __call__(self, without: Program, made: Program) -> str:
        """Why `made` is not worth having over `without`; empty where it is."""
        old_bytes, new_bytes = (storage.predict(freeze(p)).total for p in (without, made))
        smaller = new_bytes < old_bytes
        if self.minimize == "size":
            return "" if smaller else f"the file is {new_bytes:,} bytes, was {old_bytes:,}"
        if self.minimize == "macs":
            old, new = cost(without).macs, cost(made).macs
            return "" if new < old or (new == old and smaller) else f"{new:,} MACs, was {old:,}"
        return self._slower(without, made, smaller)

    def _slower(self, without: Program, made: Program, smaller: bool) -> str:
        ways = {
            f"{side} {way.precision}": way
            for side, program in (("without", without), ("with", made))
            for way in self.yard.ways(program, self.runtime)
        }
        measured = self.yard.latencies(ways, self.batch)
        old = measured[fastest({k: v for k, v in measured.items() if k.startswith("without ")})]
        made_only = {k: v for k, v in measured.items() if k.startswith("with ")}
        if not made_only:
            return f"{self.runtime} cannot run it"
        new = measured[fastest(made_only)]
        now, then = least(new), least(old)
        if now < then * (1 - _TIE) or (now <= then * (1 + _TIE) and smaller):
            return ""
        return (
            f"{now:.3g} ms in {new.conditions['precision']} is no gain over "
            f"{then:.3g} ms in {old.conditions['precision']} without it "
            f"({self.runtime}, batch {self.batch})"
        )


def skeleton(program: Program) -> list[tuple[str, object]]:
    """Operators and the shapes they give: what a runtime's speed depends on."""
    return [
        (str(node.target), node.meta.get("shape")) for node in program.graph.nodes if _runs(node)
    ]


def _runs(node: fx.Node) -> bool:
    return node.op == "call_function"
