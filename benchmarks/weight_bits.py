"""Weights of ResNet-20 and ResNet-56 at 4, 3 and 2 bits, after training, without labels.

Every (network, bits, way) is a row: accuracy on validation, effective bits (codes, scales and zero
points of all weights), size of the `.laconic` file, processor seconds. The row without a way,
`resnet20_w2`, is what we would use. Ways: `nearest`; `hqq` and `gptq` as they come; `sigmoid`
(quantize.round as in AdaRound and BRECQ, codes at most one from the nearest); `gptq_published` (no
fit, no passes, ranges of the extremes);
`hqq_published` (half-quadratic with real zero points, one scale for 64 weights, which costs half a
bit each). All see the same calibration images, 2,048 at most; the first and the last layer have 8
bits everywhere. Choices are made on validation; `resnet20_test` looks at the test rows once.
`nearest_mean` and `nearest_spread`, on validation alone: rounded to nearest, then the mean of each
channel's outputs brought back, or mean and spread (`bias_correction`, 1,024 images).

    python -m benchmarks.weight_bits [--depth 20] [--only resnet20_w2] [--quick]
"""

import time
from typing import Any

from torch import Tensor

from benchmarks.cifar import Cifar
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages, apply
from laconic.methods.base import Outcome
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.solvers.layers.folding import fold_batch_norms
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.storage import predict

DEPTHS, BITS = (20, 56), (4, 3, 2)
SAMPLES = 2048
# of a block: less than five minutes of two cores for a network
STEPS = {20: 400, 56: 150}
SIGMOID = {"way": "sigmoid", "scales": False, "biases": False, "decide": 3.0}
GPTQ = {"method": "quantize.gptq", "samples": SAMPLES}
WAYS: dict[str, dict[str, Any]] = {
    "": {"method": "quantize.round", "samples": SAMPLES},
    "sigmoid": {"method": "quantize.round", "samples": SAMPLES, **SIGMOID},
    "gptq": GPTQ,
    "hqq": {"method": "quantize.hqq"},
    "nearest": {"method": "quantize.hqq", "rounds": 0},
    "gptq_published": {**GPTQ, "refit": False, "passes": 0, "weight_range": "minmax"},
    "hqq_published": {},
}
CORRECTED: dict[str, dict[str, Any]] = {
    "nearest_mean": {"method": "quantize.weights", "bias_correction": "empirical", "samples": 1024},
    "nearest_spread": {
        "method": "quantize.weights", "bias_correction": "batch_norm", "samples": 1024,
    },
}  # fmt: skip
HQQ_GROUP = 64


class Job:
    """One network."""

    def __init__(self, bench: Bench, depth: int) -> None:
        self.bench, self.depth = bench, depth
        self.net = Cifar(bench, depth, SAMPLES, 64)
        self.stages = Stages(bench, f"weight-bits-resnet{depth}")

    def name(self, bits: int, way: str) -> str:
        """The row of a way at so many bits."""
        return f"resnet{self.depth}_w{bits}" + (f"_{way}" if way else "")

    def step(self, bits: int, way: str) -> dict[str, Any]:
        """The step of a recipe that a row stands for."""
        step = (WAYS | CORRECTED)[way] | {"bits": bits}
        if "samples" in step:
            step["samples"] = min(step["samples"], self.net.samples)
        if step.get("method") == "quantize.round":
            step["steps"] = 4 if self.net.quick else STEPS[self.depth]
        return step

    def make(self, bits: int, way: str) -> Outcome:
        """The network on its grids."""
        if way == "hqq_published":
            return hqq_published(self.net.program, bits)
        return apply(self.net.program, self.step(bits, way), self.net.context())

    def row(self, bits: int, way: str) -> Row:
        """Make and measure one row."""
        found: Row = {}

        def make() -> Outcome:
            start = time.process_time()
            outcome = self.make(bits, way)
            found["cpu_s"] = time.process_time() - start
            found["effective_bits"] = outcome.figures["effective_bits"]
            return outcome

        def measured(program: Program) -> Row:
            found["val"] = self.net.score(program, "validation")
            if way != "hqq_published":  # its zero points are no integers: a float program here
                found["bytes"] = predict(freeze(program)).total
            return found

        name, step = self.name(bits, way), self.step(bits, way)
        return self.stages.row(name, make, measured, step=step)


def hqq_published(program: Program, bits: int) -> Outcome:
    """HQQ with its published settings (lp 0.7, beta 10, 20 rounds), 8 bits at either end."""
    made = program.clone()
    fold_batch_norms(made, forwards=False)
    sites = weight_sites(made)[0]
    stored = total = 0.0
    for place, site in enumerate(sites):
        weight = made.tensor(site.name).detach()
        width = 8 if place in (0, len(sites) - 1) else bits
        rows = (
            weight.reshape(-1, HQQ_GROUP) if weight.numel() % HQQ_GROUP == 0 else weight.flatten(1)
        )
        made.set_tensor(site.name, _half_quadratic(rows, width).reshape(weight.shape))
        stored += weight.numel() * width + 32 * len(rows)  # a scale and a zero point, 16 bits each
        total += weight.numel()
    made.recompile()
    return Outcome(program=made, figures={"effective_bits": stored / total})


def _half_quadratic(rows: Tensor, bits: int, norm: float = 0.7, beta: float = 10.0) -> Tensor:
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    levels = 2**bits - 1
    scale = levels / (high - low).clamp(min=1e-12)
    zero, best = -low * scale, float("inf")
    for _ in range(20):
        codes = (rows * scale + zero).round().clamp(0, levels)
        made = (codes - zero) / scale
        off = rows - made
        threshold = off.abs().clamp(min=1e-12).pow(norm - 1) / beta
        away = off.sign() * (off.abs() - threshold).clamp(min=0)
        zero = (codes - (rows - away) * scale).mean(1, keepdim=True)
        beta *= 1.01
        error = float(off.abs().mean())
        if error >= best:
            break
        best = error
    codes = (rows * scale + zero).round().clamp(0, levels)
    return (codes - zero) / scale


def base(job: Job) -> Row:
    """The network as it is."""
    return {"val": job.net.score(job.net.model, "validation"),
            "bytes": predict(job.net.program).total}  # fmt: skip


def test_row(job: Job, of: dict[str, float]) -> Row:
    """Accuracy of the kept stages on the test rows, and on validation and test together."""
    test = {"base": job.net.score(job.net.model, "test")}
    for name in of:
        if job.stages.path(name).exists():
            test[name] = job.net.score(job.stages.program(name), "test")
    val = {**of, "base": job.net.score(job.net.model, "validation")}
    return {**test, **{f"{name}_all": (test[name] + val[name]) / 2 for name in test}}


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("weight_bits", __doc__ or "")
    bench.parser.add_argument("--depth", type=int, choices=DEPTHS, help="this network only")
    args = bench.parse(argv)
    depths = [args.depth] if args.depth else [20] if args.quick else list(DEPTHS)
    summary: Row = {}
    for depth in depths:
        job = Job(bench, depth)
        bench.row(f"resnet{depth}_base", lambda j=job: base(j))
        bits = (2,) if args.quick else BITS
        held = {job.name(b, way): job.row(b, way) for b in bits for way in WAYS}
        for way in CORRECTED:
            for b in bits:
                job.row(b, way)
        of = {name: row["val"] for name, row in held.items() if "val" in row}
        tested = bench.row(f"resnet{depth}_test", lambda j=job, of=of: test_row(j, of), of=of)
        summary |= {name: tested.get(f"{name}_all") for name in held}
    return bench.finish(**summary)


if __name__ == "__main__":
    main()
