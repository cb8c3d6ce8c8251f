"""MiniLM sentence embeddings: half the feed-forward width and a third of the heads, then int8.

Rows: `nncf` (the peer: the original in int8, calibrated on 300 SST-2 training sentences), the job
(`prune`, `recover`, `longer` on text that is new once more, `int8`, and on with its integers:
`trained`), `test` (cosine to the
original's embeddings over the SST-2 test sentences) and `latency` (batch 1 and 32, 128 tokens,
interleaved in one run). Choices are made on SST-2 dev sentences. Calibration and recovery read
plain text cut anew every pass from WikiText-2, tiny Shakespeare and SST-2 training sentences (see
`benchmarks/text.py`), and the original's embeddings of it, no labels. Every model is measured on
sentences padded to 128 tokens with their real masks.
"""

import copy
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import models, peers
from benchmarks.data import sst2, tokenised
from benchmarks.harness import Bench, Row
from benchmarks.stages import Said, Stages, apply
from benchmarks.text import Spliced, running
from laconic.core.task import Task, embedding
from laconic.methods.base import Context
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.runtimes.base import Precision, fixed_shapes
from laconic.runtimes.openvino import OpenVino
from laconic.storage import predict

TOKENS = 128
THREADS = 2
PRUNE: dict[str, Any] = {
    "method": "prune.channels", "sites": ["*.heads", "*.intermediate.*"], "of": "channels",
    "ratio": {"*.heads": 1 / 3, "*.intermediate.*": 0.5}, "samples": 3200,
}  # fmt: skip
STAGES = ("prune", "recover", "longer", "int8", "trained")
LAYERS = [f"layer_norm_{2 * layer}" for layer in range(1, 7)]  # what each layer gives
RECOVER: dict[str, Any] = {
    "method": "distill.logits", "sites": ["*", "!*embeddings*"], "steps": 5000, "lr": 1e-3,
    "features": 4.0, "nodes": LAYERS,
}  # fmt: skip
QUANTIZE: dict[str, Any] = {"method": "quantize.static"}
# Once the layers give what they gave, the embedding itself counts for more.
LONGER = RECOVER | {"steps": 7000, "lr": 8e-4, "features": 1.0}
TRAIN_INT8 = RECOVER | {"steps": 1500, "lr": 5e-4, "features": 1.0}
UNSEEN = 1_000  # number of the first pass over text that `recover` has not read
CALIBRATION = 50  # batches of 64 texts; few or only sentences cost the pruned model other text

Batch = dict[str, Tensor]


class Job:
    """The original, its tokenizer, its text."""

    few_layers = 2
    """With `--quick` these layers of the original are all there is."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.quick = bench, bool(bench.args.quick)
        self.threads = min(THREADS, torch.get_num_threads())
        self.stages = Stages(bench, "minilm_main")
        self.known: dict[str, Tensor] = {}  # embeddings of the original, by split
        few = {"steps": 3, "nodes": LAYERS[: self.few_layers]}
        small = {"samples": 24, "importance": "l2", "block": 8}
        self.prune = PRUNE | (small if self.quick else {})
        self.recover = RECOVER | (few if self.quick else {})
        self.quantize = QUANTIZE | ({"samples": 8} if self.quick else {})
        self.train_int8 = TRAIN_INT8 | (few if self.quick else {})
        self.longer = LONGER | (few if self.quick else {})
        self.recipe = [self.prune, self.recover, self.longer, self.quantize, self.train_int8]

    @cached_property
    def model(self) -> models.Embedder:
        """The original; its first layers with `--quick`."""
        with peers.quiet():
            made = models.minilm()
        if self.quick:
            encoder: Any = made.encoder.encoder
            encoder.layer = encoder.layer[: self.few_layers]
        return made

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return models.minilm_tokenizer()

    @cached_property
    def program(self) -> Program:
        """The original, captured: batch and sequence length may change."""
        example = self.batches(["one", "another sentence"], 2)[0]
        return capture(self.model, example, dynamic=("batch", "sequence"))

    def batches(self, texts: list[str], size: int, tokens: int | None = TOKENS) -> list[Batch]:
        """Tokenised batches; with `tokens` None each as long as its longest text."""
        return tokenised(texts, self.tokenizer, size, tokens)

    def sentences(self, split: str) -> list[str]:
        """SST-2 sentences of a split; few of them with `--quick`."""
        count = {"train": 300, "dev": 600, "test": 872}[split]
        return [text for text, _ in sst2(split)][: 24 if self.quick else count]

    @cached_property
    def train(self) -> Spliced:
        """New text every pass, made of all there is but what choices and the test look at."""
        phrases = [text for text, _ in sst2("train")[300:]]
        if self.quick:
            return Spliced(phrases[::200], running()[::50], self.tokenizer, size=4, count=8)
        return Spliced(phrases, running(), self.tokenizer)

    @cached_property
    def unseen(self) -> Spliced:
        """More of it, that only `longer` reads."""
        made = copy.copy(self.train)
        made.seed, made.passes = UNSEEN, 0
        return made

    @cached_property
    def task(self) -> Task:
        """Embeddings: no targets but the original's outputs."""
        dev = self.batches(self.sentences("dev"), 50)
        with torch.inference_mode():
            wanted = [self.model(**batch) for batch in dev]
        return embedding(
            train=self.train, calibration=list(islice(self.train, CALIBRATION)),
            validation=list(zip(dev, wanted, strict=True)),
        )  # fmt: skip

    def context(self, train: Spliced | None = None) -> Context:
        """What the methods get; `train` in place of the usual text."""
        task = self.task if train is None else replace(self.task, train=train)
        return Context(task=task, original=self.program, seed=self.bench.args.seed,
                       progress=Said(self.bench))  # fmt: skip

    def arrays(self, split: str) -> list[list[np.ndarray]]:
        """Each sentence of a split by itself: ids and mask [1, 128]."""
        batches = self.batches(self.sentences(split), 1)
        return [[batch["input_ids"].numpy(), batch["attention_mask"].numpy()] for batch in batches]

    def cosines(self, run: peers.Runner, split: str, batch: int) -> Tensor:
        """Cosine of a runner's embeddings to the original's, one a sentence."""
        inputs = [np.concatenate(part) for part in zip(*self.arrays(split), strict=True)]
        found = torch.from_numpy(peers.batched_outputs(run, inputs, batch))
        return torch.cosine_similarity(found, self.originals(split), dim=-1)

    def originals(self, split: str) -> Tensor:
        """The original's embeddings in fp32."""
        if split not in self.known:
            batches = self.batches(self.sentences(split), 24)
            with torch.inference_mode():
                self.known[split] = torch.cat([self.model(**batch) for batch in batches])
        return self.known[split]


def spread(cosines: Tensor, name: str) -> Row:
    """Mean and minimum under `name` and `name_min`."""
    return {name: cosines.mean().item(), f"{name}_min": cosines.min().item()}


def nncf_model(job: Job) -> Any:
    """The peer: `nncf.quantize` with the model type that its documentation gives transformers."""
    example = job.batches(["an example"], 1)[0]
    original = peers.openvino_model(job.model, tuple(example.values()))
    return peers.nncf_int8(original, job.arrays("train"), settings="transformer")


def ours(job: Job, stage: str, precision: Precision, batch: int) -> peers.Runner:
    """A stage's artifact as OpenVINO runs it, at 128 tokens."""
    runtime, program = OpenVino(), job.stages.program(stage)
    path = job.stages.file(stage, precision)
    shapes = {name: (batch, TOKENS) for name in fixed_shapes(program, batch)}
    return runtime.load(path, precision, job.threads, shapes).run


def stage_rows(job: Job) -> dict[str, Row]:
    """The job itself; cosines over SST-2 dev sentences."""
    macs = cost(job.program).macs

    def measured(program: Program) -> Row:
        def run(inputs: Any) -> list[np.ndarray]:
            with torch.inference_mode():
                return [program(*(torch.from_numpy(array) for array in inputs)).numpy()]

        ratio = macs / cost(program).macs
        return {"macs_ratio": ratio, **spread(job.cosines(run, "dev", 24), "cosine")}

    def deployed(program: Program, stage: str) -> Row:
        cosines = job.cosines(ours(job, stage, "int8", 8), "dev", 8)
        size = predict(freeze(program)).total
        return {**spread(cosines, "cosine"), "laconic_bytes": size}

    row, context, seed = job.stages.row, job.context(), job.bench.args.seed

    def after(stage: str, step: dict[str, Any], train: Spliced | None = None) -> Any:
        return lambda: apply(job.stages.program(stage), step, job.context(train))

    return {
        "prune": row("prune", lambda: apply(job.program, job.prune, context), measured,
                     steps=job.recipe[:1], seed=seed),
        "recover": row("recover", after("prune", job.recover), measured,
                       steps=job.recipe[:2], seed=seed),
        "longer": row("longer", after("recover", job.longer, job.unseen), measured,
                      steps=job.recipe[:3], seed=seed),
        "int8": row("int8", after("longer", job.quantize), lambda made: deployed(made, "int8"),
                    steps=job.recipe[:4], seed=seed),
        "trained": row("trained", after("int8", job.train_int8),
                       lambda made: deployed(made, "trained"), steps=job.recipe, seed=seed),
    }  # fmt: skip


def test_row(job: Job) -> Row:
    """Cosines over the SST-2 test sentences: ours in int8 and bf16, the peer's."""
    peer = peers.openvino_runner(peers.reshaped(nncf_model(job), 8), "f32", job.threads)
    return {
        **spread(job.cosines(ours(job, "trained", "int8", 8), "test", 8), "cosine"),
        **spread(job.cosines(ours(job, "longer", "bf16", 8), "test", 8), "cosine_bf16"),
        **spread(job.cosines(peer, "test", 8), "cosine_nncf"),
    }


def latency_row(job: Job) -> Row:
    """Milliseconds at 128 tokens, batch 1 and 32, ours and the peers', interleaved."""
    runners: dict[str, peers.Runner] = {}
    inputs: dict[str, list[np.ndarray]] = {}
    example = tuple(job.batches(["an example"], 1)[0].values())
    original, int8 = peers.openvino_model(job.model, example), nncf_model(job)
    for batch in (1,) if job.quick else (1, 32):
        found: dict[str, peers.Runner] = {
            "ours_int8": ours(job, "trained", "int8", batch),
            "ours_bf16": ours(job, "longer", "bf16", batch),
            "nncf": peers.openvino_runner(peers.reshaped(int8, batch), "bf16", job.threads),
            "nncf_f32": peers.openvino_runner(peers.reshaped(int8, batch), "f32", job.threads),
            "openvino_bf16": peers.openvino_runner(
                peers.reshaped(original, batch), "bf16", job.threads
            ),
            "openvino_f32": peers.openvino_runner(
                peers.reshaped(original, batch), "f32", job.threads
            ),
            "eager": peers.eager(job.model, job.threads),
        }
        sentences = job.arrays("dev")[: min(batch, 24 if job.quick else batch)]
        arrays = [np.concatenate(part) for part in zip(*sentences, strict=True)]
        for name, runner in found.items():
            runners[f"{name}_b{batch}"], inputs[f"{name}_b{batch}"] = runner, arrays
    rounds, seconds = (2, 0.1) if job.quick else (7, 0.4)
    timed = peers.interleaved(runners, inputs, rounds=rounds, seconds=seconds)
    flat: Row = {"threads": job.threads, "busy": max(x["busy"] for x in timed.values())}
    for name, values in timed.items():
        flat |= {name: values["ms"], f"{name}_low": values["low"], f"{name}_high": values["high"]}
    return flat


def summary(rows: dict[str, Row]) -> Row:
    """The figures the issue asks for, from the rows that are there."""
    test, latency = rows["test"], rows["latency"]
    jobs = [rows[name].get("job_s") for name in STAGES]
    keys = ("cosine", "cosine_min", "cosine_nncf", "cosine_nncf_min", "cosine_bf16")
    fastest = [latency[key] for key in ("nncf_b1", "nncf_f32_b1") if key in latency]
    return {
        **{key: test.get(key) for key in keys},
        "latency_ms": latency.get("ours_int8_b1"),
        "latency_ms_nncf": min(fastest) if fastest else None,
        "latency_ms_b32": latency.get("ours_int8_b32"),
        "latency_ms_nncf_b32": latency.get("nncf_b32"),
        "macs_ratio": rows["prune"].get("macs_ratio"),
        "cosine_before_training": rows["prune"].get("cosine"),
        "minutes": sum(jobs) / 60 if all(jobs) else None,
    }


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("minilm_main", __doc__ or "")
    bench.parser.add_argument("--seed", type=int, default=0)
    bench.parse(argv)
    job = Job(bench)
    rows = stage_rows(job)
    steps = {"steps": job.recipe, "seed": bench.args.seed}
    rows["test"] = bench.row("test", lambda: test_row(job), **steps)
    rows["latency"] = bench.row("latency", lambda: latency_row(job), **steps)
    return bench.finish(**summary(rows))


if __name__ == "__main__":
    main()
