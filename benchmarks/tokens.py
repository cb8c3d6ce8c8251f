"""Fewer tokens in a small vision transformer: time saved at stated loss, before and after training.

The dense network is that of `benchmarks.transformer_pruning` where the cache holds it, else it is
trained here for fewer steps (row `dense`). Then, for each way: accuracy at once (`NAME`) and after
a short recovery from the dense network (`NAME_recovered`); `test` (images that nothing was chosen
on, in OpenVINO) and `latency` (OpenVINO, all in turn, fp32 and bf16, batch 1 and 32).

Ways: `merge` (bipartite soft matching behind three of six layers), `merge_all` (behind every
layer, a few each), `drop` (what attention looks away from) and `fuse` (the same, into one token).

    python -m benchmarks.tokens [--only merge] [--quick]
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers, vit
from benchmarks.data import cache_folder
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages, apply
from laconic.methods.base import Outcome
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.runtimes.base import Precision, fixed_shapes
from laconic.runtimes.openvino import OpenVino
from laconic.storage import load

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
LARGE = 32
SHORT = 3_000  # steps of the dense network's training, where it has to be trained here
SOME = ["layers.0", "layers.2", "layers.4"]
WAYS: dict[str, dict[str, Any]] = {
    "merge": {"method": "dynamic.tokens", "sites": SOME, "ratio": 0.3},
    "merge_all": {"method": "dynamic.tokens", "ratio": 0.15},
    "drop": {"method": "dynamic.tokens", "sites": SOME, "ratio": 0.3, "by": "drop"},
    "fuse": {"method": "dynamic.tokens", "sites": SOME, "ratio": 0.3, "by": "fuse"},
}
RECOVER: dict[str, Any] = {
    "method": "distill.logits", "steps": 1000, "optimizer": "adamw", "lr": 4e-4,
    "weight_decay": 0.05, "alpha": 0.5, "temperature": 2.0, "evaluations": 4,
}  # fmt: skip


class Images(vit.Cifar):
    """The small transformer and its data; the dense network from the cache, or trained shorter."""

    def __init__(self, bench: Bench, stages: Stages) -> None:
        super().__init__(bench, stages, SHORT)
        self.held = cache_folder() / "transformer_pruning" / "vit_dense.laconic"
        self.cached = self.held.exists() and not self.quick

    @property
    def program(self) -> Program:  # type: ignore[override]
        """The dense network."""
        return self.stages.program("dense")

    def dense(self) -> Outcome:
        """The dense network, taken from the cache or trained."""
        if not self.cached:
            return self.trained()
        return Outcome(program=load(self.held), notes=["the one of benchmarks.transformer_pruning"])


def model_rows(images: Images) -> dict[str, Row]:
    """Dense, and for each way before and after recovery; accuracies on validation rows."""
    stages, quick = images.stages, images.quick

    def val(program: Program) -> Row:
        return {"val": images.score(program, "validation")}

    def reduced(step: dict[str, Any]) -> Callable[[], Outcome]:
        return lambda: apply(images.program, step, images.context())

    def recovered(name: str, step: dict[str, Any]) -> Callable[[], Outcome]:
        return lambda: apply(stages.program(name), step, images.context())

    def measured(program: Program) -> Row:
        return {**val(program), "macs_ratio": cost(images.program).macs / cost(program).macs}

    common: dict[str, Any] = {"seed": images.seed, "sizes": images.sizes}
    found = {"dense": stages.row("dense", images.dense, val, cached=images.cached,
                                 train=images.train, **common)}  # fmt: skip
    recover = RECOVER | ({"steps": 3, "evaluations": 1} if quick else {})
    for name in ways(quick):
        step = way(name, quick)
        found[name] = stages.row(name, reduced(step), measured, step=step, **common)
        found[f"{name}_recovered"] = stages.row(
            f"{name}_recovered", recovered(name, recover), measured, step=step, recover=recover,
            **common,
        )  # fmt: skip
    return found


def ways(quick: bool) -> list[str]:
    """Names of the ways; two in the quick form."""
    return ["merge", "drop"] if quick else list(WAYS)


def way(name: str, quick: bool) -> dict[str, Any]:
    """The step of a way; the small network of the quick form has three layers only."""
    step = WAYS[name]
    return step | {"sites": ["layers.0"]} if quick and "sites" in step else step


def precisions(quick: bool) -> tuple[Precision, ...]:
    """What the networks are timed in; the first only in the quick form."""
    return PRECISIONS[:1] if quick else PRECISIONS


def loaded(images: Images, name: str, precision: Precision, batch: int) -> peers.Runner:
    """A stage as OpenVINO runs it."""
    runtime, program = OpenVino(), images.stages.program(name)
    path = images.stages.file(name, precision)
    return runtime.load(path, precision, images.threads, fixed_shapes(program, batch)).run


def made(images: Images) -> list[str]:
    """The stages that are there."""
    names = [f"{name}{end}" for name in ways(images.quick) for end in ("", "_recovered")]
    return [name for name in ["dense", *names] if images.stages.path(name).exists()]


def test_row(images: Images) -> Row:
    """Accuracy on the test images, in OpenVINO."""
    found: Row = {}
    for name in made(images):
        for precision in precisions(images.quick):
            run = loaded(images, name, precision, 100)

            def model(pixels: Tensor, run: peers.Runner = run) -> Tensor:
                return torch.from_numpy(peers.batched_outputs(run, [pixels.numpy()], 100))

            found[f"{name}_{precision}"] = images.score(model, "test")
    return found


def latency_row(images: Images) -> Row:
    """Milliseconds of the dense network and of every way, all in turn, in one run."""
    runners: dict[str, peers.Runner] = {}
    inputs: dict[str, Any] = {}
    names = [name for name in made(images) if not name.endswith("_recovered")]
    for batch in (1,) if images.quick else (1, LARGE):
        for precision in precisions(images.quick):
            for name in names:
                key = f"{name}_{precision}_b{batch}"
                runners[key] = loaded(images, name, precision, batch)
                inputs[key] = images.arrays(batch)
    rounds, seconds = (2, 0.05) if images.quick else (9, 0.3)
    timed = peers.interleaved(runners, inputs, rounds=rounds, seconds=seconds)
    flat: Row = {"threads": images.threads, "busy": max(x["busy"] for x in timed.values())}
    for key, values in timed.items():
        flat |= {key: values["ms"], f"{key}_low": values["low"], f"{key}_high": values["high"]}
    return flat


def summary(images: Images, rows: dict[str, Row]) -> Row:
    """Accuracy before and after training, and time saved, for each way."""
    test, latency = rows["test"], rows["latency"]
    found: Row = {"acc": test.get("dense_fp32")}
    for name in ways(images.quick):
        found |= {
            f"acc_{name}_before_training": test.get(f"{name}_fp32"),
            f"acc_{name}": test.get(f"{name}_recovered_fp32"),
        }
        for precision in PRECISIONS:
            for batch in (1, LARGE):
                end = f"{precision}_b{batch}"
                dense, own = latency.get(f"dense_{end}"), latency.get(f"{name}_{end}")
                if dense and own:
                    found[f"latency_ratio_{name}_{end}"] = dense / own
    return found


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("tokens", __doc__ or "")
    bench.parser.add_argument("--seed", type=int, default=0)
    bench.parser.add_argument("--threads", type=int, default=1, help="of the runtime")
    bench.parse(argv)
    images = Images(bench, Stages(bench, "tokens"))
    rows = model_rows(images)
    common = {"seed": images.seed, "threads": images.threads, "ways": ways(images.quick)}
    rows["test"] = bench.row("test", lambda: test_row(images), **common)
    rows["latency"] = bench.row("latency", lambda: latency_row(images), **common)
    return bench.finish(**summary(images, rows))


if __name__ == "__main__":
    main()
