"""Integers where they pay: rows of `benchmarks.mixed_precision`, accuracy against milliseconds.

Per model `<model>_where`: the network in floats (bf16 where the CPU has it), in integers
everywhere (`quantize.static`), and what `quantize.where` keeps of them, for no time given away and
for a tenth of it, at batch 1 and at the large batch, all in turns in one run; accuracy (or cosine)
on validation and test in the same runtime; and the front that the method has measured. Needs a
machine that does nothing else.
"""

from typing import Any

import numpy as np
import torch

from benchmarks import peers
from benchmarks.harness import Bench, Row
from benchmarks.int8 import fixed
from benchmarks.stages import Said, Stages, apply
from benchmarks.subjects import Subject, subject
from laconic.methods.base import Context
from laconic.program.program import Program
from laconic.reports.front import Front, Point
from laconic.runtimes.base import PRECISIONS, Precision
from laconic.runtimes.openvino import OpenVino

MODELS = ("vit", "minilm", "resnet20")
THREADS = 2
SLOWER = (0.0, 0.1)


def rows(bench: Bench) -> dict[str, Row]:
    """One row a model."""
    found: dict[str, Row] = {}
    for name in MODELS[:1] if bench.args.quick else MODELS:
        row = f"{name}_where"
        if bench.wanted(row):
            found[row] = bench.row(row, lambda name=name: _row(bench, name), threads=THREADS)
    return found


def page(name: str, row: Row) -> Front:
    """The chart of one row: accuracy against milliseconds at batch 1."""
    series: dict[str, list[Point]] = {"one precision for all": [], "integers where they pay": []}
    for label in (key.removesuffix("_ms_b1") for key in row if key.endswith("_ms_b1")):
        kind = "integers where they pay" if label.startswith("where") else "one precision for all"
        series[kind].append(Point(row[f"{label}_ms_b1"], row[f"{label}_validation"], label))
    return Front(
        f"Where integers pay: {name}",
        f"{row['int8_ms_b1']:.3g} ms in integers everywhere, {row['float_ms_b1']:.3g} in floats.",
        "batch 1, ms", "on validation: accuracy in %, or mean cosine",
        {kind: points for kind, points in series.items() if points},
        [f"OpenVINO, {THREADS} threads at most, all in turns in one run; floats are bf16 where the "
         "CPU has it."],
    )  # fmt: skip


def _row(bench: Bench, name: str) -> Row:
    model, threads = subject(name, bench), min(THREADS, torch.get_num_threads())
    context = Context(task=model.task, original=model.program, progress=Said(bench),
                      threads=threads)  # fmt: skip
    few = {"pieces": 1, "tries": 1, "samples": 8} if bench.args.quick else {}
    whole = apply(model.program, {"method": "quantize.static"}, context).program
    made: dict[str, Program] = {"float": model.program, "int8": whole}
    row: Row = {}
    for slower in SLOWER[:1] if bench.args.quick else SLOWER:
        step: dict[str, Any] = {"method": "quantize.where", "slower": slower, **few}
        outcome = apply(whole, step, context)
        label = f"where_{slower:g}"
        made[label] = outcome.program
        row |= {f"{label}_front": outcome.figures["front"], f"{label}_notes": list(outcome.notes)}
    runners: dict[str, peers.Runner] = {}
    inputs: dict[str, list[np.ndarray]] = {}
    folder = Stages(bench, "integers_where").folder
    for label, program in made.items():
        precision = _best(program)
        path = OpenVino().write(program, folder / f"{name}-{label}.xml", precision)
        for batch in (1,) if bench.args.quick else (1, model.large):
            run = OpenVino().load(path, precision, threads, model.shapes(batch)).run
            runners[f"{label}_ms_b{batch}"] = run
            inputs[f"{label}_ms_b{batch}"] = [a[:batch] for a in model.splits["validation"][0]]
        row |= _judged(model, run, label, batch)
    rounds, seconds = (2, 0.05) if bench.args.quick else (9, 0.5)
    timed = peers.interleaved(runners, inputs, rounds=rounds, seconds=seconds)
    return row | {label: values["ms"] for label, values in timed.items()}


def _best(program: Program) -> Precision:
    """Integers where it has any, else the fastest floats."""
    fits: list[Precision] = [kind for kind in PRECISIONS if not OpenVino().check(program, kind)]
    return fits[-1]


def _judged(model: Subject, run: peers.Runner, label: str, batch: int) -> Row:
    return {
        f"{label}_{split}{'' if key == 'value' else '_min'}": value
        for split in ("validation", "test")
        for key, value in model.judged(fixed(run, batch), split, batch).items()
    }
