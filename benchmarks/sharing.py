"""Deep Compression's table on MNIST: prune, cluster, entropy-code LeNet-300-100 and LeNet-5.

Each network is trained here on images moved by up to two pixels (the last 10,000 training images
are validation), loses weights gradually to several sparsities on images moved by up to one, gets
one codebook of 16 values a layer, and its values are trained on. The size is that of the `.laconic`
file. The smallest file whose validation error is below the published error by a margin of 0.1 is
taken; `test` looks at the test images once, at the end.

Rows of three fine-tunes in one file: see `benchmarks/three_models.py`.

Published (Han et al. 2016, arXiv 1510.00149): LeNet-300-100 1,070 kB → 27 kB (40x) at 1.58 % error,
LeNet-5 1,720 kB → 44 kB (39x) at 0.74 %.

    python -m benchmarks.sharing [--only lenet300_dense ...] [--quick]
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import three_models
from benchmarks.data import Batch, greyscale
from benchmarks.harness import Bench, Row
from benchmarks.stages import Said, Stages, apply
from laconic.core.task import Task, classification
from laconic.methods.base import Context, Outcome
from laconic.program.capture import capture
from laconic.program.program import Program

MEAN, STD, BATCH = 0.1307, 0.3081, 128
SHIFTS = {"dense": 2, "sparse": 1}  # pixels; what is left of a network has to be spent on less
MARGIN = 0.1  # percent; what 10,000 validation images leave open about 10,000 others
PUBLISHED = {"lenet300": (27_000, 1.58), "lenet5": (44_000, 0.74)}
SPARSITIES = {"lenet300": (0.92, 0.97, 0.98), "lenet5": (0.98,)}
EPOCHS = {"lenet300": (20, 20, 10), "lenet5": (12, 7, 2)}  # dense, while pruning, clustered
BITS = 4
LEARN: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "optimizer": "adamw", "lr": 1e-3}


def lenet300() -> nn.Module:
    """`[batch, 1, 28, 28]` → `[batch, 10]`, 266,610 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
        nn.Linear(100, 10),
    )  # fmt: skip


def lenet5() -> nn.Module:
    """The Caffe variant that Deep Compression took: 431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {"lenet300": lenet300, "lenet5": lenet5}


class Digits:
    """Batches of training images moved by up to `shift` pixels, in a new order each pass.

    Order and shifts depend on the pass's number alone.
    """

    def __init__(self, data: Batch, shift: int) -> None:
        self.passes, self.labels, self.shift = 0, data[1], shift
        self.padded = functional.pad(data[0], [shift] * 4, value=-MEAN / STD)

    def __len__(self) -> int:
        return len(self.labels) // BATCH

    def set_epoch(self, epoch: int) -> None:
        """The next pass is number `epoch`."""
        self.passes = epoch

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.passes)
        self.passes += 1
        order = torch.randperm(len(self.labels), generator=generator)
        lines = torch.arange(28)
        for rows in order.split(BATCH)[: len(self)]:
            down, right = torch.randint(2 * self.shift + 1, (2, BATCH, 1), generator=generator)
            high, wide = (lines + down)[:, :, None], (lines + right)[:, None, :]
            yield self.padded[rows[:, None, None], 0, high, wide].unsqueeze(1), self.labels[rows]


class Job:
    """One network's data and stages."""

    def __init__(self, args: Namespace, bench: Bench, network: str) -> None:
        self.bench, self.network, self.quick = bench, network, args.quick
        self.stages = Stages(bench, "sharing")
        epochs = EPOCHS[network]
        self.epochs = (1, 1, 1) if self.quick else epochs
        self.sparsities = SPARSITIES[network][: 1 if self.quick else None]

    def split(self, name: str) -> Batch:
        """float32 `[n, 1, 28, 28]` with mean 0 and deviation 1, and labels."""
        pixels, labels = greyscale("mnist", name)
        if self.quick:
            pixels, labels = pixels[:1_024], labels[:1_024]
        return ((pixels.float() / 255 - MEAN) / STD).unsqueeze(1), labels

    def task(self) -> Task:
        """Labelled training images; validation images."""
        train, held = self.split("train"), self.split("validation")
        validation = list(zip(held[0].split(1_000), held[1].split(1_000), strict=True))
        return classification(train=Digits(train, SHIFTS["sparse"]), validation=validation)

    def error(self, model: Callable[[Tensor], Tensor], name: str) -> float:
        """Error in percent on a split."""
        pixels, labels = self.split(name)
        with torch.inference_mode():
            wrong = [
                (model(x).argmax(1) != y).float()
                for x, y in zip(pixels.split(1_000), labels.split(1_000), strict=True)
            ]
        return 100 * torch.cat(wrong).mean().item()

    def measured(self, stage: str) -> Callable[[Program], Row]:
        """Validation error, the bytes of the file, the weights that are left."""

        def row(program: Program) -> Row:
            size = self.stages.path(stage).stat().st_size
            return {"val_error": self.error(program, "validation"), "bytes": size}

        return row


def trained(job: Job) -> Outcome:
    """The dense network: SGD with Nesterov momentum, weight decay 5e-4, cosine to zero."""
    torch.manual_seed(0)
    model = NETWORKS[job.network]()
    data = Digits(job.split("train"), SHIFTS["dense"])
    steps = job.epochs[0] * len(data)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(job.epochs[0]):
        for pixels, labels in data:
            loss = functional.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return Outcome(program=capture(model.eval(), (torch.zeros(2, 1, 28, 28),)))


def recipe(job: Job, sparsity: float) -> list[dict[str, Any]]:
    """Prune while training, one codebook a layer, train the codebooks' values."""
    _, pruning, tuning = job.epochs
    return [
        {
            "method": "prune.gradual",
            "ratio": sparsity,
            "epochs": pruning,
            "masked": "rest",
            **LEARN,
        },
        {"method": "simplify.merge_neurons"},
        {"method": "share.cluster", "bits": BITS},
        {"method": "distill.logits", "epochs": tuning, **LEARN, "lr": 3e-4},
    ]


def compressed(job: Job, steps: list[dict[str, Any]]) -> Outcome:
    """All steps of a recipe, from the dense network."""
    whole = program = job.stages.program(f"{job.network}_dense")
    notes: list[str] = []
    for step in steps:
        context = Context(task=job.task(), original=whole, progress=Said(job.bench))
        outcome = apply(program, step, context)
        program = outcome.program
        notes += outcome.notes
    return Outcome(program=program, notes=notes)


def network_rows(job: Job) -> dict[str, Row]:
    """The dense network and one row for each sparsity."""
    name = f"{job.network}_dense"
    rows = {
        name: job.stages.row(
            name,
            lambda: trained(job),
            job.measured(name),
            epochs=job.epochs[0],
            shift=SHIFTS["dense"],
        )
    }
    for sparsity in job.sparsities:
        steps, name = recipe(job, sparsity), f"{job.network}_{round(100 * sparsity)}"

        def make(steps: list[dict[str, Any]] = steps) -> Outcome:
            return compressed(job, steps)

        rows[name] = job.stages.row(
            name, make, job.measured(name), steps=steps, shift=SHIFTS["sparse"]
        )
    return rows


def chosen(job: Job, rows: dict[str, Row]) -> str | None:
    """The smallest file whose validation error is below the published one by `MARGIN`."""
    limit = PUBLISHED[job.network][1] - MARGIN
    good = [
        name
        for name, row in rows.items()
        if row and not name.endswith("_dense") and row["val_error"] <= limit + 1e-9
    ]
    return min(good, key=lambda name: rows[name]["bytes"], default=None)


def test_row(job: Job, names: list[str]) -> Row:
    """Test errors of the dense and of the chosen network."""
    return {name: job.error(job.stages.program(name), "test") for name in names}


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("sharing", __doc__ or "")
    args = bench.parse(argv)
    found: Row = {"published": PUBLISHED}
    for network in NETWORKS:
        job = Job(args, bench, network)
        rows = network_rows(job)
        best = chosen(job, rows)
        names = [f"{network}_dense", *([best] if best else [])]
        test = bench.row(f"test_{network}", lambda j=job, n=names: test_row(j, n), stages=names)
        if best:
            size = rows[best]["bytes"]
            weights = sum(p.numel() for p in NETWORKS[network]().parameters())
            found |= {f"{network}_chosen": best, f"{network}_bytes": size,
                      f"{network}_error": test.get(best), f"{network}_times": 4 * weights / size,
                      f"{network}_error_dense": test.get(f"{network}_dense")}  # fmt: skip
    return bench.finish(**found, **three_models.rows(bench))


if __name__ == "__main__":
    main()
