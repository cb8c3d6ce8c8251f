"""Shape buckets on MiniLM: a stream of real sentences, served by code for a few lengths.

Two streams: `sst2` (872 SST-2 test sentences) and `wikitext` (600 lines of WikiText-2's test file,
cut at the model's 256 tokens: a long tail). Buckets are chosen on other text: SST-2 dev sentences
and WikiText-2's validation lines. Each stream is served one sentence at a time (rows `_b1`) and in
batches of eight (rows `_b8`: as they come, and `sorted_`, after sorting all of them by length), in
OpenVINO in fp32, bf16 and int8 (`quantize.static`, calibrated on 300 SST-2 training sentences), by

* `padded`: code for one shape, everything padded to the longest of the stream;
* `dynamic`: one file for any shape, a batch padded to its longest: OpenVINO's own practice;
* `buckets`: `laconic.specialize`, the same arrays as `dynamic`.

In fp32 also ONNX Runtime's dynamic session, eager PyTorch and `torch.compile(dynamic=True)`.
`_ms` is milliseconds a sentence once everything is warm, all runners in turns over blocks of the
stream. `_stream_s` is the whole stream from an unopened file on, every opening on the way included,
`_once_s` what it takes longer than the same stream right after it: opening, compiling, the first
call of each shape; of both the median of three (the first of eager and torch.compile). Buckets have
to pay within the stream. `break_even` is the number of sentences after which they have earned what
they cost once, against `dynamic` (`break_even_padded`: against `padded`). `cosine` is the least
between what buckets and the dynamic file give.

    python -m benchmarks.shape_buckets [--only sst2_bf16_b1] [--threads 2] [--quick]
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import models, peers
from benchmarks.data import data_folder, sst2, tokenised
from benchmarks.harness import Bench, Row
from benchmarks.stages import Said, Stages, apply
from laconic import specialize
from laconic.core.task import embedding
from laconic.engine.dispatch import Dispatcher, load
from laconic.methods.base import Context
from laconic.program.capture import capture
from laconic.program.program import Program
from laconic.runtimes.base import Precision
from laconic.runtimes.onnxruntime import OnnxRuntime
from laconic.runtimes.openvino import OpenVino

LONGEST = 256  # tokens: what all-MiniLM-L6-v2 was made for
LINES = 600
SIZES: dict[int, dict[str, Any]] = {  # lengths compiled for at most, by the batch that comes
    1: {"count": 24, "batches": [1]},
    8: {"count": 8, "batches": [1, 2, 4, 8]},
}
STREAMS = ("sst2", "wikitext")
WAYS = ("padded", "dynamic", "buckets")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
QUANTIZE: dict[str, Any] = {"method": "quantize.static", "samples": 300}
BLOCK = 24  # requests of one turn
Request = list[np.ndarray]
Run = Callable[[Request], list[np.ndarray]]


class Job:
    """The model, its tokenizer, the streams."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.quick = bench, bool(bench.args.quick)
        self.threads = min(bench.args.threads, torch.get_num_threads())
        self.rounds = 1 if self.quick else 3
        self.sizes = SIZES
        if self.quick:
            self.sizes = {1: {"count": 2, "batches": [1]}, 8: {"count": 2, "batches": [1, 8]}}
        self.stages = Stages(bench, "shape_buckets")

    @cached_property
    def model(self) -> models.Embedder:
        """The original; with `--quick` a small random one for the same words."""
        if self.quick:
            return tiny()
        with peers.quiet():
            return models.minilm()

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return models.minilm_tokenizer()

    @cached_property
    def program(self) -> Program:
        """The original, captured: batch and sequence length may change."""
        example = tokenised(["one", "another sentence"], self.tokenizer, 2, None)[0]
        return capture(self.model, example, dynamic=("batch", "sequence"))

    def program_for(self, kind: Precision) -> Program:
        """What is served in a precision."""
        return self.stages.program("int8") if kind == "int8" else self.program

    def tokens(self, stream: str, split: str) -> list[np.ndarray]:
        """Ids `[1, length]` of every text of a stream, in its order."""
        if stream == "sst2":
            texts = [text for text, _ in sst2(split)]
        else:
            name = {"dev": "valid", "test": "test"}[split]
            path = data_folder() / "wikitext2" / f"{name}.txt"
            lines = path.read_text(encoding="utf-8").replace("<unk>", "unknown").splitlines()
            texts = [line.strip() for line in lines if line.strip()]
        few = 24 if self.quick else {"test": 872 if stream == "sst2" else LINES}.get(split)
        found = self.tokenizer(texts[:few], truncation=True, max_length=LONGEST)["input_ids"]
        return [np.array([ids], np.int64) for ids in found]

    def int8(self) -> Any:
        """The original with integers, calibrated as the peers are."""
        texts = [text for text, _ in sst2("train")[: 16 if self.quick else 300]]
        batches = tokenised(texts, self.tokenizer, 8 if self.quick else 50, None)
        task = embedding(calibration=[(batch, None) for batch in batches], validation=[])
        context = Context(task=task, original=self.program, seed=0, progress=Said(self.bench))
        return apply(self.program, QUANTIZE | ({"samples": 16} if self.quick else {}), context)


def tiny() -> models.Embedder:
    """A random sentence encoder, two layers of 32, in eval mode."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=64)
    return models.Embedder(BertModel(config, add_pooling_layer=False)).eval()


def batched(texts: Sequence[np.ndarray], size: int, longest: int = 0) -> list[Request]:
    """Requests of `size` texts: ids and mask, padded to `longest` or to their own longest."""
    made: list[Request] = []
    for start in range(0, len(texts) - size + 1, size):
        part = texts[start : start + size]
        length = longest or max(ids.shape[1] for ids in part)
        ids, mask = (np.zeros((size, length), np.int64) for _ in range(2))
        for row, text in enumerate(part):
            ids[row, : text.shape[1]], mask[row, : text.shape[1]] = text, 1
        made.append([ids, mask])
    return made


@dataclass
class Way:
    """One way of serving: `open` gives what runs its requests."""

    open: Callable[[], Run]
    requests: list[Request]
    times: int = 1
    """How often it is opened for timing that."""

    def cold(self) -> tuple[Run, float, float]:
        """Opened and run over the stream twice: the runner, seconds of the first and the second."""
        start = time.perf_counter()
        run = self.open()
        for request in self.requests:
            run(request)
        middle = time.perf_counter()
        for request in self.requests:
            run(request)
        return run, middle - start, time.perf_counter() - middle


def served(ways: Mapping[str, Way], sentences: int, rounds: int) -> dict[str, Row]:
    """Warm ms a sentence (`ms`), seconds that come on top once (`once_s`), all of a cold stream."""
    runs: dict[str, Run] = {}
    cold: dict[str, list[float]] = {name: [] for name in ways}
    more: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(max(way.times for way in ways.values())):
        for name, way in ways.items():
            if turn < way.times:
                runs[name], first, second = way.cold()
                cold[name].append(first)
                more[name].append(max(first - second, 0.0))
    totals: dict[str, list[float]] = {name: [] for name in ways}
    count = len(next(iter(ways.values())).requests)
    for number in range(rounds):
        spent = dict.fromkeys(ways, 0.0)
        for turn, first in enumerate(range(0, count, BLOCK)):
            order = list(ways) if (turn + number) % 2 == 0 else list(ways)[::-1]
            for name in order:
                block = ways[name].requests[first : first + BLOCK]
                runs[name](block[0])  # wakes its threads; others' have to fall asleep
                start = time.perf_counter()
                for request in block:
                    runs[name](request)
                spent[name] += time.perf_counter() - start
        for name, seconds in spent.items():
            totals[name].append(seconds)
    found: dict[str, Row] = {}
    for name, values in totals.items():
        each = [1e3 * value / sentences for value in values]
        found[name] = {"ms": median(each), "low": min(each), "high": max(each),
                       "once_s": median(more[name]), "stream_s": median(cold[name])}  # fmt: skip
    return found


def earned(buckets: Row, other: Row) -> float | None:
    """Sentences until `buckets` have earned what they cost once; None: never."""
    saved = other["ms"] - buckets["ms"]
    if saved <= 0:
        return None
    return max(math.ceil(1e3 * (buckets["once_s"] - other["once_s"]) / saved), 0)


def peer_ways(job: Job, folder: Path) -> dict[str, Callable[[], Run]]:
    """What others do with lengths that change, in fp32."""

    path = OnnxRuntime().write(job.program, folder / "peer.onnx")

    def compiled() -> Run:
        return peers.eager(torch.compile(job.model, dynamic=True), job.threads)  # type: ignore[arg-type]

    found = {
        "onnxruntime": lambda: peers.onnxruntime(path, job.threads),
        "eager": lambda: peers.eager(job.model, job.threads),
    }
    return found if job.quick else {**found, "torch_compile": compiled}


def row(job: Job, stream: str, kind: Precision, batch: int) -> Row:
    """One stream in one precision, alone or in batches."""
    texts, seen = job.tokens(stream, "test"), job.tokens(stream, "dev")
    sample = [{"batch": batch, "sequence": ids.shape[1]} for ids in seen]
    longest = max(ids.shape[1] for ids in texts)
    found: Row = {"threads": job.threads, "longest": longest, "busy": peers.busy_share(),
                  "length": float(np.mean([ids.shape[1] for ids in texts]))}  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()
        made = specialize(
            job.program_for(kind), sample, out=folder, precision=kind, threads=job.threads,
            requests=None if job.quick else len(texts) // batch, **job.sizes[batch],
        )  # fmt: skip
        lengths = sorted({bucket.sizes["sequence"] for bucket in made.held.buckets})
        found |= {"build_s": time.perf_counter() - start, "lengths": lengths,
                  "compiled": len(made.held.buckets)}  # fmt: skip
        others = peer_ways(job, folder) if kind == "fp32" else {}
        found |= stream_row(job, folder, kind, batched(texts, batch), longest, others)
        if batch > 1:
            ordered = batched(sorted(texts, key=np.size), batch)
            held = stream_row(job, folder, kind, ordered, longest, others)
            found |= {f"sorted_{key}": value for key, value in held.items()}
    return found


def stream_row(
    job: Job, folder: Path, kind: Precision, requests: list[Request], longest: int,
    others: Mapping[str, Callable[[], Run]],
) -> Row:  # fmt: skip
    """One stream of requests, served in every way."""
    size = len(requests[0][0])
    full = [[widened(array, longest) for array in request] for request in requests]
    shapes = {name: (size, longest) for name in ("input_ids", "attention_mask")}
    opened: dict[str, Dispatcher] = {}

    def buckets() -> Run:
        opened["it"] = load(folder, job.threads)
        return opened["it"].run

    def one(shape: Mapping[str, Any] | None) -> Callable[[], Run]:
        return lambda: OpenVino().load(folder / "model.xml", kind, job.threads, shape).run

    ways = {
        "padded": Way(one(shapes), full, job.rounds),
        "dynamic": Way(one(None), requests, job.rounds),
        "buckets": Way(buckets, requests, job.rounds),
        **{name: Way(open_it, requests) for name, open_it in others.items()},
    }
    found = served(ways, len(requests) * size, job.rounds)
    flat = {f"{name}_{key}": value for name, values in found.items()
            for key, value in values.items()}  # fmt: skip
    return flat | {
        "sentences": len(requests) * size,
        "break_even": earned(found["buckets"], found["dynamic"]),
        "break_even_padded": earned(found["buckets"], found["padded"]),
        "cosine": likeness(opened["it"].run, one(None)(), requests[:50]),
        "would_compile": [str(missed) for missed in opened["it"].missed()[:2]],
    }


def widened(array: np.ndarray, length: int) -> np.ndarray:
    """Zeros behind every row, up to `length`."""
    return np.pad(array, ((0, 0), (0, length - array.shape[1])))


def likeness(one: Run, other: Run, requests: Sequence[Request]) -> float:
    """The least cosine between two runners' embeddings."""
    least = 1.0
    for request in requests:
        a, b = (torch.from_numpy(run(request)[0]) for run in (one, other))
        least = min(least, float(torch.cosine_similarity(a, b, dim=-1).min()))
    return least


def summary(rows: Mapping[str, Row]) -> Row:
    """The figures the issue asks for: SST-2 alone and in batches, in the best precision.

    Best is the precision in which the dynamic file is fastest: not chosen by what buckets give.
    """
    found: Row = {}
    for stream, start in zip(STREAMS, ("", "wikitext_"), strict=True):
        for batch, behind in ((1, ""), (8, "_b8")):
            able = {kind: rows.get(f"{stream}_{kind}_b{batch}", {}) for kind in PRECISIONS}
            known = {kind: each for kind, each in able.items() if each}
            if not known:
                continue
            best = min(known, key=lambda kind, known=known: known[kind]["dynamic_ms"])
            told = {"precision": best, **known[best]}
            keys = ["precision", "break_even"]
            keys += [f"{way}_{key}" for way in WAYS for key in ("ms", "stream_s")]
            if batch > 1:
                keys += [f"sorted_{key}" for key in keys[1:]]
            found |= {f"{start}{key}{behind}": told[key] for key in keys}
            found[f"{start}compile_s{behind}"] = told["buckets_once_s"]
    return found


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("shape_buckets", __doc__ or "")
    bench.parser.add_argument("--threads", type=int, default=2)
    bench.parse(argv)
    job = Job(bench)
    job.stages.row("int8", job.int8, lambda _: {}, step=QUANTIZE)
    rows: dict[str, Row] = {}
    for stream, kind, batch in product(STREAMS, PRECISIONS, SIZES):
        name = f"{stream}_{kind}_b{batch}"
        compute = partial(row, job, stream, kind, batch)
        rows[name] = bench.row(name, compute, sizes=job.sizes[batch])
    return bench.finish(**summary(rows))


if __name__ == "__main__":
    main()
