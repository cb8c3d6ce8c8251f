"""LeNet-300-100 on Fashion-MNIST: neurons leave both hidden layers, and nothing is trained after.

The dense network is trained here with plain cross-entropy and weight decay (the last 10,000
training images are validation; of two starts the best on them stays). Then 50, 60, 70 and 80 % of
the neurons of each hidden layer go, by several recipes of this toolkit that see training images
without labels; the best on validation stays. Row `test` looks at the test images once, at the end.

Published (best of Neuron Merging, Kim et al. 2020, and LBYL, 2022; dense 89.80, both without data):
88.83, 87.75, 83.92, 80.02. Rows `control_*`: magnitudes alone, and chance with the same repair.

    python -m benchmarks.lenet_fashion_neurons [--only cut_80] [--quick]
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.data import Batch, greyscale
from benchmarks.harness import Bench, Row
from benchmarks.stages import Said, Stages, apply
from laconic.core.task import Task, classification
from laconic.methods.base import Context, Outcome
from laconic.program.capture import capture
from laconic.program.program import Program

MEAN, STD = 0.2860, 0.3530  # of the training pixels
WIDTHS = (784, 300, 100, 10)
RATIOS = (50, 60, 70, 80)
PUBLISHED = {50: 88.83, 60: 87.75, 70: 83.92, 80: 80.02}
TRAIN: dict[str, Any] = {
    "epochs": 30, "batch": 128, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "starts": 2,
}  # fmt: skip
CUT: dict[str, Any] = {
    "method": "prune.channels", "of": "channels", "scope": "layer", "block": 1, "samples": 50_000,
}  # fmt: skip
MERGE: dict[str, Any] = {"method": "simplify.merge_neurons"}
Recipe = list[dict[str, Any]]


def recipes() -> dict[str, Recipe]:
    """What is tried at each ratio; all of it without labels and without a gradient step."""
    found: dict[str, Recipe] = {
        f"temperature {t:g}": [CUT | {"temperature": t}] for t in (1.0, 2.0, 3.0)
    }
    found["two rounds"] = [CUT | {"temperature": 2.0, "rounds": 2}]
    found["equal neurons merged first"] = [MERGE, CUT | {"temperature": 2.0}]
    return found


class Job:
    """The data, the dense network and what the methods get."""

    def __init__(self, args: Namespace, bench: Bench) -> None:
        self.bench, self.quick = bench, args.quick
        self.stages = Stages(bench, "lenet_fashion_neurons")
        small = {"epochs": 1, "starts": 1} if self.quick else {}
        self.training = TRAIN | small

    def split(self, name: str) -> Batch:
        """float32 `[n, 784]` with mean 0 and deviation 1, and labels."""
        pixels, labels = greyscale("fashion_mnist", name)
        if self.quick:
            pixels, labels = pixels[:1_000], labels[:1_000]
        return ((pixels.float() / 255 - MEAN) / STD).flatten(1), labels

    @cached_property
    def task(self) -> Task:
        """Training images without labels for calibration; validation images."""
        pixels, _ = self.split("train")
        held = self.split("validation")
        return classification(calibration=[(x,) for x in pixels.split(500)], validation=[held])

    def score(self, model: Callable[[Tensor], Tensor], name: str) -> float:
        """Accuracy in percent on a split."""
        pixels, labels = self.split(name)
        with torch.inference_mode():
            return 100 * (model(pixels).argmax(1) == labels).float().mean().item()


def lenet(generator: torch.Generator) -> nn.Sequential:
    """LeNet-300-100: `[batch, 784]` -> `[batch, 10]`, torch's own initialisation."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(WIDTHS[:-1], WIDTHS[1:], strict=True):
        layer = nn.Linear(inputs, outputs)
        for tensor in (layer.weight, layer.bias):
            nn.init.uniform_(tensor, -(inputs**-0.5), inputs**-0.5, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trained(data: Batch, options: Mapping[str, Any], seed: int) -> nn.Module:
    """One network: SGD with Nesterov momentum, cosine from `lr` to zero, nothing else."""
    generator = torch.Generator().manual_seed(seed)
    model = lenet(generator)
    steps = options["epochs"] * (len(data[1]) // options["batch"])
    optimizer = torch.optim.SGD(
        model.parameters(), options["lr"], momentum=options["momentum"], nesterov=True,
        weight_decay=options["weight_decay"],
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(options["epochs"]):
        order = torch.randperm(len(data[1]), generator=generator)
        for rows in order.split(options["batch"])[: len(order) // options["batch"]]:
            loss = functional.cross_entropy(model(data[0][rows]), data[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def dense(job: Job) -> Outcome:
    """The best start on validation."""
    data, starts = job.split("train"), range(job.training["starts"])
    models = [trained(data, job.training, seed) for seed in starts]
    scores = [job.score(model, "validation") for model in models]
    best = models[scores.index(max(scores))]
    program = capture(best, (torch.zeros(2, WIDTHS[0]),))
    return Outcome(program=program, notes=[f"validation of each start: {scores}"])


def after(job: Job, recipe: Sequence[Mapping[str, Any]], ratio: int) -> Program:
    """The dense network with `ratio` percent of each hidden layer's neurons gone."""
    whole = program = job.stages.program("dense")
    context = Context(task=job.task, original=whole, progress=Said(job.bench))
    left = 1 - ratio / 100
    for step in recipe:
        if step["method"] == "prune.channels":
            now = hidden(program)
            parts = {f"{i}.out": max(0.0, 1 - left * WIDTHS[place + 1] / now[place])
                     for place, i in enumerate((0, 2))}  # fmt: skip
            step = dict(step) | {"ratio": parts}
        program = apply(program, step, context).program
    return program


def hidden(program: Program) -> list[int]:
    """Neurons in the two hidden layers."""
    return [int(program.tensor(f"{i}.weight").shape[0]) for i in (0, 2)]


def cut_row(job: Job, ratio: int, tried: Mapping[str, Recipe], name: str) -> Row:
    """Every recipe on validation; the best is kept as a stage."""
    found: Row = {}

    def best() -> Outcome:
        held: dict[str, Program] = {}
        for label, recipe in tried.items():
            held[label] = after(job, recipe, ratio)
            found[label] = job.score(held[label], "validation")
        chosen = max(held, key=lambda label: found[label])
        found["chosen"] = chosen
        return Outcome(program=held[chosen])

    def measured(program: Program) -> Row:
        return {"val": job.score(program, "validation"), "hidden": hidden(program), **found}

    return job.stages.row(name, best, measured, recipes=tried, training=job.training)


def controls() -> dict[str, Recipe]:
    """Magnitudes without repair, and chance with it: what the score and the repair are worth."""
    return {
        "l1": [CUT | {"importance": "l1", "compensate": False}],
        "random": [CUT | {"importance": "random"}],
    }


def test_row(job: Job, names: Sequence[str]) -> Row:
    """Accuracy of every stage on the test images, looked at once."""
    return {name: job.score(job.stages.program(name), "test") for name in names}


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("lenet_fashion_neurons", __doc__ or "")
    job = Job(bench.parse(argv), bench)
    job.stages.row("dense", lambda: dense(job),
                   lambda program: {"val": job.score(program, "validation")},
                   training=job.training)  # fmt: skip
    tried = dict(list(recipes().items())[:1]) if job.quick else recipes()
    names = ["dense"]
    for ratio in RATIOS:
        cut_row(job, ratio, tried, f"cut_{ratio}")
        names.append(f"cut_{ratio}")
    for label, recipe in controls().items():
        for ratio in RATIOS[:1] if job.quick else RATIOS:
            name = f"control_{label}_{ratio}"
            cut_row(job, ratio, {label: recipe}, name)
            names.append(name)
    test = bench.row("test", lambda: test_row(job, names), recipes=tried, training=job.training)
    accuracies = {f"acc_{ratio}": test.get(f"cut_{ratio}") for ratio in RATIOS}
    return bench.finish(base_acc=test.get("dense"), **accuracies, published=PUBLISHED)


if __name__ == "__main__":
    main()
