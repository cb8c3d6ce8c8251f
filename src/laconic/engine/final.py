"""The figures of a result: original beside compressed, every runtime, taken once at the end."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from laconic import runtimes, storage
from laconic.core.errors import DataError, ExportError
from laconic.core.measurement import Measurement
from laconic.core.task import Inputs, Task
from laconic.engine.deploy import Deployed, Yard
from laconic.measuring import accuracy, parity
from laconic.program.cost import cost
from laconic.program.freezing import freeze
from laconic.program.program import Program

ALWAYS = ("openvino", "onnxruntime")
_PARITY_SAMPLES = 512
_LARGER = 32  # the second batch size where the first is 1


@dataclass(frozen=True)
class Figures:
    """Everything measured at the end.

    Attributes:
        measurements: "original" / "compressed" → measurements.
        parity: exported file → how it compares with the Program.
        refused: what a runtime cannot do, one sentence each.
    """

    measurements: Mapping[str, Sequence[Measurement]]
    parity: Mapping[str, Mapping[str, object]]
    refused: Sequence[str]


def measure(
    original: Deployed, compressed: Deployed, task: Task, yard: Yard, batch: int
) -> Figures:
    """Measure two deployments and what else their Programs can be run as."""
    sides = {"original": original, "compressed": compressed}
    found: dict[str, list[Measurement]] = {side: [] for side in sides}
    refused: list[str] = []
    for side, way in sides.items():
        for split in ("validation", "test"):
            if getattr(task, split) is not None:
                found[side].append(score(yard.scores(way, task, split), task, split, way))
        found[side] += _sizes(way.program, yard, refused, side)
        try:
            found[side].append(yard.memory(way, batch))
        except DataError as error:
            refused.append(f"memory of the {side} model: {error}")
    for size in batches(batch):
        for side, each in _latencies(sides, yard, size).items():
            found[side] += each
    if "inductor" not in {way.runtime for way in sides.values()}:
        refused.append(
            "inductor was not measured: it compiles for minutes; --runtime inductor does"
        )
    told: dict[str, dict[str, object]] = {}
    for name in dict.fromkeys((*ALWAYS, compressed.runtime)):
        for way in _ways(compressed.program, name, yard):
            told[str(way)] = check_parity(way, task, yard)
            if not told[str(way)]["ok"]:
                refused.append(f"{way} differs from the Program: {told[str(way)]['failures']}")
    return Figures(found, told, list(dict.fromkeys(refused)))


def check_parity(way: Deployed, task: Task, yard: Yard) -> dict[str, object]:
    """An exported file against its Program on validation data, output by output: the worst."""
    runner = yard.runner(way)
    report = parity.parity(
        way.program,
        runner.run,
        _some_inputs(task),
        precision=way.precision,
        conditions=runner.conditions,
    )
    return summary(report)


def summary(report: parity.ParityReport) -> dict[str, object]:
    """A parity report as one flat row: the worst of its outputs."""
    every = report.outputs
    top1 = [output.top1 for output in every if output.top1 is not None]
    return {
        "ok": report.ok,
        "largest error": max(output.max_abs for output in every),
        "relative": max(output.relative for output in every),
        "cosine, mean": min(output.cosine_mean for output in every),
        "cosine, least": min(output.cosine_min for output in every),
        "same class": min(top1) if top1 else None,
        "samples": every[0].samples,
        "failures": "; ".join(report.failures),
    }


def _some_inputs(task: Task) -> Iterator[Inputs]:
    """Inputs of the first validation batches, a few hundred samples."""
    seen = 0
    for batch in task.batches("validation", "calibration"):
        inputs, _ = task.split(batch)
        yield inputs
        values = inputs.values() if isinstance(inputs, Mapping) else inputs
        seen += next((len(v) for v in values if isinstance(v, Tensor) and v.ndim), 1)
        if seen >= _PARITY_SAMPLES:
            return


def batches(batch: int) -> list[int]:
    """The batch sizes that are timed: the one that counts, and a small or a larger one."""
    return [1, batch] if batch > 1 else [1, _LARGER]


def score(scores: Tensor, task: Task, split: str, way: Deployed) -> Measurement:
    """The mean score of a deployment with its 95 % interval."""
    named = accuracy.mean(scores, task, conditions={"split": split, "measured in": str(way)})
    name = "accuracy" if task.metric_name == "accuracy" else "score"
    return replace(named, name=name, conditions={**named.conditions, "metric": task.metric_name})


def _sizes(program: Program, yard: Yard, refused: list[str], side: str) -> list[Measurement]:
    """Multiply-adds, parameters, and bytes of the files that ship."""
    total = cost(freeze(program))
    if total.unknown:
        refused.append(f"MACs of {', '.join(sorted(total.unknown))} are not counted")
    sizes = {"model.laconic": storage.predict(freeze(program)).total}
    for name in ALWAYS:
        ways = _ways(program, name, yard)
        if not ways:
            refused.append(f"{name} cannot run the {side} model")
            continue
        try:
            sizes[f"model{runtimes.get(name).suffix}"] = yard.bytes(ways[0])
        except ExportError as error:
            refused.append(str(error))
    made = [
        Measurement(name="size", value=size, unit="B", conditions={"file": file})
        for file, size in sizes.items()
    ]
    made.append(Measurement(name="macs", value=total.macs, unit="MAC"))
    made.append(Measurement(name="parameters", value=total.params, unit="weights"))
    return made


def _latencies(
    sides: Mapping[str, Deployed], yard: Yard, batch: int
) -> dict[str, list[Measurement]]:
    """Both sides in every runtime and precision, and in eager torch, interleaved in one run."""
    names = dict.fromkeys((*ALWAYS, *(way.runtime for way in sides.values())))
    ways = {
        f"{side} {way}": way
        for side, chosen in sides.items()
        for name in names
        for way in _ways(chosen.program, name, yard)
    }
    eager = {f"{side} eager": way.program for side, way in sides.items()}
    measured = yard.latencies(ways, batch, eager)
    return {
        side: [each for label, each in measured.items() if label.startswith(side)] for side in sides
    }


def _ways(program: Program, runtime: str, yard: Yard) -> list[Deployed]:
    """Every way that can be exported."""
    found: list[Deployed] = []
    for way in yard.ways(program, runtime):
        try:
            yard.path(way)
        except ExportError:
            continue
        found.append(way)
    return found


def ratio(before: float, after: float) -> str:
    """`2.31x`; digits as they are worth."""
    value = before / after if after else math.inf
    return f"{value:.3g}x"
