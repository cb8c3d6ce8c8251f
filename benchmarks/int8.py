"""Int8 after training on six models, beside NNCF and ONNX Runtime's own quantisation.

Rows per model: `<model>` (accuracy or cosine of the original and of `quantize.static` in OpenVINO
and in ONNX Runtime), `<model>_peers` (of `nncf.quantize` and of `quantize_static`, on the same
calibration samples, in their defaults and their best settings; so are ours for sentences) and
`<model>_latency` (milliseconds, all in turns in one run). Settings are compared on validation
samples, those for sentences by the mean and the least cosine together; `test` figures are beside
them.

    python -m benchmarks.int8 [--model resnet20] [--only resnet20_latency]
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.harness import Bench, Row
from benchmarks.stages import Said, Stages, apply
from benchmarks.subjects import NAMES, Arrays, Subject, subject
from laconic.methods.base import Context, Outcome
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.runtimes.base import Precision
from laconic.runtimes.onnxruntime import OnnxRuntime
from laconic.runtimes.openvino import OpenVino
from laconic.storage import predict, save

QUANTIZE: dict[str, dict[str, Any]] = {
    "default": {"method": "quantize.static"},
    "extremes": {"method": "quantize.static", "range": "minmax"},
}
OURS = {"minilm": ("default", "extremes")}
NNCF = {"minilm": ("transformer", "default"), "vit": ("transformer", "default")}
ORT = {"minilm": ("dynamic", "default")}  # its percentiles hold every activation in memory
ORT_ELSE = ("channels", "default", "percentile")
THREADS = 2
SPLITS = ("validation", "test")


class Job:
    """One model: what was made of it."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.quick = bench, bool(bench.args.quick)
        self.model: Subject = subject(name, bench)
        self.stages = Stages(bench, "int8")
        self.folder = self.stages.folder
        self.threads = min(THREADS, torch.get_num_threads())

    def make(self, settings: str) -> Outcome:
        """Quantise; kept."""
        context = Context(task=self.model.task, original=self.model.program,
                          progress=Said(self.bench))  # fmt: skip
        made = apply(self.model.program, QUANTIZE[settings], context)
        save(made.program, self.stages.path(self.kept(settings)))
        return made

    def kept(self, settings: str) -> str:
        """The stage of one of our settings."""
        return self.model.name + ("" if settings == "default" else f"-{settings}")

    def ours(self, settings: str) -> Program:
        """What `make` has kept."""
        return self.stages.program(self.kept(settings))

    def in_openvino(
        self, program: Program, precision: Precision, batch: int, settings: str = "default"
    ) -> peers.Runner:
        """One of our programs."""
        name = f"{self.kept(settings)}-{precision}"
        path = OpenVino().write(program, self.folder / f"{name}.xml", precision)
        return OpenVino().load(path, precision, self.threads, self.model.shapes(batch)).run

    def in_onnxruntime(self, settings: str) -> peers.Runner:
        """Ours in ONNX Runtime."""
        path = self.folder / f"{self.kept(settings)}.onnx"
        OnnxRuntime().write(self.ours(settings), path, "int8")
        return OnnxRuntime().load(path, "int8", self.threads).run

    def nncf(self, settings: str) -> Any:
        """The peer's OpenVINO model, batch dynamic."""
        original = peers.openvino_model(self.model.model, self.model.example)
        return peers.nncf_int8(original, self.model.calibration, settings=settings)

    def original_onnx(self) -> Path:
        """The original as an ONNX file."""
        path = self.folder / f"{self.model.name}-base.onnx"
        double = [torch.cat([tensor, tensor]) for tensor in self.model.example]
        return path if path.exists() else peers.onnx_file(self.model.model, double, path)

    def ort(self, settings: str) -> Path:
        """The peer's ONNX file."""
        made = self.folder / f"{self.model.name}-ort-{settings}.onnx"
        if not made.exists():
            peers.ort_int8(self.original_onnx(), made, self.model.calibration, settings=settings)
        return made

    def our_settings(self) -> tuple[str, ...]:
        """The defaults come first."""
        found = OURS.get(self.model.name, ("default",))
        return found[:1] if self.quick else found

    def nncf_settings(self) -> tuple[str, ...]:
        """Its defaults last: the documentation names a model type for transformers."""
        found = NNCF.get(self.model.name, ("default", "mixed", "best"))
        return found[:1] if self.quick else found

    def ort_settings(self) -> tuple[str, ...]:
        """What its documentation names comes first."""
        found = ORT.get(self.model.name, ORT_ELSE)
        return found[:1] if self.quick else found

    def judged(self, run: Callable[[Arrays], Arrays], name: str, batch: int = 50) -> Row:
        """Figures of a runner over both splits."""
        found: Row = {}
        for split in SPLITS:
            judged = self.model.judged(fixed(run, batch), split, batch)
            found |= {f"{name}_{split}" + ("_min" if key == "least" else ""): value
                      for key, value in judged.items()}  # fmt: skip
        self.bench.say(f"{self.model.name} {found}")
        return found


def fixed(run: Callable[[Arrays], Arrays], batch: int) -> Callable[[Arrays], Arrays]:
    """`run` for a last part that is smaller than its fixed batch."""
    return lambda inputs: [peers.batched_outputs(run, inputs, batch)]


def accuracy_row(job: Job) -> Row:
    """The original, and ours in every setting."""
    found: Row = job.judged(peers.eager(job.model.model, job.threads), "base")
    for settings in job.our_settings():
        start = time.perf_counter()
        made = job.make(settings)
        found |= {f"seconds_{settings}": time.perf_counter() - start,
                  f"notes_{settings}": list(made.notes)[:8],
                  f"bytes_{settings}": predict(freeze(made.program)).total}  # fmt: skip
        run = job.in_openvino(job.ours(settings), "int8", 50, settings)
        found |= job.judged(run, f"ours_{settings}")
        found |= job.judged(job.in_onnxruntime(settings), f"onnx_{settings}")
    return found


def peers_row(job: Job) -> Row:
    """The peers in every setting."""
    found: Row = {}
    for settings in job.nncf_settings():
        made = peers.reshaped(job.nncf(settings), 50)
        run = peers.openvino_runner(made, "f32", job.threads)
        found |= job.judged(run, f"nncf_{settings}")
    for settings in job.ort_settings():
        found |= job.judged(peers.onnxruntime(job.ort(settings), job.threads), f"ort_{settings}")
    return found


def best(accuracy: Row, way: str) -> str:
    """Which settings of a way are best on validation, by name; "default" where nothing is known."""
    ending = "_validation"
    found = {key.removeprefix(f"{way}_").removesuffix(ending): value + accuracy.get(f"{key}_min", 0)
             for key, value in accuracy.items()
             if key.startswith(f"{way}_") and key.endswith(ending)}  # fmt: skip
    return max(found, key=lambda key: found[key]) if found else "default"


def latency_row(job: Job, accuracy: Row) -> Row:
    """Milliseconds at two batch sizes, everything in turns in one run, ours in its best settings.

    Peers are in the settings that their documentation names.
    """
    settings = best(accuracy, "ours")
    runners: dict[str, peers.Runner] = {}
    inputs: dict[str, Arrays] = {}
    nncf = job.nncf(job.nncf_settings()[0])
    original = peers.openvino_model(job.model.model, job.model.example)
    onnx = job.in_onnxruntime(settings)
    ort = peers.onnxruntime(job.ort(job.ort_settings()[0]), job.threads)
    for batch in (1,) if job.quick else (1, job.model.large):
        found: dict[str, peers.Runner] = {
            "ours_int8": job.in_openvino(job.ours(settings), "int8", batch, settings),
            "ours_bf16": job.in_openvino(job.model.program, "bf16", batch),
            "ours_ort": onnx,
            "nncf": peers.openvino_runner(peers.reshaped(nncf, batch), "f32", job.threads),
            "nncf_bf16": peers.openvino_runner(peers.reshaped(nncf, batch), "bf16", job.threads),
            "ort": ort,
            "openvino_bf16": peers.openvino_runner(
                peers.reshaped(original, batch), "bf16", job.threads
            ),
            "openvino_f32": peers.openvino_runner(
                peers.reshaped(original, batch), "f32", job.threads
            ),
        }
        arrays = [array[:batch] for array in job.model.splits["validation"][0]]
        for name, runner in found.items():
            runners[f"{name}_b{batch}"], inputs[f"{name}_b{batch}"] = runner, arrays
    rounds, seconds = (2, 0.05) if job.quick else (9, 0.3)
    timed = peers.interleaved(runners, inputs, rounds=rounds, seconds=seconds)
    flat: Row = {"threads": job.threads, "busy": max(x["busy"] for x in timed.values())}
    for name, values in timed.items():
        flat |= {name: values["ms"], f"{name}_low": values["low"], f"{name}_high": values["high"]}
    return flat


def summary(name: str, accuracy: Row, latency: Row) -> Row:
    """Per model the figures the issue asks for; everyone's best setting on validation."""

    def fastest(*names: str) -> float | None:
        found = [latency[f"{name}_b1"] for name in names if f"{name}_b1" in latency]
        return min(found) if found else None

    figures: Row = {"base": accuracy.get("base_test")}
    for way in ("ours", "nncf", "ort"):
        settings = best(accuracy, way)
        figures |= {way: accuracy.get(f"{way}_{settings}_test"), f"{way}_settings": settings,
                    f"{way}_min": accuracy.get(f"{way}_{settings}_test_min")}  # fmt: skip
    figures |= {
        "latency_ms_ours": fastest("ours_int8", "ours_bf16"),
        "latency_ms_ours_int8": fastest("ours_int8"),
        "latency_ms_nncf": fastest("nncf", "nncf_bf16"),
        "latency_ms_ort": fastest("ort"),
        "latency_ms_ours_ort": fastest("ours_ort"),
    }
    return {name: {key: value for key, value in figures.items() if value not in (None, "")}}


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("int8", __doc__ or "")
    bench.parser.add_argument("--model", choices=NAMES, action="append", default=[])
    args = bench.parse(argv)
    found: Row = {}
    for name in args.model or (NAMES[:1] if args.quick else NAMES):
        rows = (name, f"{name}_peers", f"{name}_latency")
        if args.only and not set(args.only) & set(rows):
            continue
        job = Job(bench, name)
        ours: dict[str, Any] = {"ours": [QUANTIZE[settings] for settings in job.our_settings()]}
        accuracy = bench.row(name, lambda job=job: accuracy_row(job), **ours)
        accuracy |= bench.row(f"{name}_peers", lambda job=job: peers_row(job))
        latency = bench.row(
            f"{name}_latency",
            lambda job=job, accuracy=accuracy: latency_row(job, accuracy),
            **ours,
        )
        found |= summary(name, accuracy, latency)
    if not found:
        print(f"no row {args.only}; models are {NAMES}", file=sys.stderr)
        raise SystemExit(2)
    return bench.finish(**found)


if __name__ == "__main__":
    main()
