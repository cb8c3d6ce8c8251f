"""Layer skipping on MiniLM: time over a stream of real sentences at a stated cosine.

`gated`: gates in front of the six layers (attention and feed-forward as one unit), trained with the
network on unlabelled text towards the original's embeddings; the threshold is set on SST-2 dev
sentences. `fixed`: the peer at equal cost, the layers whose loss hurts least taken out
(`simplify.drop_layers`) and the rest trained for as many steps. `test`: cosine to the original over
SST-2 test sentences. `stream`: milliseconds for each sentence over the stream of test sentences,
one at a time and 32 at a time, in OpenVINO: the original, the fixed network, and the gated one as a
chain of pieces; all in turn. Sentences are padded to 128 tokens with their real masks.

    python -m benchmarks.skip_layers [--steps 1000] [--only gated] [--quick]
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import minilm_main, peers
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages, apply
from laconic.methods.base import Outcome
from laconic.program.chain import split
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.runtimes import _chain
from laconic.runtimes.base import Precision, fixed_shapes
from laconic.runtimes.openvino import OpenVino

TOKENS = minilm_main.TOKENS
BATCHES = (1, 32)
STEPS = 1_000
GATE: dict[str, Any] = {
    "method": "dynamic.skip_layers", "unit": 2, "share": 0.66, "penalty": 0.5, "lr": 4e-4,
    "train": ["*", "!*embeddings*"],
}  # fmt: skip
FIXED: list[dict[str, Any]] = [
    {"method": "simplify.drop_layers", "unit": 2, "count": 2, "importance": "loss",
     "samples": 256},
    {"method": "distill.logits", "sites": ["*", "!*embeddings*"], "lr": 4e-4},
]  # fmt: skip


class Job(minilm_main.Job):
    """The original, its text, and stages of this benchmark."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.stages = Stages(bench, "skip_layers")
        self.tokens = 32 if self.quick else TOKENS
        self.written: dict[str, Path] = {}
        length = {"steps": bench.args.steps}
        few = {"steps": 1, "precision": "fp32", "teacher": "torch", "evaluations": 1}
        first = {"sites": "encoder.encoder.layer.0*", "samples": 4}
        self.gate = GATE | (few | first if self.quick else length)
        self.fixed = [FIXED[0] | ({"importance": "l2", "count": 1} if self.quick else {}),
                      FIXED[1] | (few if self.quick else length)]  # fmt: skip

    def batches(
        self, texts: list[str], size: int, tokens: int | None = TOKENS
    ) -> list[minilm_main.Batch]:
        """As there; shorter with `--quick`."""
        return super().batches(texts, size, self.tokens if tokens else None)

    def sentences(self, split: str) -> list[str]:
        """As there; fewer with `--quick`."""
        return super().sentences(split)[: 8 if self.quick else None]

    def made(self) -> Outcome:
        """The gated network."""
        return apply(self.program, self.gate, self.context())

    def shortened(self) -> Outcome:
        """Without the layers that matter least, trained as long."""
        dropped = apply(self.program, self.fixed[0], self.context())
        return apply(dropped.program, self.fixed[1], self.context())

    def dev(self, program: Program) -> Row:
        """Cosine over SST-2 dev sentences, in torch, and the cost where every layer runs."""

        def run(inputs: Any) -> list[np.ndarray]:
            with torch.inference_mode():
                return [program(*(torch.from_numpy(array) for array in inputs)).numpy()]

        ratio = cost(self.program).macs / cost(program).macs
        return {"macs_ratio": ratio, **minilm_main.spread(self.cosines(run, "dev", 24), "cosine")}


def model_rows(job: Job) -> dict[str, Row]:
    """Both networks; cosines over dev sentences, and who runs which layer."""
    seed, row = job.bench.args.seed, job.stages.row
    figures: Row = {}

    def gated() -> Outcome:
        outcome = job.made()
        figures.update({key: outcome.figures[key] for key in ("executed", "spent", "seconds")})
        return outcome

    return {
        "gated": row("gated", gated, lambda made: {**job.dev(made), **figures},
                     step=job.gate, seed=seed),
        "fixed": row("fixed", job.shortened, job.dev, steps=job.fixed, seed=seed),
    }  # fmt: skip


# deployed -----------------------------------------------------------------------------------


def static(job: Job, name: str, program: Program, precision: Precision, batch: int) -> peers.Runner:
    """A network as one graph."""
    runtime, key = OpenVino(), f"{name}-{precision}"
    if key not in job.written:
        path = job.stages.folder / f"{key}.xml"
        job.written[key] = runtime.write(program, path, precision)
    return runtime.load(job.written[key], precision, job.threads, shapes(job, program, batch)).run


def chained(job: Job, precision: Precision, batch: int) -> peers.Runner:
    """The gated network as a chain of pieces, in which rows that skip a layer cost nothing."""
    runtime, key, program = OpenVino(), f"gated-{precision}", job.stages.program("gated")
    if key not in job.written:
        path = _chain.path_of(job.stages.folder / f"{key}.xml", runtime)
        job.written[key] = _chain.write(split(program), runtime, path, precision)
    return _chain.load(job.written[key], runtime, job.threads, shapes(job, program, batch)).run


def shapes(job: Job, program: Program, batch: int) -> dict[str, tuple[int, int]]:
    """Ids and mask."""
    return {name: (batch, job.tokens) for name in fixed_shapes(program, batch)}


def there(job: Job) -> list[str]:
    """The networks that have been made."""
    return [name for name in ("gated", "fixed") if job.stages.path(name).exists()]


def runners(job: Job, precision: Precision, batch: int) -> dict[str, peers.Runner]:
    """Original, fixed and gated, as OpenVINO runs them."""
    found = {"original": static(job, "original", job.program, precision, batch)}
    if "fixed" in there(job) and not job.quick:
        found["fixed"] = static(job, "fixed", job.stages.program("fixed"), precision, batch)
    if "gated" in there(job):
        found["gated"] = chained(job, precision, batch)
    return found


def test_row(job: Job) -> Row:
    """Cosines over SST-2 test sentences, as deployed."""
    found: Row = {}
    for precision in ("fp32",) if job.quick else ("fp32", "bf16"):
        for name, run in runners(job, precision, 8).items():
            cosines = job.cosines(run, "test", 8)
            found |= minilm_main.spread(cosines, f"{name}_{precision}")
    return found


def stream_row(job: Job) -> Row:
    """Milliseconds for each sentence of the stream, all in turn."""
    sentences = [np.concatenate(part) for part in zip(*job.arrays("test"), strict=True)]
    sentences = [array[: 8 if job.quick else 256] for array in sentences]
    found: Row = {"threads": job.threads, "busy": peers.busy_share(0.2)}
    for precision in ("fp32",) if job.quick else ("fp32", "bf16"):
        for batch in (2,) if job.quick else BATCHES:
            calls = {name: _through(run, sentences, batch)
                     for name, run in runners(job, precision, batch).items()}  # fmt: skip
            for name, turns in _in_turn(calls, 1 if job.quick else 5).items():
                key = f"{name}_{precision}_b{batch}"
                each = [1000 * turn / len(sentences[0]) for turn in turns]
                found |= {key: median(each), f"{key}_low": min(each), f"{key}_high": max(each)}
    return found


def _through(run: peers.Runner, sentences: Sequence[Any], batch: int) -> Callable[[], object]:
    return lambda: peers.batched_outputs(run, sentences, batch)


def _in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in every round, the order turned each time; one call before to warm."""
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(rounds):
        for name in list(calls) if number % 2 == 0 else list(reversed(calls)):
            began = time.perf_counter()
            calls[name]()
            turns[name].append(time.perf_counter() - began)
    return turns


def summary(rows: dict[str, Row]) -> Row:
    """Cosine and time saved, from the rows that are there."""
    test, stream = rows["test"], rows["stream"]
    found: Row = {"spent": rows["gated"].get("spent")}
    for name in ("gated", "fixed"):
        found[f"cosine_{name}"] = test.get(f"{name}_fp32")
        for key, own in stream.items():
            if key.startswith(f"{name}_") and key.rsplit("_", 1)[1].startswith("b"):
                whole = stream.get(key.replace(name, "original", 1))
                found[f"latency_ratio_{key}"] = whole / own if whole else None
    return found


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("skip_layers", __doc__ or "")
    bench.parser.add_argument("--seed", type=int, default=0)
    bench.parser.add_argument("--steps", type=int, default=STEPS, help="of both trainings")
    bench.parse(argv)
    job = Job(bench)
    rows = model_rows(job)
    settings = {"steps": [job.gate, *job.fixed], "seed": bench.args.seed, "threads": job.threads}
    rows["test"] = bench.row("test", lambda: test_row(job), **settings)
    rows["stream"] = bench.row("stream", lambda: stream_row(job), **settings)
    return bench.finish(**summary(rows))


if __name__ == "__main__":
    main()
