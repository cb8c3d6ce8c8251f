"""One training, many networks: a supernet of ResNet-56 on CIFAR-10, and what searches in it find.

`supernet`: every choice of inner widths and depths trained together for `--minutes`. `front`: the
best sub-network under each of nine budgets from 0.2 to 1 of the multiply-adds, with its inherited
weights, chosen on the validation rows. `alone_*`: three of them trained alone for the same time,
from random weights and from the same slices of the original. `latency_*`: searches under measured
latency, timed. `cells`: cell networks made from nothing, what a search found over random ones of
equal cost (see `solvers/search/cells.py`). `test`: everything on the rows that nothing was
chosen on.

    python -m benchmarks.supernet [--minutes 50] [--cell-steps 400] [--only supernet] [--quick]
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.cifar import Cifar
from benchmarks.data import Augmented, batches, cifar10
from benchmarks.harness import Bench, Row
from benchmarks.stages import Said, Stages, apply
from laconic.core.task import Task, classification
from laconic.methods.base import Context, Outcome
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels import ranking
from laconic.solvers.search import cells
from laconic.solvers.search.elastic import Elastic, declare
from laconic.solvers.search.search_space import Space
from laconic.storage import save

MINUTES = 50.0
BATCH = 128
CALIBRATION = 1_024
SPACE = {"width:layer*.conv1.out": [1.0, 0.75, 0.5, 0.25], "depth:*": [1.0, 0.75, 0.5]}
BUDGETS = (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
ALONE = (0.25, 0.5, 0.7)
LATENCIES = (0.75, 0.6, 0.45)
TRAIN: dict[str, Any] = {"method": "nas.supernet", "space": SPACE, "members": 2, "inplace": False}
SEARCH: dict[str, Any] = {
    "method": "nas.search", "importance": "leading", "by": "predictor", "trials": 16, "rungs": 2,
    "samples": 128, "validation": 1_000,
}  # fmt: skip
QUICK: dict[str, Any] = {"trials": 2, "rungs": 1, "samples": 32, "validation": 64}
TARGETS = {"front": 8, "alone_gap": 1.0, "search_s": 60.0}


class Nets(Cifar):
    """ResNet-56 with data to choose on."""

    def searching(self, stages: Stages) -> Context:
        """Choices are made on the validation rows; evaluations are shared by all searches."""
        images = cifar10("validation")
        held = batches(images[:64] if self.quick else images, 100)
        task: Task = replace(self.task, validation=held)
        folder = None if self.quick else stages.folder / "searches"
        return replace(self.context(), task=task, workdir=folder)

    def training(self, stages: Stages, name: str) -> Context:
        """Everything trains on all training images and keeps the last state."""
        folder = None if self.quick else stages.folder / name
        return replace(self.context(), workdir=folder)


def length(args: Any, quick: bool) -> dict[str, Any]:
    """How long a training is."""
    if quick:
        return {"steps": 1, "teacher": "torch", "evaluations": 1}
    return {"steps": args.steps} if args.steps else {"minutes": args.minutes}


def supernet_row(bench: Bench, net: Nets, stages: Stages) -> Row:
    """The one training."""
    said = {**TRAIN, **length(bench.args, net.quick)}
    said |= {"members": 1, "samples": 32} if net.quick else {"evaluations": 2}
    figures: dict[str, Any] = {}

    def make() -> Outcome:
        made = apply(net.program, said, net.training(stages, "supernet"))
        figures.update({k: made.figures[k] for k in ("steps", "seconds", "members", "macs")})
        return made

    def measure(program: Program) -> Row:
        return {"val": net.score(program, "validation"), **figures}

    return stages.row("supernet", make, measure, step=said, batch=BATCH)


def found(net: Nets, stages: Stages, budget: Mapping[str, float]) -> Outcome:
    """The best sub-network within a budget."""
    said = {**SEARCH, **(QUICK if net.quick else {}), "space": SPACE, **budget}
    return apply(stages.program("supernet"), said, net.searching(stages))


def budget_row(bench: Bench, net: Nets, stages: Stages, part: float) -> Row:
    """One point of the front."""
    name = f"macs_{part:g}"
    figures: dict[str, Any] = {}

    def make() -> Outcome:
        start = time.perf_counter()
        made = found(net, stages, {"macs": part})
        figures.update(search_s=time.perf_counter() - start, evaluated=made.figures["evaluated"])
        for key in ("macs", "parameters"):
            figures[key] = made.figures[key][1]
        figures["member"] = made.resolved["member"]
        return made

    def measure(program: Program) -> Row:
        whole = cost(net.program).macs
        return {"part": figures["macs"] / whole, "val": net.score(program, "validation"), **figures}

    return stages.row(name, make, measure, search=SEARCH, train=TRAIN, minutes=bench.args.minutes)


def latency_row(bench: Bench, net: Nets, stages: Stages, part: float) -> Row:
    """One search under a latency, timed; the table of layers is there."""
    figures: dict[str, Any] = {}

    def make() -> Outcome:
        start = time.perf_counter()
        made = found(net, stages, {"latency": part})
        figures["search_s"] = time.perf_counter() - start
        figures["milliseconds"] = made.figures["milliseconds"]
        figures["macs"] = made.figures["macs"][1]
        return made

    def measure(program: Program) -> Row:
        pair = figures["milliseconds"]
        return {"part": pair[1] / pair[0], "val": net.score(program, "validation"), **figures}

    return stages.row(
        f"latency_{part:g}", make, measure, search=SEARCH, train=TRAIN, minutes=bench.args.minutes
    )


def table_row(net: Nets, stages: Stages) -> Row:
    """The table of layers of this machine, which all searches use."""
    start = time.perf_counter()
    said = {**SEARCH, "space": SPACE, "latency": 1.0, "by": "inherited", "rungs": 1, "trials": 1}
    apply(stages.program("supernet"), said, net.searching(stages))
    return {"table_s": time.perf_counter() - start, "runtime": net.context().runtime}


def alone_row(bench: Bench, net: Nets, stages: Stages, part: float, start: str) -> Row:
    """One sub-network of the front trained alone, for the time that the supernet had.

    `start`: "random" weights, or "cut": its slices of the original, as the supernet began with.
    """
    said = {"method": "distill.logits", **length(bench.args, net.quick)}
    if start == "random":
        said["lr"] = 0.1

    def make() -> Outcome:
        member = bench.stored()["rows"][f"macs_{part:g}"]["values"]["member"]
        cut = {**SEARCH, "space": SPACE, "order": sorted_by(net), "member": member}
        made = apply(net.program, cut, net.context()).program
        if start == "random":
            made = shuffled(made)
        return apply(made, said, net.training(stages, f"alone_{start}_{part:g}"))

    def measure(program: Program) -> Row:
        return {"val": net.score(program, "validation"), "macs": cost(program).macs}

    name = f"alone_{start}_{part:g}"
    return stages.row(name, make, measure, step=said, space=SPACE, batch=BATCH)


def sorted_by(net: Nets) -> dict[str, list[int]]:
    """The order of channels that the supernet begins with."""
    elastic = Elastic(net.program)
    space = declare(elastic, SPACE, Sites())[0]
    widths = Space(tuple(knob for knob in space.knobs if knob.kind == "width"))
    return ranking.rank(elastic, widths, "l2", CALIBRATION, net.context(), [])


def shuffled(program: Program) -> Program:
    """The same network with random weights, as He et al. 2015 draw them."""
    made, generator = program.clone(), torch.Generator().manual_seed(0)
    for name, tensor in list(made.tensors()):
        if not tensor.is_floating_point():
            continue
        if isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
            spread = (2 / tensor[0].numel()) ** 0.5
            fresh = torch.randn(tensor.shape, generator=generator) * spread
        elif name.endswith(("running_var", "weight")):
            fresh = torch.ones_like(tensor)
        else:
            fresh = torch.zeros_like(tensor)
        made.set_tensor(name, fresh)
    return made


def cells_row(bench: Bench, net: Nets, stages: Stages) -> Row:
    """Cells that a search found beside random ones of the same price, both trained four times as
    long in the end; accuracy on the validation rows, and on those that nothing was chosen on.
    """
    quick, steps = net.quick, 2 if net.quick else bench.args.cell_steps
    size = 16 if quick else BATCH
    train, held = cifar10("train"), cifar10("validation")
    place = cells.Bench(
        task=classification(
            train=Augmented(train[:64] if quick else train, size, seed=0),
            calibration=list(Augmented(train[:size], size, seed=2)),
            validation=batches(held[:64] if quick else held, 100),
        ),
        example=torch.zeros(2, 3, 32, 32), classes=10, channels=4 if quick else 8, batch=size,
        progress=Said(bench),
    )  # fmt: skip
    found = cells.halving(place, *((2, 1) if quick else (48, 16)), steps)
    bench.say(f"searched: {cells.named(found.best.cell)} {100 * found.best.score:.2f}")
    beside = cells.at_random(place, found.price, steps)
    row: Row = {"steps": steps}
    for name, searched in (("search", found), ("random", beside)):
        last = place.trained(searched.best.cell, 4 * steps)
        save(last.program, stages.path(f"cells_{name}"))
        row[name] = {
            "cell": cells.named(last.cell), "val": 100 * last.score,
            "acc": net.score(last.program, "test"), "price": searched.price,
            "trained": len(searched.tried), "macs": cost(last.program).macs,
        }  # fmt: skip
    return row


def test_row(net: Nets, stages: Stages, names: list[str]) -> Row:
    """Accuracy on the test rows, looked at once."""
    scores = {name: net.score(stages.program(name), "test") for name in names}
    return {"base": net.score(net.model, "test"), **scores}


def front(rows: Mapping[str, Row], test: Row) -> list[Row] | None:
    """The sub-networks with what they cost and what they score."""
    kept = [
        {key: row[key] for key in ("part", "macs", "parameters", "val")} | {"acc": test.get(name)}
        for name, row in rows.items()
        if name.startswith("macs_") and row
    ]
    return kept or None


def beside(rows: Mapping[str, Row], test: Row, parts: Sequence[float]) -> list[Row] | None:
    """Three of the front beside themselves trained alone: test accuracy, in points."""
    kept: list[Row] = []
    for part in parts:
        names = {"front": f"macs_{part:g}", "alone": f"alone_random_{part:g}",
                 "alone_from_slices": f"alone_cut_{part:g}"}  # fmt: skip
        if any(rows.get(name) for name in list(names.values())[1:]):
            kept.append({"macs": part} | {key: test.get(name) for key, name in names.items()})
    return kept or None


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("supernet", __doc__ or "")
    bench.parser.add_argument("--minutes", type=float, default=MINUTES, help="of each training")
    bench.parser.add_argument("--steps", type=int, help="of each training, in place of minutes")
    bench.parser.add_argument("--cell-steps", type=int, default=400, help="of a cell's training")
    bench.parse(argv)
    depth, size = (20, 32) if bench.args.quick else (56, BATCH)
    net, stages = Nets(bench, depth, CALIBRATION, size), Stages(bench, f"supernet-resnet{depth}")
    rows = {"supernet": supernet_row(bench, net, stages)}
    budgets = (0.3, 1.0) if net.quick else BUDGETS
    alone = (0.3,) if net.quick else ALONE
    for part in budgets:
        rows[f"macs_{part:g}"] = budget_row(bench, net, stages, part)
    table: Row = {}
    if not net.quick:
        table = bench.row("latency_table", lambda: table_row(net, stages), space=SPACE)
    for part in () if net.quick else LATENCIES:
        rows[f"latency_{part:g}"] = latency_row(bench, net, stages, part)
    for part in alone:
        for start in ("random", "cut"):
            rows[f"alone_{start}_{part:g}"] = alone_row(bench, net, stages, part, start)
    said = {"steps": bench.args.cell_steps}
    rows["cells"] = bench.row("cells", lambda: cells_row(bench, net, stages), **said)
    there = {name: row["val"] for name, row in rows.items() if "val" in row}
    test = bench.row("test", lambda: test_row(net, stages, list(there)), of=there)
    seconds = [rows[f"latency_{p:g}"].get("search_s") for p in LATENCIES] if not net.quick else []
    return bench.finish(
        base=test.get("base"),
        front=front(rows, test),
        alone=beside(rows, test, alone),
        search_s=seconds if any(seconds) else None,
        table_s=table.get("table_s"),
        cells=rows["cells"] or None,
        targets=TARGETS,
    )


if __name__ == "__main__":
    main()
