"""Bits for each weight against the same bits for all: bytes and accuracy of ResNet-20.

Rows: `w2` .. `w8` (every weight at the same bits), `mixed_3.0` .. (`quantize.mixed` at a mean
number of bits, harms measured at the outputs), `fisher_3.0` .. (harms from gradients), each rounded
to nearest, no training; accuracy on validation rows, bytes of the entropy-coded file. `test`: all
of them on the test rows, once. A page with the chart is written beside the JSON. `vit_where`,
`minilm_where`, `resnet20_where`: accuracy against milliseconds (`benchmarks/integers_where.py`),
each with a chart of its own.

    python -m benchmarks.mixed_precision [--depth 56]
"""

from typing import Any

from benchmarks import integers_where
from benchmarks.cifar import Cifar
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages, apply
from laconic.methods.base import Outcome
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.reports import front
from laconic.reports.front import Front, Point
from laconic.storage import predict

UNIFORM = (2, 3, 4, 5, 6, 8)
MEANS = (2.5, 3.0, 3.5, 4.0, 5.0)
SAMPLES = 256


class Job:
    """One network and its rows."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.net = Cifar(bench, int(bench.args.depth), SAMPLES, 64)
        bench.variant = "" if self.net.depth == 20 else f"resnet{self.net.depth}"
        self.stages = Stages(bench, f"mixed_precision-resnet{self.net.depth}")

    def steps(self) -> dict[str, dict[str, Any]]:
        """Row → the one step of its recipe."""
        few = self.net.quick
        found: dict[str, dict[str, Any]] = {
            f"w{bits}": {"method": "quantize.weights", "bits": bits, "symmetric": False,
                         "first_last": None}
            for bits in ((4, 8) if few else UNIFORM)
        }  # fmt: skip
        for mean in (4.0,) if few else MEANS:
            for harm, name in (("output", "mixed"), ("fisher", "fisher")):
                found[f"{name}_{mean}"] = {
                    "method": "quantize.mixed", "mean_bits": mean, "harm": harm,
                    "samples": 16 if few else 128,
                }  # fmt: skip
        return found

    def measured(self, program: Program) -> Row:
        """Accuracy and bytes."""
        return {"val": self.net.score(program, "validation"),
                "bytes": predict(freeze(program)).total}  # fmt: skip

    def rows(self) -> dict[str, Row]:
        """All of them."""
        held: dict[str, Row] = {}
        for name, step in self.steps().items():

            def make(step: dict[str, Any] = step) -> Outcome:
                return apply(self.net.program, step, self.net.context())

            held[name] = self.stages.row(name, make, self.measured, step=step)
        return held


def page(job: Job, rows: dict[str, Row], base: float) -> Front:
    """The chart."""
    series: dict[str, list[Point]] = {"one width for all": [], "by output": [], "by Fisher": []}
    kinds = {"w": "one width for all", "m": "by output", "f": "by Fisher"}
    for name, row in rows.items():
        if "val" in row:
            series[kinds[name[0]]].append(Point(row["bytes"] / 1e3, row["val"], name))
    every = [point for points in series.values() for point in points]
    mixed = [point for point in front.best(every) if not point.name.startswith("w")]
    return Front(
        f"Bits for each weight, ResNet-{job.net.depth}",
        f"{len(mixed)} of {len(front.best(every))} points on the front are mixed.",
        "file, kB", "accuracy on validation, %", {k: v for k, v in series.items() if v},
        [f"CIFAR-10, 5,000 validation rows; float {base:.2f} %. Rounded to nearest on grids with a "
         "zero point, a scale for each output channel; no training, no bias correction.",
         "Bytes of the .laconic file: codes entropy coded, scales and the graph included."],
        lowest=min(60.0, base),
    )  # fmt: skip


def front_row(job: Job, names: list[str]) -> Row:
    """Accuracy of every stage on the test rows; they decide nothing."""
    there = [name for name in names if job.stages.path(name).exists()]
    found = {name: job.net.score(job.stages.program(name), "test") for name in there}
    return {"base": job.net.score(job.net.model, "test"), **found}


def main(argv: list[str] | None = None) -> Row:
    """Run the rows, write the page and print the JSON line."""
    bench = Bench("mixed_precision", __doc__ or "")
    bench.parser.add_argument("--depth", type=int, default=20, help="20 or 56")
    bench.parse(argv)
    job = Job(bench)
    base = bench.row("base", lambda: {"val": job.net.score(job.net.model, "validation")})
    rows = job.rows()
    bench.row("test", lambda: front_row(job, list(rows)), of=rows)
    for name, row in integers_where.rows(bench).items():
        if row:
            target = bench.path.with_name(f"{bench.path.stem}_{name}.html")
            front.write(integers_where.page(name.removesuffix("_where"), row), target)
    held = page(job, rows, base.get("val", 0.0))
    front.write(held, bench.path.with_suffix(".html"))
    every = [point for points in held.series.values() for point in points]
    return bench.finish(base_acc=base.get("val"), on_the_front=[p.name for p in front.best(every)])


if __name__ == "__main__":
    main()
