"""Transformers at twice the speed: heads, width and layers removed under one latency budget.

The budget is a part of the dense network's milliseconds in OpenVINO (fp32, batch 1), measured here
in turns, as processor time of one thread: the machine may have other work to do.
Candidates drop no, one or two layers; heads and feed-forward widths pay what is left of the budget,
by a latency table and a knapsack; the candidate that does best before any training is recovered.

Rows: `vit_dense` (a small vision transformer, trained on CIFAR-10 here), `vit_pruned`,
`vit_recovered`; `minilm_pruned`, `minilm_recovered` (on the text of `benchmarks.minilm_main`);
`test` (images and sentences that were never used to choose) and `latency` (dense and compressed in
turn, fp32 and bf16, two batch sizes; by the wall clock, and again in processor time, `_cpu`).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import minilm_main, peers, vit
from benchmarks.harness import Bench, Row
from benchmarks.resnet56_latency import QUICK, TABLE, TOGETHER, Clock, Timed, timed
from benchmarks.stages import Stages, apply
from laconic.core.errors import BudgetError
from laconic.methods.base import Context, Outcome
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.runtimes.base import Precision, fixed_shapes
from laconic.runtimes.openvino import OpenVino

RATIO = 0.53  # of the milliseconds goes: twice the speed, and something for the clock's noise
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
LARGE = {"vit": 32, "minilm": 8}  # the second batch size
MLP = {"vit": "*.mlp.*", "minilm": "*.intermediate.*"}
RECOVER: dict[str, dict[str, Any]] = {
    "vit": {
        "method": "distill.logits", "steps": 3000, "optimizer": "adamw", "lr": 6e-4,
        "weight_decay": 0.05, "alpha": 0.5, "temperature": 2.0,
    },
    "minilm": minilm_main.RECOVER | {"steps": 3000, "features": 2.0},
}  # fmt: skip

Steps = list[dict[str, Any]]


class Minilm(minilm_main.Job):
    """The model and the text of `minilm_main`; stages of its own."""

    def __init__(self, bench: Bench, stages: Stages) -> None:
        super().__init__(bench)
        self.stages, self.threads = stages, int(bench.args.threads)

    def setting(self) -> Context:
        """What the methods get."""
        return replace(self.context(), threads=self.threads)

    def first(self, batch: int) -> list[np.ndarray]:
        """Real dev sentences as the inputs of a batch."""
        return [np.concatenate(part) for part in zip(*self.arrays("dev")[:batch], strict=True)]

    def dev(self, program: Program) -> Row:
        """Cosine over SST-2 dev sentences, in torch."""

        def run(inputs: Any) -> list[np.ndarray]:
            with torch.inference_mode():
                return [program(*(torch.from_numpy(array) for array in inputs)).numpy()]

        return minilm_main.spread(self.cosines(run, "dev", 24), "cosine")


def candidates(model: str, quick: bool) -> dict[str, Steps]:
    """Ways to the same milliseconds, by name."""
    few: dict[str, Any] = {}
    if quick:
        few = {"samples": 24, "importance": "l2", "ratio": 0.02, "block": 8}
    shrink: dict[str, Any] = {
        "method": "prune.channels", "sites": ["*.heads", MLP[model]], "of": "ms",
        "against": "original", "ratio": RATIO, **few,
    }  # fmt: skip
    wider = shrink | {"sites": [*shrink["sites"], "stem.*"]}

    def drop(count: int, replace_by: str) -> dict[str, Any]:
        return {"method": "simplify.drop_layers", "count": count, "unit": 2, "importance": "loss",
                "replace": replace_by}  # fmt: skip

    found: dict[str, Steps] = {
        "no layer": [shrink],
        "1 layer, replaced": [drop(1, "linear"), shrink],
        "1 layer": [drop(1, "nothing"), shrink],
        "2 layers, replaced": [drop(2, "linear"), shrink],
        "2 layers": [drop(2, "nothing"), shrink],
        "1 layer, replaced; stem": [drop(1, "linear"), wider],
    }
    if quick:
        return {"1 layer": found["1 layer"]}
    wanted = {
        "vit": ("no layer", "1 layer, replaced", "2 layers, replaced", "2 layers",
                "1 layer, replaced; stem"),
        "minilm": ("no layer", "1 layer, replaced", "2 layers, replaced"),
    }  # fmt: skip
    return {name: found[name] for name in wanted[model]}


def clocked(program: Program, step: Mapping[str, Any], context: Context) -> Outcome:
    """A step of `prune.channels` by a clock that counts the processor's time."""
    options = {key: value for key, value in step.items() if key not in ("method", "sites")}
    quick = step["ratio"] != RATIO
    clock = Clock("openvino", 1, context.threads or 1, QUICK if quick else TABLE)
    return Timed(clock=clock, **options).apply(program, Sites.of(step["sites"]), context)


class Tried:
    """The candidates of one model: what each scores and how long it takes."""

    def __init__(self, bench: Bench, score: Callable[[Program], float]) -> None:
        self.bench, self.score = bench, score
        self.rows: dict[str, Row] = {}

    def best(self, start: Program, context: Context, found: Mapping[str, Steps]) -> Outcome:
        """The candidate with the best score before any training."""
        made: dict[str, Outcome] = {}
        for name, steps in found.items():
            try:
                made[name] = self.through(name, start, context, steps)
            except BudgetError as error:
                self.rows[name] = {"refused": str(error)}
            self.bench.say(f"{name}: {self.rows[name]}")
        if not made:
            raise SystemExit(f"no candidate meets the budget: {self.rows}")
        return made[max(made, key=lambda name: self.rows[name]["score"])]

    def through(self, name: str, start: Program, context: Context, steps: Steps) -> Outcome:
        """One candidate."""
        outcome = Outcome(program=start)
        row: Row = {}
        for step in steps:
            run = clocked if step.get("of") == "ms" else apply
            outcome = run(outcome.program, step, context)
            row |= {
                key: outcome.figures[key] for key in ("dropped", "kept") if key in outcome.figures
            }
        whole, now = outcome.figures["latency"]["milliseconds"]
        row |= {"score": self.score(outcome.program), "speedup": whole / now,
                "macs_ratio": cost(context.original).macs / cost(outcome.program).macs}  # fmt: skip
        self.rows[name] = row
        return outcome


def vit_rows(images: vit.Cifar) -> dict[str, Row]:
    """Dense, pruned, recovered; accuracies on validation rows."""

    def val(program: Program) -> Row:
        return {"val": images.score(program, "validation")}

    row, common = images.stages.row, {"seed": images.seed, "sizes": images.sizes}
    tried = Tried(images.bench, lambda program: val(program)["val"])
    found = candidates("vit", images.quick)
    recover = RECOVER["vit"] | ({"steps": 3, "evaluations": 1} if images.quick else {})
    threads = images.threads
    return {
        "vit_dense": row("vit_dense", images.trained, val, steps=[images.train], **common),
        "vit_pruned": row(
            "vit_pruned", lambda: tried.best(images.program, images.context(), found),
            lambda program: {**val(program), "candidates": tried.rows},
            steps=found, threads=threads, clock="processor", **common,
        ),
        "vit_recovered": row(
            "vit_recovered",
            lambda: apply(images.stages.program("vit_pruned"), recover, images.context()), val,
            steps=found, recover=recover, threads=threads, clock="processor", **common,
        ),
    }  # fmt: skip


def minilm_rows(job: Minilm) -> dict[str, Row]:
    """Pruned further, recovered; cosines over SST-2 dev sentences."""
    row, seed = job.stages.row, int(job.bench.args.seed)
    tried = Tried(job.bench, lambda program: job.dev(program)["cosine"])
    found = candidates("minilm", job.quick)
    recover = RECOVER["minilm"] | ({"steps": 3} if job.quick else {})
    return {
        "minilm_pruned": row(
            "minilm_pruned", lambda: tried.best(job.program, job.setting(), found),
            lambda program: {**job.dev(program), "candidates": tried.rows},
            steps=found, threads=job.threads, clock="processor", seed=seed,
        ),
        "minilm_recovered": row(
            "minilm_recovered",
            lambda: apply(job.stages.program("minilm_pruned"), recover, job.setting()), job.dev,
            steps=found, recover=recover, threads=job.threads, clock="processor",
            seed=seed,
        ),
    }  # fmt: skip


# deployed ---------------------------------------------------------------------------------------


def made(stages: Stages, model: str) -> bool:
    """Whether a model has been recovered."""
    return stages.path(f"{model}_recovered").exists()


def precisions(quick: bool) -> tuple[Precision, ...]:
    """What the networks are timed in; the first only in the quick form."""
    return PRECISIONS[:1] if quick else PRECISIONS


def loaded(
    stages: Stages, name: str, program: Program, precision: Precision, batch: int
) -> peers.Runner:
    """A program as OpenVINO runs it."""
    runtime, threads = OpenVino(), int(stages.bench.args.threads)
    if stages.path(name).exists():
        path = stages.file(name, precision)
    else:  # MiniLM as it was
        path = runtime.write(program, stages.folder / f"{name}-{precision}.xml", precision)
    return runtime.load(path, precision, threads, fixed_shapes(program, batch)).run


def test_row(images: vit.Cifar, job: Minilm) -> Row:
    """Images and sentences that nothing was chosen by, in both precisions."""
    found: Row = {}
    for name in ("dense", "pruned", "recovered") if made(images.stages, "vit") else ():
        program = images.stages.program(f"vit_{name}")
        for precision in precisions(images.quick):
            run = loaded(images.stages, f"vit_{name}", program, precision, 100)

            def model(pixels: Tensor, run: peers.Runner = run) -> Tensor:
                return torch.from_numpy(peers.batched_outputs(run, [pixels.numpy()], 100))

            for split in ("test", "all"):
                found[f"vit_{name}_{precision}_{split}"] = images.score(model, split)
    for name in ("pruned", "recovered") if made(job.stages, "minilm") else ():
        program = job.stages.program(f"minilm_{name}")
        for precision in precisions(images.quick):
            run = loaded(job.stages, f"minilm_{name}", program, precision, 8)
            key = f"minilm_{name}_{precision}"
            found |= minilm_main.spread(job.cosines(run, "test", 8), key)
    return found


def latency_row(images: vit.Cifar, job: Minilm) -> Row:
    """Milliseconds of the dense and the compressed network, all in turn, in one run."""
    runners: dict[str, peers.Runner] = {}
    inputs: dict[str, Any] = {}
    stages, quick = images.stages, images.quick
    for model in (name for name in ("vit", "minilm") if made(stages, name)):
        dense, arrays = (
            (images.program, images.arrays) if model == "vit" else (job.program, job.first)
        )
        programs = {"dense": dense, "recovered": stages.program(f"{model}_recovered")}
        for batch in (1,) if quick else (1, LARGE[model]):
            for precision in precisions(quick):
                for name, program in programs.items():
                    key = f"{model}_{name}_{precision}_b{batch}"
                    runners[key] = loaded(stages, f"{model}_{name}", program, precision, batch)
                    inputs[key] = arrays(batch)
    rounds, seconds = (2, 0.05) if quick else (9, 0.3)
    walls = peers.interleaved(runners, inputs, rounds=rounds, seconds=seconds)
    flat: Row = {"threads": int(images.bench.args.threads),
                 "busy": max((x["busy"] for x in walls.values()), default=0.0)}  # fmt: skip
    for key, values in walls.items():
        flat |= {key: values["ms"], f"{key}_low": values["low"], f"{key}_high": values["high"]}
    calls = {key: lambda key=key: runners[key](inputs[key]) for key in runners}
    for key, turns in timed(calls, QUICK if quick else TOGETHER).items():
        flat[f"{key}_cpu"] = median(turns)
    return flat


def speedups(latency: Row) -> Row:
    """Dense over compressed at equal precision and batch size: medians, fastest, processor."""
    found: Row = {}
    for model, large in LARGE.items():
        for precision in PRECISIONS:
            for batch in (1, large):
                end = f"{precision}_b{batch}"
                for turn in ("", "_low", "_cpu"):
                    dense = latency.get(f"{model}_dense_{end}{turn}")
                    if dense:
                        small = latency[f"{model}_recovered_{end}{turn}"]
                        found[f"{model}_speedup_{end}{turn}"] = dense / small
    return found


def summary(rows: dict[str, Row]) -> Row:
    """The figures the issue asks for, from the rows that are there."""
    test, faster = rows["test"], speedups(rows["latency"])
    return {
        "vit_speedup": faster.get("vit_speedup_fp32_b1"),
        "vit_accuracy": test.get("vit_recovered_fp32_test"),
        "vit_accuracy_dense": test.get("vit_dense_fp32_test"),
        "vit_accuracy_before_training": test.get("vit_pruned_fp32_test"),
        "minilm_speedup": faster.get("minilm_speedup_fp32_b1"),
        "minilm_cosine": test.get("minilm_recovered_fp32"),
        "minilm_cosine_before_training": test.get("minilm_pruned_fp32"),
        **faster,
    }


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("transformer_pruning", __doc__ or "")
    bench.parser.add_argument("--seed", type=int, default=0)
    bench.parser.add_argument("--threads", type=int, default=1, help="of the runtime")
    steps = vit.TRAIN["steps"]
    bench.parser.add_argument("--steps", type=int, default=steps, help="of the dense ViT")
    bench.parse(argv)
    stages = Stages(bench, "transformer_pruning")
    images, job = vit.Cifar(bench, stages, bench.args.steps), Minilm(bench, stages)
    rows = vit_rows(images) | minilm_rows(job)
    common = {"seed": int(bench.args.seed), "threads": images.threads}
    rows["test"] = bench.row("test", lambda: test_row(images, job), **common)
    rows["latency"] = bench.row("latency", lambda: latency_row(images, job), **common)
    return bench.finish(**summary(rows))


if __name__ == "__main__":
    main()
