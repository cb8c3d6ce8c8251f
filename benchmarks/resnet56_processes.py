"""A training step of ResNet-56's job in one process a core, as `torchrun` starts them.

One process of two threads trains a network of this size hardly faster than one of one thread: its
layers are too small to be divided. Two processes that share the batches do twice the work.

This file is what is started; `in_processes` starts it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Bench
from benchmarks.resnet56_main import Job
from benchmarks.stages import apply
from laconic.methods.base import Outcome
from laconic.storage import load, save
from laconic.training.processes import joined


class Half(Job):
    """The job with batches for one of two processes."""

    batch = 64

    def __init__(self, args: argparse.Namespace, bench: Bench) -> None:
        super().__init__(args, bench)
        self.distinct = args.distinct


def in_processes(
    job: Job, stage: Path, step: dict[str, Any], count: int, distinct: int | None = None
) -> Outcome:
    """`step` applied to the Program in file `stage` by `count` processes.

    distinct: passes of augmented images that are gone through in turn; None for new ones always.

    Raises:
        RuntimeError: they failed; the message has the end of what they said.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.laconic"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={count}",
            "-m", "benchmarks.resnet56_processes", "--stage", str(stage), "--made", str(made),
            "--step", json.dumps(step), "--weights", str(job.weights),
            "--depth", str(job.args.depth), "--seed", str(job.args.seed),
            *(["--distinct", str(distinct)] if distinct else []),
            *(["--quick"] if job.quick else []),
        ]  # fmt: skip
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"training in {count} processes failed: {done.stderr[-2_000:]}")
        notes = json.loads(made.with_suffix(".json").read_text())
        return Outcome(program=load(made), notes=notes)


def main(argv: list[str] | None = None) -> None:
    """One of the processes."""
    bench = Bench("resnet56_processes", __doc__ or "")
    bench.parser.add_argument("--weights", type=Path)
    bench.parser.add_argument("--depth", type=int, default=56)
    bench.parser.add_argument("--distinct", type=int, help="passes that come again")
    bench.parser.add_argument("--seed", type=int, default=0)
    for name in ("stage", "made"):
        bench.parser.add_argument(f"--{name}", type=Path, required=True)
    bench.parser.add_argument("--step", type=json.loads, required=True)
    args: argparse.Namespace = bench.parse(argv)
    torch.set_num_threads(1)
    job = Half(args, bench)
    with joined() as processes:
        outcome = apply(load(args.stage), args.step, job.context())
        if processes.first:
            save(outcome.program, args.made)
            args.made.with_suffix(".json").write_text(json.dumps(list(outcome.notes)))


if __name__ == "__main__":
    main()
