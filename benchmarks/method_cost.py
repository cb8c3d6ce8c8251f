"""What methods that prune, simplify, share, factorise or quantise cost on large models.

Models have the shapes of ResNet-50 and BERT-base; seconds and peak memory.

One row a method and model, in a process of its own, one thread, random weights and inputs (shape is
what costs; accuracy is no question here). `seconds` are those of the processor, which other work on
the machine does not prolong. They and `peak_mb` are the method's alone, without the capture;
`beyond_mb` is what the peak is above the memory held before, `model_mb` the model's own tensors.
Methods that look at data get `SAMPLES` calibration samples, methods that train as many steps as
`options` says, of `BATCH` samples: multiply. A method that has nothing to do on a model, or refuses
it, says so in its own words (`does_not_apply`).

    python -m benchmarks.method_cost [--only prune.obs@bert_base] [--quick]
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost import Model, bert_base, resnet50, slim
from benchmarks.harness import Bench, Row, forget_peak, peak_mb, run_isolated
from laconic.core.errors import LaconicError
from laconic.core.task import Task, classification, embedding
from laconic.methods.base import Context, Outcome, method_class, method_names
from laconic.program.capture import capture
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.storage import save

FAMILIES = ("prune", "simplify", "share", "factorize", "quantize")
SAMPLES = 16
BATCH = 4
LIMIT = 1800.0  # seconds a row, by the clock
_DATA = {"samples": SAMPLES}
_STEPS: dict[str, Any] = {"steps": 4, "teacher": "torch"}
OPTIONS: dict[str, dict[str, Any]] = {
    "distill.logits": _STEPS,
    "factorize.svd": _DATA,
    "prune.channels": {**_DATA, "block": 8},
    "prune.dynamic": {**_STEPS, "steps": 6, "cuts": 2, "block": 8},
    "prune.fisher": _DATA,
    "prune.gradual": _STEPS,
    "prune.heads": _DATA,
    "prune.nm": _DATA,
    "prune.obs": _DATA,
    "prune.regularized": {**_STEPS, "importance": "l1", "block": 8},
    "prune.rewind": {**_STEPS, "steps": 2, "ratio": 0.5, "each": 0.3},
    "prune.taylor": _DATA,
    "prune.wanda": _DATA,
    "quantize.awq": {**_DATA, "tries": 5},
    "quantize.binary": {**_STEPS, **_DATA},
    "quantize.gptq": _DATA,
    "quantize.mixed": {**_DATA, "widths": (2, 4, 8)},
    "quantize.rotate": _DATA,
    "quantize.round": {**_DATA, "steps": 8, "batch": 4},
    "quantize.smooth": _DATA,
    "quantize.static": _DATA,
    "quantize.train": {**_STEPS, **_DATA, "activations": 4},
    "quantize.where": {"pieces": 2, "tries": 1},
    "share.cluster": {**_DATA, "weighted": "hessian"},
    "share.hash": {**_DATA, "weighted": "hessian"},
    "share.vector": {**_DATA, "weighted": "hessian"},
    "simplify.drop_layers": {**_DATA, "replace": "linear"},
    "simplify.linearize": {**_DATA, "count": 2, "rise": None},
    "simplify.merge_neurons": {**_DATA, "tolerance": 0.1, "refit": True},
}
"""What differs from a method's defaults."""


def small_resnet() -> Model:
    """The first two stages, a block each, on small images."""
    from benchmarks.models import resnet50_shaped

    generator = torch.Generator().manual_seed(0)
    model = resnet50_shaped(generator, (1, 1))
    return model, (torch.randn(2, 3, 32, 32, generator=generator),)


MODELS: dict[str, Callable[[], Model]] = {"resnet50": resnet50, "bert_base": bert_base}
QUICK: dict[str, Callable[[], Model]] = {"resnet50": small_resnet, "bert_base": lambda: slim(2)}


def task_for(inputs: dict[str, Tensor] | tuple[Tensor, ...]) -> Task:
    """Random inputs like the example's, `BATCH` at a time; what is learned is the original."""
    generator = torch.Generator().manual_seed(1)
    images = isinstance(inputs, tuple)

    def batch() -> dict[str, Tensor] | tuple[Tensor, ...]:
        if isinstance(inputs, tuple):
            return (torch.randn(BATCH, *inputs[0].shape[1:], generator=generator),)
        ids = inputs["input_ids"]
        drawn = torch.randint(0, int(ids.max()) + 1, (BATCH, ids.shape[1]), generator=generator)
        return {"input_ids": drawn, "attention_mask": torch.ones_like(drawn)}

    held = [batch() for _ in range(SAMPLES // BATCH)]
    data = [(x, torch.zeros(BATCH, dtype=torch.int64) if images else None) for x in held]
    return (classification if images else embedding)(train=data, calibration=data)


def relative(program: Program, folder: Path) -> dict[str, str]:
    """A file of the same model with every weight moved a little, for `share.models`."""
    generator, made = torch.Generator().manual_seed(2), program.clone()
    for name, tensor in program.tensors():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            made.set_tensor(name, tensor.detach() + 0.05 * tensor.detach().std() * noise)
    save(made, folder / "other.laconic")
    return {"other": str(folder / "other.laconic")}


def measure(method: str, model: str, quick: bool) -> Row:
    """One method on one model, in this process."""
    torch.set_num_threads(1)
    module, inputs = (QUICK if quick else MODELS)[model]()
    program = capture(module, inputs)
    del module
    context = Context(task=task_for(inputs), original=program.clone())
    options = OPTIONS.get(method, {})
    with tempfile.TemporaryDirectory() as folder:
        files = {"others": relative(program, Path(folder))} if method == "share.models" else {}
        chosen = method_class(method)(**options, **files)
        alone = forget_peak()
        before, start, clock = peak_mb(), time.process_time(), time.perf_counter()
        try:
            outcome = chosen.apply(program, Sites(), context)
        except LaconicError as error:
            outcome = Outcome(program=program, notes=[str(error)])
        seconds, peak = time.process_time() - start, peak_mb()
        wall = time.perf_counter() - clock
    found: Row = {
        "seconds": seconds,
        "wall_s": wall,
        "peak_mb": peak,
        "beyond_mb": peak - before if alone else None,
        "model_mb": _megabytes(program),
        "made_mb": _megabytes(outcome.program),
    }
    if _same(program, outcome.program):
        found["does_not_apply"] = list(outcome.notes)[-3:]
    return found


def _megabytes(program: Program) -> float:
    return sum(tensor.nbytes for _, tensor in program.tensors()) / 2**20


def _same(old: Program, new: Program) -> bool:
    """Whether a method left all operators and all values as they were."""
    first = dict(old.tensors())
    operators = [[str(node.target) for node in p.graph.nodes] for p in (old, new)]
    return operators[0] == operators[1] and all(
        name in first and torch.equal(tensor, first[name]) for name, tensor in new.tensors()
    )


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("method_cost", __doc__ or "")
    args = bench.parse(argv)
    rows: dict[str, Row] = {}
    for model in MODELS:
        for method in method_names():
            if method.split(".")[0] not in FAMILIES:
                continue  # they train, and cost what their steps cost
            name, call = f"{method}@{model}", ["--measure", method, model]
            call += ["--quick"] if args.quick else []
            rows[name] = bench.row(
                name,
                lambda call=call: run_isolated("benchmarks.method_cost", *call, timeout=LIMIT),
                samples=SAMPLES, batch=BATCH, options=OPTIONS.get(method, {}),
            )  # fmt: skip
    done = {name: row for name, row in rows.items() if row and "does_not_apply" not in row}
    keys = ("seconds", "peak_mb", "beyond_mb", "model_mb")
    return bench.finish(
        threads=1,
        methods={
            name: {key: round(row[key] or 0.0, 1) for key in keys} for name, row in done.items()
        },
        does_not_apply={
            name: row["does_not_apply"] for name, row in rows.items() if "does_not_apply" in row
        },
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], "--quick" in sys.argv)))
    else:
        main()
