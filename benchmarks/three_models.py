"""Three fine-tunes of one ResNet-20, stored together; rows of `benchmarks.sharing`.

The CIFAR-10 network is tuned to CIFAR-10 in grey, to Fashion-MNIST and to MNIST at gentle rates,
with which every layer moves by at least 5 % of its norm (a row's notes say by how much). Then
`share.models` stores the three in one file: a common part in 8 bits per channel and coarse
differences, their steps by the Fisher information of all three on their own data; it trains what
they share and the differences towards the separate models. The ratio is to one of them alone in the
same precision (8 bits per channel, entropy-coded), which is what the same storage gives for one;
bytes in float are beside it.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks import models
from benchmarks.data import (
    Batch,
    cifar10,
    cropped_and_flipped,
    data_folder,
    greyscale,
    standardised,
)
from benchmarks.harness import Bench, Row
from benchmarks.stages import Said, Stages, apply
from laconic.core.task import classification
from laconic.methods.base import Context, Outcome
from laconic.program import members
from laconic.program.capture import capture
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.solvers.sharing import together
from laconic.storage import predict
from laconic.training.plan import computes_bf16

TASKS = ("grey", "fashion", "mnist")
TUNE: dict[str, Any] = {"steps": 500, "batch": 128, "head": 0.05, "precision": "auto"}
RATES = {"grey": 0.02, "fashion": 0.008, "mnist": 0.008}  # gentle: each layer moves by 5 % or more
SHARE: dict[str, Any] = {
    "method": "share.models", "bits": 8, "size": 1.29, "weighted": "fisher", "samples": 256,
    "steps": 1000, "lr": 0.015, "optimizer": "sgd", "weight_decay": 0.0,
}  # fmt: skip
LUMA = (0.299, 0.587, 0.114)


@cache
def images(task: str, split: str) -> Batch:
    """uint8 `[n, 3, 32, 32]`, three equal channels, and labels."""
    if task == "grey":
        held = cifar10(split)
        pixels = torch.from_numpy(np.array(held.pixels)).permute(0, 3, 1, 2).float()
        grey = (pixels * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True).round().byte()
        return grey.expand(-1, 3, -1, -1), held.labels
    pixels, labels = greyscale({"fashion": "fashion_mnist"}.get(task, task), split)
    padded = functional.pad(pixels, (2, 2, 2, 2))[:, None]
    return padded.expand(-1, 3, -1, -1), labels


def drawn(task: str, count: int, generator: torch.Generator) -> Batch:
    """Training images of a task, moved and (but for digits) mirrored."""
    pixels, labels = images(task, "train")
    rows = torch.randint(len(pixels), (count,), generator=generator)
    batch = pixels[rows]
    if task != "mnist":
        batch = cropped_and_flipped(batch, generator, 2)
    return standardised(batch), labels[rows]


class Mixed:
    """Batches of all three tasks by name; only the pass's number decides what is in them."""

    def __init__(self, batches: int = 400, size: int = 64) -> None:
        self.batches, self.size, self.passes = batches, size, 0

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """The next pass is number `epoch`."""
        self.passes = epoch

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        generator = torch.Generator().manual_seed(self.passes)
        self.passes += 1
        for _ in range(self.batches):
            yield {task: drawn(task, self.size, generator) for task in TASKS}


def tuned(task: str, steps: int) -> Outcome:
    """A fine-tune, batch norms folded: a gentle rate for the body, a higher one for the head."""
    torch.manual_seed(0)
    model = models.cifar_resnet(20, data_folder() / "resnet_cifar10" / "resnet20.safetensors")
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    head = list(model.get_submodule("linear").parameters())
    body = [p for name, p in model.named_parameters() if not name.startswith("linear")]
    optimizer = torch.optim.SGD(
        [{"params": body, "peak": RATES[task]}, {"params": head, "peak": TUNE["head"]}],
        momentum=0.9, nesterov=True, weight_decay=5e-4,
    )  # fmt: skip
    generator, half = torch.Generator().manual_seed(1), computes_bf16(torch.device("cpu"))
    model.train().to(memory_format=torch.channels_last)
    for step in range(steps):
        for group in optimizer.param_groups:
            rising = min(1.0, (step + 1) / 20)
            group["lr"] = group["peak"] * rising * 0.5 * (1 + math.cos(math.pi * step / steps))
        pixels, labels = drawn(task, int(TUNE["batch"]), generator)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            given = model(pixels)
        loss = functional.cross_entropy(given.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().to(memory_format=torch.contiguous_format)
    moved = {
        name: ((tensor - before[name]).norm() / before[name].norm()).item()
        for name, tensor in model.named_parameters()
        if tensor.ndim > 1
    }
    program = capture(model, (torch.zeros(2, 3, 32, 32),))
    context = Context(task=classification(), original=program)
    folded = apply(program, {"method": "simplify.fold"}, context).program
    said = [
        f"{name}: moved by {100 * moved[name]:.2f} %"
        for name in sorted(moved, key=lambda name: moved[name])
    ]
    return Outcome(program=folded, notes=said)


def accuracy(program: Program, task: str, split: str, quick: bool) -> float:
    """Percent of a split."""
    pixels, labels = (tensor[: 500 if quick else None] for tensor in images(task, split))
    with torch.inference_mode():
        right = [
            (program(standardised(x)).argmax(1) == y).float()
            for x, y in zip(pixels.split(500), labels.split(500), strict=True)
        ]
    return 100 * torch.cat(right).mean().item()


def accuracies(programs: dict[str, Program], split: str, quick: bool) -> Row:
    """Percent of each model on its own task."""
    return {task: accuracy(program, task, split, quick) for task, program in programs.items()}


def rows(bench: Bench) -> Row:
    """The fine-tunes, the joint file, and how far each model is from its separate self."""
    quick, stages = bool(bench.args.quick), Stages(bench, "three_models")
    steps = 3 if quick else int(TUNE["steps"])
    for task in TASKS:
        stages.row(
            f"tuned_{task}", lambda t=task: tuned(t, steps),
            lambda program, t=task: {"val": accuracy(program, t, "validation", quick)},
            tune=TUNE | {"steps": steps, "lr": RATES[task]},
        )  # fmt: skip
    share = SHARE | ({"steps": 1, "samples": 16} if quick else {})

    def joined() -> Outcome:
        first = stages.program(f"tuned_{TASKS[0]}")
        others = {task: str(stages.path(f"tuned_{task}")) for task in TASKS[1:]}
        context = Context(task=classification(train=Mixed()), original=first, progress=Said(bench))
        made = apply(first, share | {"others": others, "called": TASKS[0]}, context)
        return Outcome(program=freeze(made.program), notes=made.notes)

    def measured(program: Program) -> Row:
        first, size = (
            stages.program(f"tuned_{TASKS[0]}"),
            stages.path("three_models").stat().st_size,
        )
        names = [site.name for site in weight_sites(first)[0]]
        one = predict(freeze(together.gridded(first, names, SHARE["bits"]))).total
        alone = {task: stages.program(f"tuned_{task}") for task in TASKS}
        separate = accuracies(alone, "validation", quick)
        shared = accuracies(members.members(program), "validation", quick)
        return {
            "bytes": size, "bytes_one": one, "ratio": size / one,
            "bytes_one_float": stages.path(f"tuned_{TASKS[0]}").stat().st_size,
            **{f"val_drop_{task}": separate[task] - shared[task] for task in TASKS},
        }  # fmt: skip

    joint = stages.row("three_models", joined, measured, share=share)

    def test() -> Row:
        alone = {task: stages.program(f"tuned_{task}") for task in TASKS}
        separate = accuracies(alone, "test", quick)
        shared = accuracies(members.members(stages.program("three_models")), "test", quick)
        return {
            **{f"{task}_alone": separate[task] for task in TASKS},
            **{f"{task}_joint": shared[task] for task in TASKS},
            "largest_drop": max(separate[task] - shared[task] for task in TASKS),
        }

    tested = bench.row("test_three_models", test, share=share)
    return {
        "three_models_ratio": joint.get("ratio"),
        "three_models_bytes": joint.get("bytes"),
        "three_models_largest_drop": tested.get("largest_drop"),
    }
