"""ResNet-56 on CIFAR-10 that stops early: time per image over a stream of test images, OpenVINO.

`frozen` trains exits in front of a network that stays as it is, `trained` trains it along with
them, `early` the same with wider heads nearer to the input, `wide` has such heads in front of a
network that stays as it is, `tail` one head there that is the rest of the network with fewer of its
layers, `tail_labels` the same learned from labels alone (steps cost half), `cascade` asks a
ResNet-20 first (not with `--quick`, where a ResNet-20 is all there is).
Each sets its limits on validation rows, with the promise that at most `--drop` points are lost at
95 % confidence. `test` and `latency`: of the exits that are cheapest by validation, `cascade_test`
and `cascade_latency` of the cascade: accuracy of the deployed chain and of the original on test
rows that nothing was chosen on; milliseconds per image over `--stream` test images in their order,
a batch after the other, original and chain in turns, in every float precision. `latency_ratio_b1`
and `_b32` are the original at its best precision over the chain at its best; `same_precision` is
beside.

    python -m benchmarks.early_exit [--minutes 15] [--only frozen] [--quick]
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import models, peers
from benchmarks.cifar import Cifar
from benchmarks.data import Augmented, Images, batches, cifar10, data_folder
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages, apply
from laconic import runtimes
from laconic.core.task import Task
from laconic.engine.files import write_chain
from laconic.methods.base import Context, Outcome
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.runtimes import _chain
from laconic.runtimes.base import Precision

MINUTES, DROP, BATCH, STREAM = 15.0, 0.3, 128, 1_000
SIZES = (1, 32)
KINDS: tuple[Precision, ...] = ("fp32", "bf16")
EXITS: dict[str, Any] = {"method": "dynamic.early_exit", "exits": 2, "size": 0.03}
EARLY: dict[str, Any] = EXITS | {"at": ["layer1.4", "layer2.4"], "depth": 2}
ROWS: dict[str, dict[str, Any]] = {
    "frozen": EXITS | {"backbone": "frozen"},
    "trained": EXITS | {"backbone": "trained"},
    "early": EARLY | {"backbone": "trained", "size": 0.12},
    "wide": EARLY | {"backbone": "frozen", "size": 0.15},
    "tail": {"method": "dynamic.early_exit", "at": ["layer1.2"], "head": "tail", "size": 0.21},
    "cascade": {"method": "dynamic.cascade"},
}
ROWS["tail_labels"] = ROWS["tail"] | {"alpha": 0.0}
QUICK = ("frozen", "early")
FIGURES = ("limits", "leaving", "expected_cost", "drop", "bound", "tested_on", "places")


class Subject:
    """The network, its data, and what the rows share."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.args = bench, bench.args
        self.quick = bool(bench.args.quick)
        self.net = Cifar(bench, 20 if self.quick else 56, 64, BATCH)
        self.stages = Stages(bench, "early-exit-resnet56")
        self._files: dict[tuple[str, Precision], tuple[Path, Path]] = {}

    @cached_property
    def task(self) -> Task:
        """Training images, and the validation rows for the limits."""
        train, held = cifar10("train"), cifar10("validation")
        return replace(
            self.net.task,
            train=Augmented(train[:64], 32, seed=0) if self.quick else self.net.task.train,
            validation=batches(held[:300] if self.quick else held, 100),
        )

    def context(self, name: str) -> Context:
        """What a method gets; a training that was interrupted goes on."""
        folder = None if self.quick else self.stages.path(name).with_suffix("")
        return replace(self.net.context(), task=self.task, workdir=folder)

    def step(self, name: str) -> dict[str, Any]:
        """The recipe step of a row."""
        said = ROWS[name] | {"max_drop": 100.0 if self.quick else self.args.drop}
        if name == "cascade":
            return said
        length = {"steps": 2} if self.quick else {"minutes": self.args.minutes}
        if self.quick and "at" in said:
            said["at"] = ["layer1.1", "layer2.1"]
        return said | ({"steps": self.args.steps} if self.args.steps else length)

    @cached_property
    def test(self) -> Images:
        """Test rows."""
        held = cifar10("test")
        return held[:64] if self.quick else held

    def files(self, name: str, kind: Precision) -> tuple[Path, Path]:
        """The original's file and the chain of what `name` made; written once in a run."""
        if (name, kind) not in self._files:
            engine, folder = runtimes.get("openvino"), self.stages.folder / "files"
            static = engine.write(self.net.program, folder / f"original-{kind}.xml", kind)
            target = folder / f"{name}-{kind}.xml"
            chain = write_chain(self.stages.program(name), target, engine, kind)
            if chain is None:
                raise SystemExit(f"{name}: nothing is decided by input, nothing to measure")
            self._files[name, kind] = static, chain
        return self._files[name, kind]

    def small(self) -> Program:
        """The ResNet-20 of the cascade."""
        weights = data_folder() / "resnet_cifar10" / "resnet20.safetensors"
        return capture(models.cifar_resnet(20, weights), (torch.zeros(2, 3, 32, 32),))


def made(subject: Subject, name: str) -> Row:
    """One row: exits trained, limits set, figures on validation rows."""
    said = subject.step(name)
    found: dict[str, Any] = {}

    def make() -> Outcome:
        start = subject.small() if name == "cascade" else subject.net.program
        outcome = apply(start, said, subject.context(name))
        found.update({key: outcome.figures[key] for key in FIGURES if key in outcome.figures})
        return outcome

    def measure(program: Program) -> Row:
        macs = cost(program).macs / cost(subject.net.program).macs
        return {**found, "static_macs": macs}

    return subject.stages.row(name, make, measure, step=said, batch=BATCH)


def deployed(subject: Subject, name: str, kind: Precision, batch: int) -> Mapping[str, Any]:
    """Original and chain in OpenVINO, compiled for a batch, on one thread: label → runner."""
    engine = runtimes.get("openvino")
    static, chain = subject.files(name, kind)
    shapes = {subject.net.program.placeholders[0].name: (batch, 3, 32, 32)}
    threads = subject.args.threads
    return {
        f"original {kind}": engine.load(static, kind, threads, shapes).run,
        f"chain {kind}": _chain.load(chain, engine, threads, shapes).run,
    }


def usable(subject: Subject) -> list[Precision]:
    """Float precisions that this machine has."""
    engine = runtimes.get("openvino")
    kinds = KINDS[:1] if subject.quick else KINDS
    return [kind for kind in kinds if not engine.check(subject.net.program, kind)]


def test_row(subject: Subject, name: str) -> Row:
    """Accuracy of the files on test rows, looked at once, and whether the promise held."""
    pixels, labels = subject.test.tensor(), subject.test.labels
    found: dict[str, Any] = {"chosen": name}
    for kind in usable(subject):
        for label, run in deployed(subject, name, kind, 32).items():
            found[label] = 100 * peers.accuracy(run, pixels, labels, 32).mean().item()
    found["promised"] = subject.step(name)["max_drop"]
    lost = {kind: found[f"original {kind}"] - found[f"chain {kind}"] for kind in usable(subject)}
    found["lost"] = lost
    found["held"] = max(lost.values()) <= found["promised"]
    return found


def streamed(run: Any, pixels: np.ndarray, batch: int) -> peers.Runner:
    """A runner that serves the whole stream, a batch after the other."""
    parts = [pixels[start : start + batch] for start in range(0, len(pixels), batch)]
    parts = [part for part in parts if len(part) == batch]

    def serve(_: Sequence[np.ndarray]) -> list[np.ndarray]:
        for part in parts:
            run([part])
        return []

    return serve


def latency_row(subject: Subject, name: str) -> Row:
    """Milliseconds per image over the stream, at both batch sizes."""
    count = 64 if subject.quick else subject.args.stream
    pixels = subject.test[:count].tensor().numpy()
    found: dict[str, Any] = {"images": count}
    for batch in SIZES:
        runners: dict[str, peers.Runner] = {}
        for kind in usable(subject):
            for label, run in deployed(subject, name, kind, batch).items():
                runners[label] = streamed(run, pixels, batch)
        served = len(pixels) // batch * batch
        times = peers.interleaved(
            runners,
            dict.fromkeys(runners, ()),
            rounds=1 if subject.quick else 7,
            seconds=0.0,
            least=1,
        )
        each = {label: turn["ms"] / served for label, turn in times.items()}
        found[f"ms_b{batch}"] = each
        found[f"turns_b{batch}"] = times
        best = {side: min(v for k, v in each.items() if k.startswith(side))
                for side in ("original", "chain")}  # fmt: skip
        found[f"latency_ratio_b{batch}"] = best["original"] / best["chain"]
        found[f"same_precision_b{batch}"] = {
            kind: each[f"original {kind}"] / each[f"chain {kind}"] for kind in usable(subject)
        }
    return found


def chosen(rows: Mapping[str, Row]) -> str | None:
    """The exits whose samples cost least by validation."""
    costs = {n: r["expected_cost"] for n, r in rows.items() if r.get("expected_cost", 1) < 1}
    costs.pop("cascade", None)
    return min(costs, key=costs.__getitem__) if costs else None


def measured(subject: Subject, name: str, prefix: str = "") -> Row:
    """The rows of tests and latencies of what `name` made, and the keys that sum them up."""
    bench = subject.bench
    test = bench.row(f"{prefix}test", lambda: test_row(subject, name), of=name)
    timed = bench.row(f"{prefix}latency", lambda: latency_row(subject, name), of=name)
    last = usable(subject)[-1]
    found = {
        "acc": test.get(f"original {last}"),
        "acc_exit": test.get(f"chain {last}"),
        "promised": test.get("promised"),
        "held": test.get("held"),
    }
    ratios = {f"latency_ratio_b{size}": timed.get(f"latency_ratio_b{size}") for size in SIZES}
    return {f"{prefix}{key}": value for key, value in (found | ratios).items()}


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("early_exit", __doc__ or "")
    add = bench.parser.add_argument
    add("--minutes", type=float, default=MINUTES, help="of training, a row")
    add("--steps", type=int, help="of training, in place of minutes")
    add("--drop", type=float, default=DROP, help="points that may be lost")
    add("--stream", type=int, default=STREAM, help="images that are timed")
    add("--threads", type=int, default=1, help="of the runtime")
    bench.parse(argv)
    subject = Subject(bench)
    names = [name for name in ROWS if not subject.quick or name in QUICK]
    rows = {name: made(subject, name) for name in names}
    name = chosen(rows)
    found = measured(subject, name) if name else {}
    if rows.get("cascade", {}).get("expected_cost", 1) < 1:
        found |= measured(subject, "cascade", "cascade_")
    return bench.finish(chosen=name, **found, targets={"lost": DROP, "latency_ratio": 1.8})


if __name__ == "__main__":
    main()
