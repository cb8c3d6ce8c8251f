"""ResNet-56 on CIFAR-10 at 2.1x and 2.5x fewer multiply-adds: at once, in ten minutes, in an hour.

Rows for each ratio: `prune_2x1` (compensated, before any gradient step), `10min_2x1` and `1h_2x1`
(recovery from the pruned network, so many minutes by the clock in two processes of one thread that
share the batches: ten from the original's outputs alone, the hour from labels too, at a higher
rate, with passes of images that come again), and `test`: all of them on the rows that were never
used to choose, and on all 10,000.

Rows of a latency budget in place of multiply-adds (`benchmarks.resnet56_latency`), compensated and
not trained, like `prune_2x1`: `ms_openvino_b32_100` was asked for 100 % of the milliseconds of
`prune_2x1` in OpenVINO at batch 32, and so on; `_short` lost four of its 25 blocks first
(`simplify.drop_layers`, refitted), chosen by accuracy on the validation rows. `latency`: these,
`prune_2x1` and the whole network timed in turns, one thread, in milliseconds of the processor.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import resnet56_latency as budgets
from benchmarks.harness import Bench, Row
from benchmarks.resnet56_main import CALIBRATION, Job
from benchmarks.resnet56_processes import in_processes
from benchmarks.stages import Stages, apply
from laconic.methods.base import Outcome
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.solvers.layers.residual import branches

RATIOS = {"2x1": 2.1, "2x5": 2.5}
PRUNE: dict[str, Any] = {
    "method": "prune.channels", "sites": "layer?.?.conv1.out", "block": 1,
}  # fmt: skip
RIVAL = "prune_2x1"
BLOCK = 8
MORE = 4 * CALIBRATION  # images: at 2.5x a thousand leave 0.8 points on the table
SHORT: dict[str, Any] = {
    "method": "simplify.drop_layers", "replace": "refit",
    "drop": ["layer1.5", "layer1.8", "layer2.2", "layer2.5"],
}  # fmt: skip
PROCESSES = 2


@dataclass(frozen=True)
class Budget:
    """A part of the milliseconds of `prune_2x1`; `short`: blocks are dropped first."""

    runtime: str
    batch: int
    percent: int
    short: bool = False

    @property
    def name(self) -> str:
        """Of its row."""
        return f"ms_{self.runtime}_b{self.batch}_{self.percent}{'_short' if self.short else ''}"


BUDGETS = (
    Budget("openvino", 32, 100), Budget("openvino", 32, 90), Budget("eager", 32, 90),
    Budget("openvino", 32, 100, short=True), Budget("openvino", 32, 95, short=True),
    Budget("eager", 32, 95, short=True),
)  # fmt: skip


@dataclass(frozen=True)
class Recovery:
    """How long a pruned network trains, and how; `distinct`: passes of images that come again."""

    minutes: float
    options: dict[str, Any]
    distinct: int | None = None


RECOVERIES = {
    "10min": Recovery(10.0, {}),
    "1h": Recovery(60.0, {"lr": 0.05, "alpha": 0.5, "weight_decay": 5e-4}, distinct=8),
}


class Channels(Job):
    """The job of `resnet56_main` with files and calibration images of its own."""

    samples = MORE

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.args, bench)
        self.stages = Stages(bench, f"resnet56_channels-{self.weights.stem}")
        self.macs = cost(self.program).macs

    def pruned(self, program: Program) -> Row:
        """What is kept of a stage."""
        return {"macs_ratio": self.macs / cost(program).macs,
                "val": self.score(program, "validation")}  # fmt: skip


def ratio_rows(job: Channels, name: str, ratio: float) -> dict[str, Row]:
    """Pruned, and recovered for ten minutes and for an hour."""
    context, common = job.context(), {"weights": job.weights, "seed": job.args.seed}
    samples = 64 if job.quick else MORE
    prune = PRUNE | {"ratio": 1 - 1 / ratio, "samples": samples}
    found = {
        f"prune_{name}": job.stages.row(
            f"prune_{name}", lambda: apply(job.program, prune, context), job.pruned,
            steps=[prune], **common,
        )
    }  # fmt: skip
    for label, way in RECOVERIES.items():
        length = {"steps": 3} if job.quick else {"minutes": way.minutes}
        step = {"method": "distill.logits", "ema": 0.998, "evaluations": 4, **way.options, **length}
        more = {"distinct": way.distinct} if way.distinct else {}

        def recovered(step: dict[str, Any] = step, way: Recovery = way) -> Outcome:
            start = job.stages.path(f"prune_{name}")
            return in_processes(job, start, step, PROCESSES, way.distinct)

        found[f"{label}_{name}"] = job.stages.row(
            f"{label}_{name}", recovered, job.pruned, steps=[prune, step], processes=PROCESSES,
            **more, **common,
        )  # fmt: skip
    return found


def budget_rows(job: Channels) -> dict[str, Row]:
    """As fast as the network of the MACs budget, or faster, by the clock of a runtime."""
    found: dict[str, Row] = {}
    samples = 64 if job.quick else MORE
    short, context = SHORT | {"samples": samples}, job.context()
    there = {branch.name for branch in branches(job.program)}
    for budget in BUDGETS:
        if budget.short and not there.issuperset(short["drop"]):
            continue  # another network of the family
        turns = budgets.QUICK if job.quick else budgets.TABLE
        clock = budgets.Clock(budget.runtime, budget.batch, threads=1, turns=turns)
        options = {"sites": PRUNE["sites"], "block": BLOCK, "samples": samples}
        told: Row = {}

        def make(
            budget: Budget = budget, clock: budgets.Clock = clock, told: Row = told,
            options: dict[str, Any] = options,
        ) -> Any:  # fmt: skip
            whole = apply(job.program, short, context).program if budget.short else job.program
            rival, part = job.stages.program(RIVAL), budget.percent / 100
            made, figures = budgets.as_fast_as(whole, rival, part, clock, context, **options)
            told |= figures
            return made

        def measure(program: Program, told: Row = told) -> Row:
            return {**job.pruned(program), **told}

        found[budget.name] = job.stages.row(
            budget.name, make, measure, runtime=budget.runtime, batch=budget.batch,
            percent=budget.percent, **({"first": short} if budget.short else {}), **options,
            weights=job.weights, seed=job.args.seed,
        )  # fmt: skip
    return found


def latency_row(job: Channels, names: list[str]) -> Row:
    """The whole network, that of the MACs budget and those of latency budgets, in turns."""
    programs = {"whole": job.program}
    programs |= {name: job.stages.program(name) for name in names if job.stages.path(name).exists()}
    return budgets.side_by_side(programs, RIVAL, 1, job.quick)


def test_row(job: Channels) -> Row:
    """Every stage there is on the test rows (never used to choose) and on all 10,000."""
    found: Row = {}
    stages = [f"{stage}_{name}" for stage in ("prune", *RECOVERIES) for name in RATIOS]
    for stage in (*stages, *(budget.name for budget in BUDGETS)):
        if job.stages.path(stage).exists():
            program = job.stages.program(stage)
            for split in ("test", "all"):
                found[f"{stage}_{split}"] = job.score(program, split)
    return found


def summary(rows: dict[str, Row]) -> Row:
    """The figures the issue asks for: over all 10,000, from the rows that are there."""
    test = rows["test"]
    labels = {"prune": "before", **{name: name for name in RECOVERIES}}
    return {
        f"acc_{label}_{name}": test.get(f"{stage}_{name}_all")
        for stage, label in labels.items()
        for name in RATIOS
    }


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("resnet56_channels", __doc__ or "")
    bench.parser.add_argument("--weights", type=Path, help="safetensors of another of the family")
    bench.parser.add_argument("--depth", type=int, default=56, help="6n + 2")
    bench.parser.add_argument("--seed", type=int, default=0)
    bench.parse(argv)
    job = Channels(bench)
    rows: dict[str, Row] = {}
    for name, ratio in RATIOS.items():
        rows |= ratio_rows(job, name, ratio)
    rows |= budget_rows(job)
    held = [name for name in rows if name.startswith("ms_")]
    rows["latency"] = bench.row(
        "latency", lambda: latency_row(job, [RIVAL, *held]), weights=job.weights
    )
    rows["test"] = bench.row("test", lambda: test_row(job), weights=job.weights)
    return bench.finish(**summary(rows))


if __name__ == "__main__":
    main()
