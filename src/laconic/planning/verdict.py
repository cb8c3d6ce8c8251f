"""One plain sentence about a result."""

from laconic.core.budget import Budget
from laconic.core.measurement import Measurement
from laconic.engine.deploy import Deployed
from laconic.engine.final import ratio
from laconic.engine.result import Result


def verdict(result: Result, budget: Budget, peer: Deployed) -> str:
    """What was gained, in the same runtime at the best precision of each side, and what it cost."""
    held = next(each for each in result.candidates if each.chosen)
    unit = "points" if held.drop.unit == "%" else held.drop.unit
    runtime = result.deploy[0] if result.deploy else peer.runtime
    parts: list[str] = []
    for batch in _batches(result):
        before, after = (best(result, side, runtime, batch) for side in ("original", "compressed"))
        if before is not None and after is not None:
            words = _speed(before, after)
            parts.append(f"{words} in {runtime} at batch {batch}")
    sizes = [_size(result, side) for side in ("original", "compressed")]
    if sizes[0] and sizes[1]:
        parts.append(
            f"model.laconic is {ratio(sizes[0], sizes[1])} smaller than the fp32 ONNX file "
            f"({sizes[1] / 1000:.1f} of {sizes[0] / 1000:.1f} kB)"
        )
    kept = "within" if held.accepted or (held.drop.high or 0) <= budget.max_drop else "NOT within"
    parts.append(
        f"{held.drop.value:+.2f} {unit} lost on validation, at most {held.drop.high:.2f} "
        f"({100 * budget.confidence:g} % sure): {kept} the budget of {budget.max_drop:g}"
    )
    return "; ".join(parts) + "."


def best(result: Result, side: str, runtime: str, batch: int) -> Measurement | None:
    """The fastest latency of a side in a runtime at a batch size, over all precisions."""
    found = [
        each
        for each in result.measurements[side]
        if each.name == "latency"
        and each.conditions.get("runtime") == runtime
        and each.conditions.get("batch") == batch
    ]
    return min(found, key=lambda each: each.value) if found else None


def _speed(before: Measurement, after: Measurement) -> str:
    kinds = f"{before.conditions['precision']} → {after.conditions['precision']}"
    if after.value < before.value * 0.98:
        return f"{ratio(before.value, after.value)} faster ({kinds})"
    if after.value <= before.value * 1.02:
        return f"as fast ({kinds})"
    return f"{ratio(after.value, before.value)} SLOWER ({kinds})"


def _batches(result: Result) -> list[int]:
    found = {
        each.conditions["batch"]
        for each in result.measurements["compressed"]
        if each.name == "latency"
    }
    return sorted(found)


def _size(result: Result, side: str) -> float | None:
    """The fp32 ONNX file of the original; the `.laconic` file of the compressed model."""
    file = "model.onnx" if side == "original" else "model.laconic"
    for each in result.measurements[side]:
        if each.name == "size" and each.conditions.get("file") == file:
            return each.value
    return None
