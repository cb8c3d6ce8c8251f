"""ResNet-56 on CIFAR-10: half the multiply-adds, recovered, in int8, beside what users have today.

Rows: `base` and the peers (`torch_pruning`, `nncf`), the job (`prune`, `recover`, `int8`), `test`
(every stage on the rows that were never used to choose, and on all 10,000), `latency` (ours and
the peers', interleaved in one run). Choices are made on the validation rows alone; calibration and
recovery see training images without their labels.

    python -m benchmarks.resnet56_main [--weights FILE --depth N]
"""

import copy
from argparse import Namespace
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import models, peers
from benchmarks.data import Augmented, Images, cifar10, data_folder
from benchmarks.harness import Bench, Row
from benchmarks.stages import Said, Stages, apply
from laconic.core.task import Task, classification
from laconic.methods.base import Context
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.runtimes.base import Precision, fixed_shapes
from laconic.runtimes.openvino import OpenVino
from laconic.storage import predict

RATIO = 2.1
THREADS = 2
CALIBRATION = 1_024
# The residual stream is left alone: its channels are worth more than the inner ones everywhere.
PRUNE: dict[str, Any] = {
    "method": "prune.channels",
    "sites": "layer?.?.conv1.out",
    "ratio": 1 - 1 / RATIO,
    "block": 1,
}
RECOVER: dict[str, Any] = {"method": "distill.logits", "steps": 1400}
QUANTIZE: dict[str, Any] = {"method": "quantize.static"}
TORCH_PRUNING = ("taylor", "l2", "l1", "fpgm", "bn_scale", "lamp", "hessian")


class Job:
    """The original, its data and its task."""

    samples, batch = CALIBRATION, 128
    distinct: int | None = None  # passes of augmented images, if they are to come again

    def __init__(self, args: Namespace, bench: Bench) -> None:
        self.args, self.bench, self.quick = args, bench, args.quick
        default = data_folder() / "resnet_cifar10" / f"resnet{args.depth}.safetensors"
        self.weights: Path = args.weights or default
        self.model = models.cifar_resnet(args.depth, self.weights)
        self.threads = min(THREADS, torch.get_num_threads())
        bench.variant = "" if self.weights.stem == "resnet56" else self.weights.stem
        self.stages = Stages(bench, f"resnet56_main-{self.weights.stem}")
        self.prune = PRUNE | ({"samples": 128} if self.quick else {})
        self.recover = RECOVER | ({"steps": 3} if self.quick else {})
        self.quantize = QUANTIZE | ({"samples": 32} if self.quick else {})
        self.recipe = [self.prune, self.recover, self.quantize]
        self.peers: dict[str, Any] = {}  # made once in a run

    @cached_property
    def program(self) -> Program:
        """The original, captured."""
        return capture(self.model, (torch.zeros(2, 3, 32, 32),))

    def split(self, name: str) -> Images:
        """The rows of a split; a slice of them with `--quick`."""
        images = cifar10(name)
        return images[:200] if self.quick else images

    @cached_property
    def task(self) -> Task:
        """Augmented training images, calibration images without labels, validation rows."""
        train = cifar10("train")
        images = train[:512] if self.quick else train
        return classification(
            train=Augmented(images, self.batch, seed=0, distinct=self.distinct),
            calibration=self.calibration,
            validation=list(self.batches("validation")),
        )

    @cached_property
    def calibration(self) -> list[tuple[Tensor, ...]]:
        """Unlabelled, augmented training images: the network knows the plain ones by heart."""
        count = 128 if self.quick else self.samples
        images = Augmented(cifar10("train")[:count], min(count, 256), seed=1)
        return [(pixels,) for pixels, _ in images]

    def batches(self, name: str) -> Any:
        """(pixels, labels) of a split, 500 at a time."""
        images = self.split(name)
        return zip(images.tensor().split(500), images.labels.split(500), strict=True)

    def context(self) -> Context:
        """What the methods get."""
        return Context(task=self.task, original=self.program, seed=self.args.seed,
                       progress=Said(self.bench))  # fmt: skip

    def score(self, model: Callable[[Tensor], Tensor], name: str) -> float:
        """Accuracy in percent on a split."""
        with torch.inference_mode():
            right = [(model(x).argmax(1) == y).float() for x, y in self.batches(name)]
        return 100 * torch.cat(right).mean().item()

    def arrays(self, batch: int) -> list[np.ndarray]:
        """Real validation images as the one input of a batch."""
        return [self.split("validation")[:batch].tensor().numpy()]


def inner_only(model: nn.Module) -> list[nn.Module]:
    """Layers Torch-Pruning has to leave alone: it does not follow the option-A shortcut."""
    blocks = [module for module in model.modules() if isinstance(module, models.CifarBlock)]
    ends = [module for module in (getattr(model, "conv1"), getattr(model, "linear"))]  # noqa: B009
    return ends + [block.conv2 for block in blocks]


def torch_pruned(job: Job, importance: str) -> nn.Module:
    """Torch-Pruning at the same MACs, gradients (where wanted) from the calibration images."""
    if importance in job.peers:
        return copy.deepcopy(job.peers[importance])
    count = 64 if job.quick else CALIBRATION
    images = cifar10("train")[:count]
    data = list(zip(images.tensor().split(32), images.labels.split(32), strict=True))
    job.peers[importance] = peers.torch_pruning(
        job.model, torch.zeros(1, 3, 32, 32), RATIO, importance, data, inner_only
    )
    return copy.deepcopy(job.peers[importance])


def torch_pruning_row(job: Job) -> Row:
    """Validation accuracy of every importance, plain and with batch norm recalibrated."""
    found: Row = {}
    for importance in TORCH_PRUNING[:1] if job.quick else TORCH_PRUNING:
        model = torch_pruned(job, importance)
        found[importance] = job.score(model, "validation")
        again = peers.recalibrated(model, [batch[0] for batch in job.calibration])
        found[f"{importance}+bn"] = job.score(again, "validation")
        job.bench.say(f"torch-pruning {importance}: {found}")
    names = [key for key in found if not key.endswith("+bn")]
    return {
        **found,
        "best": max(names, key=lambda name: found[name]),
        "best_bn": max(names, key=lambda name: found[f"{name}+bn"]),
    }


def nncf_model(job: Job, settings: str) -> Any:
    """`nncf.quantize` of the original on 300 training images."""
    if settings not in job.peers:
        images = cifar10("train")[: 32 if job.quick else 300].tensor()
        original = peers.openvino_model(job.model, (images[:1],))
        data = [[image[None].numpy()] for image in images]
        job.peers[settings] = peers.nncf_int8(original, data, settings=settings)
    return job.peers[settings]


def nncf_row(job: Job) -> Row:
    """Validation accuracy and size of the peer's int8 model."""
    found: Row = {}
    for settings in ("default",) if job.quick else ("default", "mixed", "best"):
        model = nncf_model(job, settings)
        found[f"{settings}_bytes"] = peers.openvino_bytes(model)
        found[f"{settings}_acc"] = job.score(in_openvino(model, job.threads), "validation")
    return found


def in_openvino(model: Any, threads: int) -> Callable[[Tensor], Tensor]:
    """An OpenVINO model as a function of a batch of up to 500 images."""
    runner = peers.openvino_runner(peers.reshaped(model, 100), "f32", threads)
    return lambda x: torch.from_numpy(peers.batched_outputs(runner, [x.numpy()], 100))


def ours(job: Job, stage: str, precision: Precision, batch: int) -> peers.Runner:
    """A stage's artifact as OpenVINO runs it."""
    runtime, program = OpenVino(), job.stages.program(stage)
    path = job.stages.file(stage, precision)
    return runtime.load(path, precision, job.threads, fixed_shapes(program, batch)).run


def our_model(job: Job, stage: str, precision: Precision) -> Callable[[Tensor], Tensor]:
    """A stage's artifact as a function of a batch of images."""
    runner = ours(job, stage, precision, 100)
    return lambda x: torch.from_numpy(peers.batched_outputs(runner, [x.numpy()], 100))


def stage_rows(job: Job) -> dict[str, Row]:
    """The job itself: prune with compensation, recover, quantise; accuracies on validation."""
    macs = cost(job.program).macs

    def pruned(program: Program) -> Row:
        return {"macs_ratio": macs / cost(program).macs, "val": job.score(program, "validation")}

    def recovered(program: Program) -> Row:
        return {"val": job.score(program, "validation")}

    def quantized(program: Program) -> Row:
        path = job.stages.file("int8", "int8")
        size = sum(file.stat().st_size for file in OpenVino().files(path))
        deployed = our_model(job, "int8", "int8")
        return {"val": job.score(deployed, "validation"), "openvino_bytes": size,
                "laconic_bytes": predict(freeze(program)).total}  # fmt: skip

    row, context = job.stages.row, job.context()
    common = {"weights": job.weights, "seed": job.args.seed}

    def after(stage: str, step: dict[str, Any]) -> Callable[[], Any]:
        return lambda: apply(job.stages.program(stage), step, context)

    return {
        "prune": row("prune", lambda: apply(job.program, job.prune, context), pruned,
                     steps=job.recipe[:1], **common),
        "recover": row("recover", after("prune", job.recover), recovered,
                       steps=job.recipe[:2], **common),
        "int8": row("int8", after("recover", job.quantize), quantized,
                    steps=job.recipe, **common),
    }  # fmt: skip


def test_row(job: Job, best: str, best_bn: str) -> Row:
    """Every stage on the test rows (never used to choose) and on all 10,000.

    Torch-Pruning with the importance that was best on validation rows, and once more with the best
    when its batch norms are recalibrated, which it does not do by itself.
    """
    again = peers.recalibrated(torch_pruned(job, best_bn), [x for (x,) in job.calibration])
    stages: dict[str, Callable[[Tensor], Tensor]] = {
        "base": job.model,
        "torch_pruning": torch_pruned(job, best),
        "torch_pruning_bn": again,
        "nncf": in_openvino(nncf_model(job, "default"), job.threads),
        "prune": job.stages.program("prune"),
        "recover": job.stages.program("recover"),
        "int8": our_model(job, "int8", "int8"),
    }
    found: Row = {}
    for name, model in stages.items():
        for split in ("test", "all"):
            found[f"{name}_{split}"] = job.score(model, split)
    return found


def latency_row(job: Job) -> Row:
    """Milliseconds of our artifact and of the peers, batch 1 and 32, interleaved in one run."""
    runners: dict[str, peers.Runner] = {}
    inputs: dict[str, list[np.ndarray]] = {}
    example = (torch.zeros(1, 3, 32, 32),)
    original = peers.openvino_model(job.model, example)
    int8 = nncf_model(job, "default")
    path = peers.onnx_file(job.model, (torch.zeros(2, 3, 32, 32),), job.stages.folder / "base.onnx")
    for batch in (1, 32):
        found: dict[str, peers.Runner] = {
            "ours_int8": ours(job, "int8", "int8", batch),
            "ours_bf16": ours(job, "recover", "bf16", batch),
            "nncf_int8": peers.openvino_runner(peers.reshaped(int8, batch), "f32", job.threads),
            "nncf_int8_bf16": peers.openvino_runner(
                peers.reshaped(int8, batch), "bf16", job.threads
            ),
            "openvino_bf16": peers.openvino_runner(
                peers.reshaped(original, batch), "bf16", job.threads
            ),
            "openvino_f32": peers.openvino_runner(
                peers.reshaped(original, batch), "f32", job.threads
            ),
            "onnxruntime_f32": peers.onnxruntime(path, job.threads),
            "eager": peers.eager(job.model, job.threads),
        }
        for name, runner in found.items():
            runners[f"{name}_b{batch}"] = runner
            inputs[f"{name}_b{batch}"] = job.arrays(batch)
    rounds, seconds = (1, 0.02) if job.quick else (11, 0.3)
    timed = peers.interleaved(runners, inputs, rounds=rounds, seconds=seconds)
    flat: Row = {"threads": job.threads, "busy": max(x["busy"] for x in timed.values())}
    for name, values in timed.items():
        flat |= {name: values["ms"], f"{name}_low": values["low"], f"{name}_high": values["high"]}
    return flat


def best(row: Row, names: tuple[str, ...], batch: int) -> tuple[float | None, str | None]:
    """The fastest of `names` at a batch size: its milliseconds and its name."""
    found = [(row[f"{name}_b{batch}"], name) for name in names if f"{name}_b{batch}" in row]
    return min(found) if found else (None, None)


def summary(rows: dict[str, Row]) -> Row:
    """The figures the issue asks for, from the rows that are there."""
    test, latency, int8 = rows["test"], rows["latency"], rows["int8"]
    jobs = [rows[name].get("job_s") for name in ("prune", "recover", "int8")]
    found: Row = {
        "base_acc": test.get("base_all"),
        "macs_ratio": rows["prune"].get("macs_ratio"),
        "acc_before_training": test.get("prune_all"),
        "acc_after_recovery": test.get("recover_all"),
        "acc_int8": test.get("int8_all"),
        "minutes": sum(jobs) / 60 if all(jobs) else None,
        "acc_before_training_torch_pruning": test.get("torch_pruning_all"),
        "acc_before_training_torch_pruning_bn": test.get("torch_pruning_bn_all"),
        "acc_int8_nncf": test.get("nncf_all"),
        "bytes_laconic": int8.get("laconic_bytes"),
        "bytes_openvino": int8.get("openvino_bytes"),
    }
    for batch in (1, 32):
        found[f"latency_ms_b{batch}"], chosen = best(latency, ("ours_int8", "ours_bf16"), batch)
        peer = ("nncf_int8", "nncf_int8_bf16", "openvino_bf16")
        found[f"best_peer_ms_b{batch}"], other = best(latency, peer, batch)
        found[f"precision_b{batch}"], found[f"best_peer_b{batch}"] = chosen, other
    return found


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("resnet56_main", __doc__ or "")
    bench.parser.add_argument("--weights", type=Path, help="safetensors of another of the family")
    bench.parser.add_argument("--depth", type=int, default=56, help="6n + 2")
    bench.parser.add_argument("--seed", type=int, default=0)
    job = Job(bench.parse(argv), bench)
    common = {"weights": job.weights, "quick": job.quick}
    rows = {
        "base": bench.row("base", lambda: {"val": job.score(job.model, "validation")}, **common)
    }
    rows["torch_pruning"] = bench.row(
        "torch_pruning", lambda: torch_pruning_row(job), ratio=RATIO, **common
    )
    rows["nncf"] = bench.row("nncf", lambda: nncf_row(job), **common)
    rows |= stage_rows(job)
    chosen = [rows["torch_pruning"].get(key, "l2") for key in ("best", "best_bn")]
    recipe = {"steps": job.recipe, "seed": job.args.seed}
    rows["test"] = bench.row("test", lambda: test_row(job, *chosen), **recipe, **common)
    rows["latency"] = bench.row("latency", lambda: latency_row(job), **recipe, **common)
    return bench.finish(**summary(rows))


if __name__ == "__main__":
    main()
