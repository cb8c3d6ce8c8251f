"""ResNet-20 on CIFAR-10 trained with few bits: 4/4, 3/3, 2/2 and 1/1 (weights/activations), 1/32.

First and last layer have 8 bits, as in the published results. Every row starts from the trained
float network and learns on augmented training images, from that network or from ResNet-56
(`TAUGHT`, what no published row had); nothing stops early and the last state is kept, so that the
validation rows only report. `test`: all rows on the images that nothing
was chosen on, and on all 10,000, as published. `seconds` is what the training of a row took:
an hour is what it may take on two cores that do nothing else.

    python -m benchmarks.qat [--steps 3000] [--only w4a4] [--quick]
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cifar import Cifar
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages, apply
from laconic.methods.base import Outcome
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.storage import predict, save

BATCH = 128
CALIBRATION = 1_024
TRAIN: dict[str, Any] = {"method": "quantize.train", "samples": CALIBRATION, "first_last": 8}
BINARY: dict[str, Any] = {"method": "quantize.binary", "samples": CALIBRATION, "first_last": 8}
ROWS: dict[str, dict[str, Any]] = {
    "w4a4": TRAIN | {"bits": 4, "activations": 4, "steps": 3_000},
    "w3a3": TRAIN | {"bits": 3, "activations": 3, "steps": 3_500},
    "w2a2": TRAIN | {"bits": 2, "activations": 2, "steps": 5_000},
    "w1a1": BINARY | {"lr": 0.1, "steps": 4_500},
    "w1": BINARY | {"activations": False, "steps": 2_500},
}
TAUGHT = ("w3a3",)
"""Rows that learn from ResNet-56 (93.5 on validation) in place of the original (91.5)."""
TARGETS = {"w4a4": 91.7, "w3a3": 91.5, "w2a2": 90.8, "w1a1": 88.1, "w1": 90.2}


def step(args: Any, name: str, quick: bool) -> dict[str, Any]:
    """The recipe step of a row."""
    length: dict[str, Any] = {}
    if quick:
        length = {"steps": 3, "teacher": "torch", "samples": 32}
    elif args.steps:
        length = {"steps": args.steps}
    return ROWS[name] | length


def teacher(bench: Bench, stages: Stages) -> Path:
    """The file of ResNet-56."""
    path = stages.path("teacher")
    if not path.exists():
        save(Cifar(bench, 56, CALIBRATION, BATCH).program, path)
    return path


def trained(bench: Bench, net: Cifar, stages: Stages, name: str) -> Row:
    """One row: trained, measured on the validation rows, and how large its file is."""
    said = step(bench.args, name, net.quick)
    taught = {"teachers": [str(teacher(bench, stages))]} if name in TAUGHT else {}
    figures: dict[str, Any] = {}

    def make() -> Outcome:
        folder = None if net.quick else stages.path(name).with_suffix("")
        made = apply(net.program, said | taught, replace(net.context(), workdir=folder))
        figures.update({k: made.figures[k] for k in ("steps", "seconds") if k in made.figures})
        return made

    def measure(program: Program) -> Row:
        return {"val": net.score(program, "validation"), "bytes": predict(freeze(program)).total,
                **figures}  # fmt: skip

    return stages.row(
        name, make, measure, step=said, batch=BATCH, **({"teacher": 56} if taught else {})
    )


def test_row(net: Cifar, stages: Stages, val: dict[str, float]) -> Row:
    """Accuracy on the test rows, looked at once, and on all: validation and test together."""
    test = {"base": net.score(net.model, "test")}
    test |= {name: net.score(stages.program(name), "test") for name in val if name != "base"}
    return {
        **{f"{name}_test": found for name, found in test.items()},
        **{f"{name}_all": (test[name] + val[name]) / 2 for name in test if name in val},
    }


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("qat", __doc__ or "")
    bench.parser.add_argument("--steps", type=int, help="of training, in place of a row's own")
    bench.parse(argv)
    net, stages = Cifar(bench, 20, CALIBRATION, BATCH), Stages(bench, "qat-resnet20")
    base = bench.row("base", lambda: {"val": net.score(net.model, "validation"),
                                      "bytes": predict(net.program).total})  # fmt: skip
    rows = {"base": base} | {name: trained(bench, net, stages, name) for name in ROWS}
    there = {name: row["val"] for name, row in rows.items() if "val" in row}
    found = bench.row("test", lambda: test_row(net, stages, there), of=there)
    reached = {name: found.get(f"{name}_all") for name in ROWS}
    return bench.finish(**reached, targets=TARGETS)


if __name__ == "__main__":
    main()
