"""A small training job for the tests, also run as a script in processes of its own.

`python sample.py OUT FOLDER|- STEPS [SLEEP]` trains and writes the Program's tensors to OUT.
"""

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from laconic.core.task import classification
from laconic.program.capture import capture
from laconic.training.evaluation import mean_score
from laconic.training.job import Job, Loss
from laconic.training.loop import train
from laconic.training.plan import Plan
from laconic.training.processes import Processes, joined

CPU = torch.device("cpu")


class Net(nn.Module):
    """conv-BN-ReLU, a residual block, dropout, linear: [batch, 3, 8, 8] -> [batch, 4]."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.bn2(self.inner(x)))
        return self.head(self.dropout(x.mean((2, 3))))


def make_program(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net()
        for _ in range(3):  # statistics that are not the initial ones
            net(torch.randn(16, 3, 8, 8) * 2 + 1)
        return capture(net.eval(), (torch.randn(2, 3, 8, 8),))


def make_batches(count, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        x = torch.randn(size + index % 2, 3, 8, 8, generator=generator)  # of two sizes
        made.append((x, x.mean((2, 3)).argmax(1)))
    return made


def make_task(batches=6, size=8, **options):
    return classification(
        train=make_batches(batches, size), validation=make_batches(2, 16, seed=2), **options
    )


def make_job(program, task, plan, *, sleep=0.0, **options):
    """Training on labels."""

    def objective(forward, batch, number):
        del number
        if sleep:
            time.sleep(sleep)
        x, y = batch
        return Loss(nn.functional.cross_entropy(forward(x)[0].float(), y), len(x))

    def score(made, precision):
        return mean_score(made, task, task.validation, CPU, precision, Processes.current())

    student = program.clone()
    names = [name for name, tensor in student.tensors() if isinstance(tensor, nn.Parameter)]
    defaults = {"objective": objective, "score": score, "seed": 3, "identity": "sample"}
    return Job(
        program=student, names=names, loader=task.train, plan=plan,
        **{**defaults, **options},
    )  # fmt: skip


def tensors(program):
    return {name: tensor.detach().clone() for name, tensor in program.tensors()}


def main(out, folder, steps, sleep="0"):
    plan = Plan(
        steps=int(steps), lr=0.05, optimizer="sgd", precision="fp32", evaluations=2, accumulate=2,
        save_every=0, ema=0.5,
    )  # fmt: skip
    with joined() as processes:
        job = make_job(
            make_program(), make_task(), plan, sleep=float(sleep),
            folder=None if folder == "-" else Path(folder),
        )  # fmt: skip
        train(job)
        save_file(tensors(job.program), f"{out}.{processes.rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
