"""MiniLM sentence embeddings with 3 of its 6 layers: which ones, how they begin, and training.

Rows: `begin_*`, every way to begin, as it is and after a few hundred steps (the same for all; in
`random` the layers are drawn anew, the embeddings stay), and `fast`, other learning rates from the
fitted one: cosine to the original's embeddings over SST-2 dev sentences, on which everything is
chosen. Then the job: `start` (`transfer.weights`), `learn` (layers compared with the original's
every second one) and `longer` (on text that is new once more, the embedding itself counts for
more). `probe_teacher` and `probe_student`: logistic regression on frozen embeddings, fitted on
SST-2 training sentences, its penalty chosen on dev, accuracy on test. `test`: cosine over the SST-2
test sentences. Training reads plain text cut anew every pass (see `benchmarks/text.py`) and the
original's outputs, no labels.

    python -m benchmarks.minilm_3_layers [--steps 6000] [--only begin_fitted] [--quick]
"""

from collections.abc import Callable
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import minilm_main
from benchmarks.data import sst2
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages, apply
from benchmarks.starts import fresh, transferred
from benchmarks.text import Spliced
from laconic.core.task import Task, embedding
from laconic.methods.base import Outcome
from laconic.program.cost import cost
from laconic.program.program import Program

LAYERS = (0, 2, 5)
"""The layers that stay; `begin_*` rows say why."""
STEPS = 6_000
TRIAL = 300
LEARN: dict[str, Any] = {
    "method": "distill.logits", "sites": ["*", "!*embeddings*"], "lr": 1e-3, "features": 4.0,
}  # fmt: skip
LONGER = LEARN | {"lr": 8e-4, "features": 1.0}
BEGINNINGS: dict[str, dict[str, Any]] = {
    "even": {"layers": [0, 2, 5], "select": "leading"},
    "alternate": {"layers": [0, 2, 4], "select": "leading"},
    "late": {"layers": [1, 3, 5], "select": "leading"},
    "first": {"layers": [0, 1, 2], "select": "leading"},
    "fitted": {"layers": list(LAYERS), "select": "fitted"},
    "fitted_late": {"layers": [1, 3, 5], "select": "fitted"},
}
RATES = (5e-4, 2e-3)
PROBED = 20_000  # training sentences of the linear probe
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)


class Job(minilm_main.Job):
    """The original, its tokenizer, its text; stages of its own. All six layers in any case."""

    few_layers = 6

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.stages = Stages(bench, "minilm_3_layers")
        self.steps, self.trial = bench.args.steps, bench.args.trial
        if self.quick:
            self.steps = self.trial = 2

    def sentences(self, split: str) -> list[str]:
        """As of the other benchmark; fewer still with `--quick`."""
        return super().sentences(split)[: 8 if self.quick else None]

    @cached_property
    def task(self) -> Task:
        """As of the other benchmark; dev sentences no longer than they are."""
        dev = self.batches(self.sentences("dev"), 50, None)
        with torch.inference_mode():
            wanted = [self.model(**batch) for batch in dev]
        return embedding(
            train=self.train, calibration=list(islice(self.train, minilm_main.CALIBRATION)),
            validation=list(zip(dev, wanted, strict=True)),
        )  # fmt: skip

    def begun(self, **options: Any) -> Outcome:
        """The network with three layers."""
        few = {"select": "leading"} if self.quick else {}
        return apply(self.program, transferred(**options | few, samples=1024), self.context())

    def learn(
        self, program: Program, step: dict[str, Any], layers: list[int], train: Spliced | None
    ) -> Outcome:
        """Train towards the original: end of each layer to end of every second one there."""
        nodes = {f"layer_norm_{2 * k + 2}": f"layer_norm_{4 * i + 4}" for i, k in enumerate(layers)}
        few = {"evaluations": 1, "teacher": "torch"} if self.quick else {}
        return apply(program, step | {"nodes": nodes} | few, self.context(train))

    def cosine(self, program: Program, split: str) -> Row:
        """Cosine to the original's embeddings over SST-2 sentences: mean and least."""
        if split not in self.known:
            self.known[split] = self.embedded(self.model, self.sentences(split))
        found = self.embedded(program, self.sentences(split))
        return minilm_main.spread(
            torch.cosine_similarity(found, self.known[split], dim=-1), "cosine"
        )

    def embedded(self, model: Callable[..., Tensor], texts: list[str]) -> Tensor:
        """Embeddings `[texts, 384]`."""
        with torch.inference_mode():
            return torch.cat([model(**batch) for batch in self.batches(texts, 32, None)])

    def embeddings(self, model: Callable[..., Tensor], split: str) -> tuple[Tensor, Tensor]:
        """Embeddings `[sentences, 384]` and labels of a split."""
        rows = sst2(split)
        rows = rows[: 64 if self.quick else len(rows)][:: max(len(rows) // PROBED, 1)]
        rows = sorted(rows[: 64 if self.quick else PROBED], key=lambda row: len(row[0]))
        labels = torch.tensor([label for _, label in rows])
        return self.embedded(model, [text for text, _ in rows]), labels


def begin_row(job: Job, options: dict[str, Any] | None, layers: list[int], rate: float) -> Row:
    """One way to begin; None is at random, in the shape of the others."""
    made = job.begun(**(options or {"layers": layers, "select": "leading"})).program
    if options is None:
        made = fresh(made, job.bench.args.seed, keep=["*embeddings*"])
    step = LEARN | {"steps": job.trial, "lr": rate}
    trained = job.learn(made, step, layers, None).program
    before = {f"{key}_before": value for key, value in job.cosine(made, "dev").items()}
    return before | job.cosine(trained, "dev")


def begin_rows(job: Job) -> None:
    """Every way to begin, and learning rates."""
    for name, options in {**BEGINNINGS, "random": None}.items():
        layers = list(LAYERS) if options is None else options["layers"]
        settings = {"start": options, "steps": job.trial, "lr": LEARN["lr"]}
        job.bench.row(
            f"begin_{name}",
            lambda o=options, k=layers: begin_row(job, o, k, LEARN["lr"]),
            **settings,
        )

    def fast() -> Row:
        found: Row = {}
        for rate in RATES:
            row = begin_row(job, BEGINNINGS["fitted"], list(LAYERS), rate)
            found |= {f"{key}_{rate:g}": value for key, value in row.items()}
        return found

    job.bench.row("fast", fast, steps=job.trial, lr=list(RATES))


def stage_rows(job: Job) -> dict[str, Row]:
    """The job itself; cosines over SST-2 dev sentences."""
    macs, layers, seed = cost(job.program).macs, list(LAYERS), job.bench.args.seed
    begin = {"layers": layers, "select": "fitted"}
    learn, longer = (step | {"steps": job.steps} for step in (LEARN, LONGER))

    def measured(program: Program) -> Row:
        return {"macs_ratio": macs / cost(program).macs, **job.cosine(program, "dev")}

    def after(stage: str, step: dict[str, Any], train: Spliced | None) -> Callable[[], Outcome]:
        return lambda: job.learn(job.stages.program(stage), step, layers, train)

    row, unseen = job.stages.row, job.unseen
    return {
        "start": row("start", lambda: job.begun(**begin), measured, steps=[begin], seed=seed),
        "learn": row("learn", after("start", learn, None), measured, steps=[begin, learn],
                     seed=seed),
        "longer": row("longer", after("learn", longer, unseen), measured,
                      steps=[begin, learn, longer], seed=seed),
    }  # fmt: skip


def logistic(rows: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Weights `[features + 1]` of a logistic regression with an L2 penalty (L-BFGS)."""
    x, y = torch.cat([rows, torch.ones(len(rows), 1)], 1), labels.to(rows)
    weight = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = functional.binary_cross_entropy_with_logits(x @ weight, y)
        value = fit + penalty * weight[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


def probe_row(job: Job, model: Callable[..., Tensor]) -> Row:
    """Accuracy of a linear probe on frozen embeddings: penalty by dev, then test once."""
    sets = {split: job.embeddings(model, split) for split in ("train", "dev", "test")}
    spread = sets["train"][0].std(0, keepdim=True).clamp(min=1e-6)
    mean = sets["train"][0].mean(0, keepdim=True)

    def right(weight: Tensor, split: str) -> float:
        rows, labels = sets[split]
        answers = ((rows - mean) / spread) @ weight[:-1] + weight[-1] > 0
        return 100 * (answers == labels.bool()).float().mean().item()

    rows = (sets["train"][0] - mean) / spread
    fits = {p: logistic(rows, sets["train"][1], p) for p in PENALTIES}
    best = max(fits, key=lambda penalty: right(fits[penalty], "dev"))
    return {"dev": right(fits[best], "dev"), "test": right(fits[best], "test"), "penalty": best}


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("minilm_3_layers", __doc__ or "")
    bench.parser.add_argument("--seed", type=int, default=0)
    bench.parser.add_argument("--steps", type=int, default=STEPS, help="of learn and of longer")
    bench.parser.add_argument("--trial", type=int, default=TRIAL, help="steps of begin_* and fast")
    bench.parse(argv)
    job = Job(bench)
    begin_rows(job)
    rows = stage_rows(job)
    said = {"steps": job.steps, "seed": bench.args.seed}
    teacher = bench.row("probe_teacher", lambda: probe_row(job, job.model))
    student = bench.row(
        "probe_student", lambda: probe_row(job, job.stages.program("longer")), **said
    )
    test = bench.row("test", lambda: job.cosine(job.stages.program("longer"), "test"), **said)
    jobs = [rows[name].get("job_s") for name in rows]
    return bench.finish(
        cosine=test.get("cosine"),
        cosine_min=test.get("cosine_min"),
        sst2_teacher=teacher.get("test"),
        sst2_student=student.get("test"),
        macs_ratio=rows["start"].get("macs_ratio"),
        minutes=sum(jobs) / 60 if all(jobs) else None,
    )


if __name__ == "__main__":
    main()
