"""What the budget minimises, measured the same way for every candidate and for the original."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from laconic import storage
from laconic.core.budget import Budget
from laconic.core.errors import ExportError
from laconic.core.measurement import Measurement
from laconic.engine.deploy import Deployed, Yard, fastest, least
from laconic.engine.store import key_of
from laconic.program.cost import cost
from laconic.program.freezing import freeze
from laconic.program.program import Program

_GAIN = 0.05  # a latency has to fall by more than the noise between two short measurements
_AUTO = ("openvino", "onnxruntime")  # Inductor compiles for tens of seconds: only where asked for
# Where the original is about as fast in both, the first: what is made of it will be (integers).
_CLOSE = 1.15


@dataclass
class Objective:
    """The measure of strength.

    Attributes:
        original: the Program everything is compared with.
        runtime: the one that counts.
        budget: what is minimised, at which batch size.
        yard: where files are exported and timed.
        baseline: the original's value at its best precision.
        peer: the original in its best precision: what has to be beaten.
    """

    original: Program
    runtime: str
    budget: Budget
    yard: Yard
    baseline: Measurement = field(init=False)
    peer: Deployed = field(init=False)

    def __post_init__(self) -> None:
        ways = self._by_speed(self.original)
        if not ways:
            raise ExportError("cannot run the original", where=self.runtime)
        self.peer = ways[0]
        self.baseline = self.measure(self.peer)

    @property
    def name(self) -> str:
        """For a person: "latency in openvino at batch 1", "bytes of model.laconic", "MACs"."""
        if self.budget.minimize == "latency":
            return f"latency in {self.runtime} at batch {self.budget.batch}"
        return "bytes of model.laconic" if self.budget.minimize == "size" else "MACs"

    def ways(self, program: Program) -> list[Deployed]:
        """The precisions in which a candidate may ship, best first."""
        return self._by_speed(program)

    def measure(self, way: Deployed) -> Measurement:
        """The objective of one way; a latency is taken beside the original's best."""
        if self.budget.minimize == "latency":
            found = self._latencies({"candidate": way, "original": self.peer})
            return _beside(found["candidate"], found["original"])
        if self.budget.minimize == "size":
            return Measurement(name="size", value=self.file_bytes(way), unit="B")
        return Measurement(name="macs", value=cost(way.program).macs, unit="MAC")

    def better(self, measured: Measurement) -> bool:
        """Whether a value is a gain over the original's best, taken in the same run.

        Latencies are compared by their least disturbed turn: other work only ever adds time.
        """
        gain = _GAIN if self.budget.minimize == "latency" else 0.0
        return self.relative(measured) < 1 - gain

    def relative(self, measured: Measurement) -> float:
        """A value as a share of the original's best; of latencies, of that in the same run."""
        if self.budget.minimize != "latency":
            return measured.value / max(self.baseline.value, 1)
        return least(measured) / measured.conditions.get("original, least", least(self.baseline))

    def together(self, ways: Sequence[Deployed]) -> list[Measurement]:
        """The objective of several, latencies interleaved in one run with the original."""
        if self.budget.minimize != "latency":
            return [self.measure(way) for way in ways]
        labels = {str(number): way for number, way in enumerate(ways)}
        found = self._latencies({**labels, "original": self.peer})
        self.baseline = found["original"]
        return [_beside(found[label], found["original"]) for label in labels]

    def file_bytes(self, way: Deployed) -> int:
        """Bytes of the `.laconic` file."""
        key = key_of(self.yard.key(way.program), "laconic bytes")
        held = self.yard.store.get(key)
        if held is None:
            held = {"bytes": storage.predict(freeze(way.program)).total}
            self.yard.store.put(key, held)
        return held["bytes"]

    def _by_speed(self, program: Program) -> list[Deployed]:
        ways = self.yard.ways(program, self.runtime)
        if len(ways) < 2:
            return ways
        found = self._latencies({way.precision: way for way in ways})
        return sorted(ways, key=lambda way: least(found[way.precision]))

    def _latencies(self, ways: Mapping[str, Deployed]) -> dict[str, Measurement]:
        return self.yard.latencies(ways, self.budget.batch)


def _beside(measured: Measurement, original: Measurement) -> Measurement:
    stated = {**measured.conditions, "original, least": least(original)}
    return replace(measured, conditions=stated)


def choose_runtime(program: Program, budget: Budget, yard: Yard) -> str:
    """The runtime that counts: the one asked for, or the fastest for the original.

    OpenVINO where others are faster by less than 15 %: it gains more from integers.

    Raises:
        ExportError: none can run it; every obstacle is named.
    """
    if budget.runtime != "auto":
        return budget.runtime
    ways: dict[str, Deployed] = {}
    obstacles: list[str] = []
    for name in _AUTO:
        try:
            for way in yard.ways(program, name):
                yard.path(way)
                ways[str(way)] = way
        except ExportError as error:
            obstacles.append(str(error))
    if not ways:
        raise ExportError(
            "; ".join(obstacles) or "no runtime can run this model",
            where="runtime auto",
            hint="try --runtime inductor",
        )
    return ways[fastest(yard.latencies(ways, budget.batch), _CLOSE)].runtime
