"""Every importance side by side: ResNet-20, half of its multiply-adds, chance included.

Every score takes the same part of every group (the first convolution's channels of each block), so
that all networks have the same shape and only the choice of channels differs. Per score: accuracy
as cut, with nothing repaired; repaired by least squares; each of them after the same short
distillation. Chance is drawn with several seeds; a score beats it in a column only when it is above
all of them. Beside the JSON a page is written, with a table and a chart.

    python -m benchmarks.importances [--only obs] [--only obs_recovered] [--quick]
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cifar import Cifar, recover
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages, apply
from laconic.core import registry
from laconic.methods.base import Outcome
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.reports import comparison
from laconic.reports.comparison import Comparison, Entry

DEPTH, CALIBRATION, BATCH, STEPS, SEEDS = 20, 512, 64, 100, 3
CUT: dict[str, Any] = {
    "method": "prune.channels", "sites": "layer?.?.conv1.out", "ratio": 0.5, "scope": "layer",
    "block": 1,
}  # fmt: skip
COLUMNS = {
    "cut": "_cut",
    "cut, recovered": "_cut_recovered",
    "repaired": "",
    "repaired, recovered": "_recovered",
}
CHANCE = "random"


class Job:
    """The network and the scores."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.net = Cifar(bench, DEPTH, CALIBRATION, BATCH)
        self.stages = Stages(bench, "importances")
        quick = self.net.quick
        self.steps, self.seeds = (2, 1) if quick else (STEPS, SEEDS)
        names = ["l1"] if quick else registry.names("laconic.solvers.importance")
        self.scores = [name for name in names if name != CHANCE]

    @property
    def runs(self) -> list[tuple[str, str, int]]:
        """(row, score, seed) of everything that is cut."""
        chance = [(f"{CHANCE}{seed}", CHANCE, seed) for seed in range(self.seeds)]
        return [(name, name, 0) for name in self.scores] + chance

    def step(self, score: str) -> dict[str, Any]:
        """The recipe's step of a score."""
        return CUT | {"importance": score, "samples": self.net.samples}

    def cut(self, row: str, score: str, seed: int) -> Outcome:
        """As cut, nothing repaired; what is kept is noted for the repaired one."""
        bare = {"compensate": False, "recalibrate": False}
        made = apply(self.net.program, self.step(score) | bare, self.net.context(seed))
        self._notes(row).write_text(json.dumps(made.resolved["keep"]))
        return made

    def repaired(self, row: str, score: str, seed: int) -> Outcome:
        """The same channels cut, the rest refitted."""
        keep = json.loads(self._notes(row).read_text())
        return apply(self.net.program, self.step(score) | {"keep": keep}, self.net.context(seed))

    def recovered(self, stage: str) -> Outcome:
        """A stage after the short distillation."""
        return apply(self.stages.program(stage), recover(self.steps), self.net.context())

    def measured(self, program: Program) -> Row:
        """Accuracy and cost of a stage."""
        ratio = cost(self.net.program).macs / cost(program).macs
        return {"val": self.net.score(program, "validation"), "macs_ratio": ratio}

    def _notes(self, row: str) -> Any:
        return self.stages.folder / f"{row}.json"


def stage_rows(job: Job) -> dict[str, Row]:
    """Every score in every column, each a row of its own."""
    held: dict[str, Row] = {}
    settings = {"step": CUT, "samples": job.net.samples}
    training = settings | {"steps": job.steps, "batch": BATCH}
    for name, score, seed in job.runs:
        held[f"{name}_cut"] = job.stages.row(
            f"{name}_cut", lambda n=name, s=score, k=seed: job.cut(n, s, k), job.measured,
            **settings,
        )  # fmt: skip
        held[name] = job.stages.row(
            name, lambda n=name, s=score, k=seed: job.repaired(n, s, k), job.measured, **settings
        )
    for suffix in ("", "_cut"):
        for name, _, _ in job.runs:
            stage = f"{name}{suffix}"
            held[f"{stage}_recovered"] = job.stages.row(
                f"{stage}_recovered", lambda s=stage: job.recovered(s), job.measured, **training
            )
    return held


def test_row(job: Job, names: Sequence[str]) -> Row:
    """Accuracy of every stage on the test rows; they decide nothing."""
    there = [name for name in names if job.stages.path(name).exists()]
    found = {name: job.net.score(job.stages.program(name), "test") for name in there}
    return {"base": job.net.score(job.net.model, "test"), **found}


def chances(values: Mapping[str, float], column: str) -> list[float]:
    """What chance reached in a column, one value for each seed."""
    suffix = COLUMNS[column]
    names = [name for name in values if name.startswith(CHANCE)]
    return [values[name] for name in names if name.removeprefix(CHANCE).lstrip("0123456789")
            == suffix]  # fmt: skip


def judged(scores: Sequence[str], values: Mapping[str, float]) -> dict[str, dict[str, bool]]:
    """Score → column → whether it is above every seed of chance; columns not yet run are left out.

    Args:
        scores: their names.
        values: row → accuracy.
    """
    verdicts: dict[str, dict[str, bool]] = {}
    for score in scores:
        for column, suffix in COLUMNS.items():
            chance, mine = chances(values, column), values.get(score + suffix)
            if chance and mine is not None:
                verdicts.setdefault(score, {})[column] = mine > max(chance)
    return verdicts


def note(verdict: Mapping[str, bool]) -> str:
    """In words, where a score does not beat chance."""
    lost = [column for column, beats in verdict.items() if not beats]
    if not lost:
        return "beats chance wherever it was measured"
    return f"does not beat chance: {'; '.join(lost)}"


def page(job: Job, values: Mapping[str, float], base: float) -> Comparison:
    """The table and the chart, best repaired score first."""
    verdicts = judged(job.scores, values)
    entries: list[Entry] = []
    for score in sorted(job.scores, key=lambda name: -values.get(name, 0.0)):
        found = {
            c: values[score + suffix] for c, suffix in COLUMNS.items() if score + suffix in values
        }
        verdict = verdicts.get(score, {})
        entries.append(Entry(score, found, note=note(verdict), good=all(verdict.values())))
    held = {column: chances(values, column) for column in COLUMNS}
    held = {column: found for column, found in held.items() if found}
    entries.append(Entry(
        f"chance, seeds 0 to {job.seeds - 1}" if job.seeds > 1 else "chance",
        {column: sum(found) / len(found) for column, found in held.items()},
        {column: (min(found), max(found)) for column, found in held.items()},
        "the control: mean, lowest and highest",
    ))  # fmt: skip
    losers = [score for score, found in verdicts.items() if not all(found.values())]
    verdict = (
        f"Do not beat chance in every column: {', '.join(losers)}." if losers
        else "Every score beats chance in every column measured."
    )  # fmt: skip
    return Comparison("Importances of channels, side by side", verdict, list(COLUMNS), "%",
                      entries, remarks(job, base), 100.0)  # fmt: skip


def remarks(job: Job, base: float) -> list[str]:
    """How it was measured."""
    return [
        f"ResNet-{DEPTH}, CIFAR-10, accuracy on the 5,000 validation rows (original {base:.2f} %); "
        "the test rows stand in the JSON.",
        "Half of the multiply-adds cut, the same part of each block's inner channels, so all "
        "networks have the same shape.",
        f"Calibration: {job.net.samples} augmented training images without labels. Repaired: least "
        "squares and batch norm, prune.channels' own. Cut: nothing repaired.",
        f"Recovered: {job.steps} steps of distillation, batch {BATCH}, the same for all.",
        "Beats chance: above the best of its seeds. With 5,000 images a difference below 0.6 "
        "points can be luck.",
    ]


def main(argv: list[str] | None = None) -> Row:
    """Run the rows, write the page and print the JSON line."""
    bench = Bench("importances", __doc__ or "")
    bench.parse(argv)
    job = Job(bench)
    base = bench.row("base", lambda: {"val": job.net.score(job.net.model, "validation")})
    held = stage_rows(job)
    values = {name: row["val"] for name, row in held.items() if "val" in row}
    bench.row("test", lambda: test_row(job, list(held)), of=values)
    verdicts = judged(job.scores, values)
    comparison.write(page(job, values, base.get("val", 0.0)), bench.path.with_suffix(".html"))
    lost = [score for score, found in verdicts.items() if not all(found.values())]
    return bench.finish(base_acc=base.get("val"), beats_random=verdicts, not_above_random=lost)


if __name__ == "__main__":
    main()
