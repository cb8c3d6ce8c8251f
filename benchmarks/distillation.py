"""ResNet-56 teaches fresh ResNet-20- and ResNet-8-sized students: each way for the same minutes.

Every row trains a student on CIFAR-10 for `--minutes`, turned into steps on this machine; the state
that is best on the validation rows is kept, `test` is of the rows that nothing was chosen on. The
budget is 15 minutes on two cores; with fewer or more minutes of cores results are stored apart.
Rows without a prefix are the ResNet-20-sized student, `r8_` the ResNet-8-sized one. `plain` learns
from labels alone; the others also, or only (`unlabelled`, `decisions`), from the teacher. Those
that learn from outputs see three passes of augmented images again and again, so that the teacher is
asked about each image once; the rest see new ones all the time.

`transfer`: the student begins with slices of the teacher (transfer.weights), `transfer_plain` the
same without a teacher in training; `curves` has both beside their random starts. `few` and
`few_plain` have 500 images, `free` none: inputs are drawn from the teacher's batch normalisation.
`cut`: a ResNet-56 without half of its multiply-adds, pruned without data, and what brings it back
in a third of the time: all images without labels (`cut_all`), 500 (`cut_few`), none (`cut_free`).

    python -m benchmarks.distillation [--minutes 15] [--only kl] [--quick]
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from benchmarks import models
from benchmarks.cifar import Cifar
from benchmarks.data import Augmented, Batch, Images, batches, cifar10, data_folder
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages, apply
from laconic.core.task import Loader, Task, classification, split_pair
from laconic.methods.base import Context, Outcome, method_names
from laconic.program.capture import capture
from laconic.program.program import Program
from laconic.storage import save

MINUTES = 15.0
CORES = 2
BATCH = 128
PASSES = 3
FEW = 500
TARGET = 0.7  # points over plain training, for the best
STUDENTS = {"": 20, "r8_": 8}
SETTINGS: dict[str, Any] = {"lr": 0.1, "weight_decay": 5e-4}
OUTPUTS: dict[str, Any] = {"method": "distill.logits", "alpha": 0.9}
INSIDE: dict[str, Any] = {"method": "distill.features", "alpha": 0.9}


@dataclass(frozen=True)
class Way:
    """How a row learns.

    Attributes:
        step: of a recipe, without its length.
        data: "new" images all the time, "passes" that come again, or "few".
        labels: whether the training batches have them.
        start: "random", "transfer" or "cut".
    """

    step: dict[str, Any]
    data: str = "new"
    labels: bool = True
    start: str = "random"


PLAIN: dict[str, Any] = {"method": "distill.logits", "alpha": 0.0, "teacher": "torch"}
FREE: dict[str, Any] = {"method": "distill.logits", "data": "synthetic", "synthetic": 1_024}
WAYS: dict[str, Way] = {
    "plain": Way(PLAIN),
    "kl": Way(OUTPUTS, "passes"),
    "dkd": Way(OUTPUTS | {"loss": "dkd"}, "passes"),
    "unlabelled": Way(OUTPUTS | {"alpha": 1.0}, "passes", labels=False),
    "decisions": Way(OUTPUTS | {"alpha": 0.0, "hard": "teacher"}, "passes", labels=False),
    "teachers": Way(OUTPUTS | {"teachers": ["resnet56", "resnet20"]}, "passes"),
    "hint": Way(INSIDE | {"match": "hint"}),
    "attention": Way(INSIDE | {"match": "attention"}),
    "relational": Way(INSIDE | {"match": "relational"}),
    "contrastive": Way(INSIDE | {"match": "contrastive"}),
    "self_taught": Way({"method": "distill.self"}),
    "transfer": Way(OUTPUTS, "passes", start="transfer"),
    "transfer_plain": Way(PLAIN, start="transfer"),
}
POOR: dict[str, Way] = {
    "few_plain": Way(PLAIN, "few"),
    "few": Way(OUTPUTS | {"alpha": 1.0}, "few", labels=False),
    "free": Way(FREE, labels=False),
}
CUT: dict[str, Way] = {
    "cut_all": Way(OUTPUTS | {"alpha": 1.0}, "passes", labels=False, start="cut"),
    "cut_few": Way(OUTPUTS | {"alpha": 1.0}, "few", labels=False, start="cut"),
    "cut_free": Way(FREE, labels=False, start="cut"),
}
RECOVERY: dict[str, Any] = {"lr": 0.02, "weight_decay": 1e-4}  # of what is trained already


class School:
    """Teacher, students and data."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.quick = bench, bool(bench.args.quick)
        self.net = Cifar(bench, 56, 64, BATCH)
        self.stages = Stages(
            bench, "-".join(filter(None, ("distillation-resnet56", bench.variant)))
        )

    @cached_property
    def images(self) -> Images:
        """The training images."""
        return cifar10("train")[: 32 if self.quick else None]

    @cached_property
    def validation(self) -> list[Batch]:
        """What states are chosen on."""
        return batches(cifar10("validation")[: 16 if self.quick else None], 250)

    def loader(self, way: Way) -> Loader:
        """Training batches of a way."""
        size, passes = (16, 1) if self.quick else (BATCH, PASSES)
        if way.data == "new":
            return Augmented(self.images, size, seed=0)
        if way.data == "few":
            return Augmented(self.images[:FEW], min(size, FEW // 4), seed=0, distinct=10 * passes)
        return Augmented(self.images, size, seed=0, distinct=passes)

    def task(self, way: Way) -> Task:
        """Training and validation data; without labels those of the training data are hidden."""
        hidden = self.validation

        def split(batch: Batch) -> Any:
            inputs, targets = split_pair(batch)
            known = way.labels or any(batch[0] is held for held, _ in hidden)
            return inputs, targets if known else None

        return classification(train=self.loader(way), validation=hidden, split=split)

    def context(self, way: Way, name: str) -> Context:
        """What a row's method gets; a state on disk is taken up by the same row only."""
        folder = None if self.quick else self.stages.path(name).with_suffix("")
        return replace(self.net.context(), task=self.task(way), workdir=folder)

    def fresh(self, depth: int) -> Program:
        """A student with He's random weights; a seed, so every row begins alike."""
        generator = torch.Generator().manual_seed(depth)
        model = models.CifarResNet(depth)
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.ndim > 1:
                    tensor.normal_(0.0, (2.0 / tensor[0].numel()) ** 0.5, generator=generator)
        return capture(model.eval(), (torch.zeros(2, 3, 32, 32),))

    def file(self, name: str, make: Callable[[], Program]) -> str:
        """The path of a Program that an option names."""
        path = self.stages.path(name)
        if not path.exists():
            save(make(), path)
        return str(path)

    def start(self, way: Way, depth: int) -> Program:
        """The Program that a row begins with."""
        context = self.net.context()
        if way.start == "random":
            return self.fresh(depth)
        if way.start == "cut":
            cut = {"method": "prune.channels", "ratio": 0.5, "importance": "l2", "block": 1,
                   "compensate": False, "recalibrate": False}  # fmt: skip
            return apply(self.net.program, cut, context).program
        file = self.file(f"fresh{depth}", lambda: self.fresh(depth))
        filled = {
            "method": "transfer.weights",
            "student": file,
            "samples": 16 if self.quick else 512,
        }
        return apply(self.net.program, filled, context).program

    def teachers(self, names: list[str]) -> list[str]:
        """Files of trained ResNets."""

        def make(name: str) -> Program:
            weights = data_folder() / "resnet_cifar10" / f"{name}.safetensors"
            model = models.cifar_resnet(int(name.removeprefix("resnet")), weights)
            return capture(model, (torch.zeros(2, 3, 32, 32),))

        return [self.file(name, lambda name=name: make(name)) for name in names]


def length(args: Any, way: Way, quick: bool) -> dict[str, Any]:
    """How long a row trains."""
    if quick:
        small = {"synthetic": 8, "synthetic_steps": 2} if "data" in way.step else {}
        inner = {} if way.step["method"] == "distill.self" else {"teacher": "torch"}
        return {"steps": 2, "evaluations": 1, **inner, **small}
    if args.steps:
        return {"steps": args.steps}
    return {"minutes": args.minutes / 3 if way.start == "cut" else args.minutes}


def trained(school: School, name: str, depth: int, way: Way) -> Row:
    """One row: trained, and the scores of the state that was kept."""
    usual = RECOVERY if way.start == "cut" else SETTINGS
    said = {**usual, **way.step, **length(school.bench.args, way, school.quick)}
    figures: dict[str, Any] = {}

    def make() -> Outcome:
        step = dict(said)
        if "teachers" in step:
            step["teachers"] = school.teachers(step["teachers"])
        made = apply(school.start(way, depth), step, school.context(way, name))
        figures.update({k: made.figures[k] for k in ("steps", "best_step", "seconds")})
        figures["divergence"] = made.figures.get("divergence")
        figures["curve"] = [
            [100 * e["step"] / made.figures["steps"], e["score"]] for e in made.figures["history"]
        ]
        return made

    def measure(program: Program) -> Row:
        return {"val": school.net.score(program, "validation"), **figures}

    settings = {**said, "data": way.data, "labels": way.labels, "start": way.start, "batch": BATCH}
    return school.stages.row(name, make, measure, **settings)


def test_row(school: School, names: list[str]) -> Row:
    """Accuracy on the test rows and on all rows, looked at once."""
    found = {f"teacher_{split}": school.net.score(school.net.model, split)
             for split in ("test", "all")}  # fmt: skip
    for name in names:
        program = school.stages.program(name)
        found |= {f"{name}_{split}": school.net.score(program, split) for split in ("test", "all")}
    return found


def curves(rows: dict[str, Row]) -> dict[str, Any]:
    """Validation accuracy over parts of the steps in percent, from both starts."""
    wanted = ("kl", "transfer", "plain", "transfer_plain")
    names = [f"{student}{name}" for student in STUDENTS for name in wanted]
    return {name: rows[name]["curve"] for name in names if "curve" in rows.get(name, {})}


def all_ways() -> dict[str, tuple[int, Way]]:
    """Row → depth of its student, and its way."""
    found = {f"{prefix}{name}": (depth, way) for prefix, depth in STUDENTS.items()
             for name, way in WAYS.items()}  # fmt: skip
    found |= {name: (20, way) for name, way in {**POOR, **CUT}.items()}
    known = "transfer.weights" in method_names()
    return {name: held for name, held in found.items() if known or held[1].start != "transfer"}


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("distillation", __doc__ or "")
    bench.parser.add_argument("--minutes", type=float, default=MINUTES, help="of training, a row")
    bench.parser.add_argument("--steps", type=int, help="of training, in place of minutes")
    args = bench.parse(argv)
    minutes = args.minutes * torch.get_num_threads()
    if not args.quick and minutes != MINUTES * CORES:
        bench.variant = f"{minutes:g}core_minutes"
    school = School(bench)
    rows: dict[str, Row] = {}
    for name, (depth, way) in all_ways().items():
        rows[name] = trained(school, name, depth, way)
    cut = bench.row("cut", lambda: {
        split: school.net.score(school.start(CUT["cut_all"], 20), split)
        for split in ("test", "all")
    })  # fmt: skip
    there = {name: row["val"] for name, row in rows.items() if "val" in row}
    found = bench.row("test", lambda: test_row(school, list(there)), of=there)
    reached = {name: found.get(f"{name}_test") for name in rows}
    return bench.finish(
        **reached, gain=gain(reached), lost=lost(reached, found), curves=curves(rows),
        minutes=args.minutes, threads=torch.get_num_threads(), cut=cut.get("test"),
        teacher=found.get("teacher_test"), target=TARGET,
    )  # fmt: skip


def gain(reached: dict[str, Any]) -> dict[str, float] | None:
    """Points of the best way over plain training, by student."""
    found: dict[str, float] = {}
    for prefix, depth in STUDENTS.items():
        scores = [reached.get(f"{prefix}{name}") for name in WAYS if name != "plain"]
        plain = reached.get(f"{prefix}plain")
        if plain is not None and any(scores):
            found[f"resnet{depth}"] = max(score for score in scores if score is not None) - plain
    return found or None


def lost(reached: dict[str, Any], found: Row) -> dict[str, float] | None:
    """Points that having no labels, few images or none costs, against having all of them."""
    pairs = {"unlabelled": "kl", "few_plain": "plain", "few": "kl", "free": "kl",
             "cut_few": "cut_all", "cut_free": "cut_all"}  # fmt: skip
    known = {
        name: reached[full] - reached[name]
        for name, full in pairs.items()
        if reached.get(name) is not None and reached.get(full) is not None
    }
    if reached.get("cut_all") is not None:
        known["cut_all"] = found["teacher_test"] - reached["cut_all"]
    return known or None


if __name__ == "__main__":
    main()
