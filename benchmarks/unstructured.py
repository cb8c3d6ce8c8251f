"""Single weights of ResNet-20 and ResNet-56: four shares of zeros, in one shot and recovered.

Every (network, method, ratio) is a row of its own: accuracy in one shot, the same with batch norm
measured anew on the calibration images (`prune.obs` does that by itself, the others do not; both
are given, so that the comparison is fair), the size of the `.laconic` file, processor seconds. Its
row `..._recovered` starts from the better form and gets the same short distillation. Methods:
`obs`, `obs_fisher` and `obs_sweep` (prune.obs as it comes, with the parts of the layers by Fisher
information, and SparseGPT-like), `magnitude`, `wanda`, and `torch`: torch.nn.utils.prune, all
weights together by l1.

    python -m benchmarks.unstructured [--depth 20] [--only r20_obs_80] [--no-recovery] [--quick]
"""

import time
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from benchmarks.cifar import Cifar, recover
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages, apply
from laconic.methods.base import Outcome
from laconic.program.capture import capture
from laconic.program.program import Program
from laconic.solvers.recalibrate import recalibrate
from laconic.storage import predict

DEPTHS = (20, 56)
RATIOS = (50, 70, 80, 90)
CALIBRATION, BATCH, STEPS = 512, 64, 100
METHODS: dict[str, dict[str, Any]] = {
    "obs": {"method": "prune.obs", "samples": CALIBRATION},
    "obs_fisher": {"method": "prune.obs", "samples": CALIBRATION, "allocation": "fisher"},
    "obs_sweep": {"method": "prune.obs", "samples": CALIBRATION, "solver": "sweep"},
    "magnitude": {"method": "prune.magnitude"},
    "wanda": {"method": "prune.wanda", "samples": CALIBRATION},
    "torch": {},
}
OURS = ("obs", "obs_fisher", "obs_sweep")


class Job:
    """One network."""

    def __init__(self, bench: Bench, depth: int) -> None:
        self.bench, self.depth = bench, depth
        self.net = Cifar(bench, depth, CALIBRATION, BATCH)
        self.stages = Stages(bench, f"unstructured-resnet{depth}")
        self.steps = 2 if self.net.quick else STEPS
        self.methods = ["obs", "magnitude", "torch"] if self.net.quick else list(METHODS)

    def name(self, method: str, ratio: int) -> str:
        """The row of a method at a ratio in percent."""
        return f"r{self.depth}_{method}_{ratio}"

    def pruned(self, method: str, ratio: int) -> Program:
        """The network with `ratio` percent of its weights zero."""
        if method == "torch":
            return torch_pruned(self, ratio / 100)
        step = METHODS[method] | {"ratio": ratio / 100}
        if "samples" in step:
            step["samples"] = self.net.samples
        if self.net.quick and method == "obs":
            step["solver"] = "sweep"  # the exact one takes a row at a time
        return apply(self.net.program, step, self.net.context()).program

    def renormed(self, program: Program) -> Program:
        """The same with all batch norm statistics measured anew."""
        made = program.clone()
        recalibrate(made, self.net.calibration)
        return made


def torch_pruned(job: Job, share: float) -> Program:
    """All convolutions and linear layers pruned together by `torch.nn.utils.prune`."""
    fresh = Cifar(job.bench, job.depth, CALIBRATION, BATCH).model
    layers = [m for m in fresh.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    chosen = [(layer, "weight") for layer in layers]
    prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=share)
    for layer, name in chosen:
        prune.remove(layer, name)
        layer.weight.data += 0.0  # its zeros may be negative ones, which would cost a bit each
    program = capture(fresh, (torch.zeros(2, 3, 32, 32),))
    names = [name for name, tensor in program.tensors() if bool((tensor == 0).any())]
    program.sparse |= {name for name in names if name.endswith("weight")}
    return program


def zeros(program: Program) -> float:
    """Share of zeros among the weights of convolutions and linear layers."""
    held = [t for name, t in program.tensors() if name.endswith("weight") and t.ndim > 1]
    return sum(int((t == 0).sum()) for t in held) / sum(t.numel() for t in held)


def one_shot(job: Job, method: str, ratio: int) -> Row:
    """Accuracy as pruned and with fresh batch norm statistics; the better form is kept."""
    found: Row = {}

    def make() -> Outcome:
        start = time.process_time()
        made = job.pruned(method, ratio)
        found["cpu_s"] = time.process_time() - start
        again = job.renormed(made)
        found["val_plain"] = job.net.score(made, "validation")
        found["val_bn"] = job.net.score(again, "validation")
        better = made if found["val_plain"] >= found["val_bn"] else again
        return Outcome(program=better)

    def measured(program: Program) -> Row:
        size = job.stages.path(job.name(method, ratio)).stat().st_size
        best = max(found["val_plain"], found["val_bn"])
        return {**found, "val": best, "zeros": zeros(program), "bytes": size}

    return job.stages.row(
        job.name(method, ratio), make, measured, step=METHODS[method], calibration=job.net.samples
    )


def recovered(job: Job, method: str, ratio: int) -> Row:
    """The same after the short distillation; `torch` is `magnitude` where the weights are equal."""
    stage = job.name(method, ratio)

    def make() -> Outcome:
        context = job.net.context()
        return apply(job.stages.program(stage), recover(job.steps), context)

    def measured(program: Program) -> Row:
        return {"val": job.net.score(program, "validation"), "zeros": zeros(program),
                "bytes": job.stages.path(f"{stage}_recovered").stat().st_size}  # fmt: skip

    return job.stages.row(
        f"{stage}_recovered", make, measured, step=METHODS[method], steps=job.steps, batch=BATCH
    )


def same(job: Job, ratio: int) -> bool:
    """Whether torch's pruning and `prune.magnitude` left the same weights."""
    stages = [job.name(method, ratio) for method in ("magnitude", "torch")]
    if not all(job.stages.path(stage).exists() for stage in stages):
        return False
    ours, theirs = (dict(job.stages.program(stage).tensors()) for stage in stages)
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items() if name in ours)


def test_row(job: Job, names: list[str]) -> Row:
    """Accuracy of the kept stages on the test rows, looked at once."""
    found = {"base": job.net.score(job.net.model, "test")}
    there = [name for name in names if job.stages.path(name).exists()]
    return found | {name: job.net.score(job.stages.program(name), "test") for name in there}


def base(job: Job) -> Row:
    """The network as it is."""
    return {"val": job.net.score(job.net.model, "validation"),
            "bytes": predict(job.net.program).total}  # fmt: skip


def rows_of(job: Job, ratios: tuple[int, ...], *, train: bool) -> dict[str, Row]:
    """All rows of one network."""
    held: dict[str, Row] = {}
    held["base"] = job.bench.row(f"r{job.depth}_base", lambda: base(job))
    pairs = [(method, ratio) for ratio in reversed(ratios) for method in job.methods]
    for method, ratio in pairs:
        held[job.name(method, ratio)] = one_shot(job, method, ratio)
    for method, ratio in pairs if train else ():
        if method == "torch" and same(job, ratio):
            continue  # the same weights as `magnitude`, so the same recovery
        held[job.name(method, ratio) + "_recovered"] = recovered(job, method, ratio)
    return held


def leads(job: Job, held: dict[str, Row], ratio: int) -> dict[str, float]:
    """Points by which `obs` is ahead of each other method at its better form, on validation."""
    ours = held.get(job.name("obs", ratio), {}).get("val")
    rest = {m: held.get(job.name(m, ratio), {}).get("val") for m in METHODS if m not in OURS}
    return {m: ours - val for m, val in rest.items() if val is not None and ours is not None}


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("unstructured", __doc__ or "")
    bench.parser.add_argument("--depth", type=int, choices=DEPTHS, help="this network only")
    bench.parser.add_argument("--no-recovery", action="store_true", help="one-shot rows only")
    args = bench.parse(argv)
    ratios = (80,) if args.quick else RATIOS
    depths = [args.depth] if args.depth else [20] if args.quick else list(DEPTHS)
    summary: Row = {}
    for depth in depths:
        job = Job(bench, depth)
        held = rows_of(job, ratios, train=not args.no_recovery)
        if not args.no_recovery:
            of = {name: row["val"] for name, row in held.items() if "val" in row}
            bench.row(f"r{depth}_test", lambda j=job, n=list(of): test_row(j, n), of=of)
        summary[f"r{depth}_obs_lead"] = {f"{r}": leads(job, held, r) for r in ratios}
    return bench.finish(**summary)


if __name__ == "__main__":
    main()
