"""Our kernel for layers of signs beside int8 and bf16 OpenVINO and fp32 eager, layer by layer.

The layers are those of a binary ResNet-18 at 224 pixels (its 3x3 convolutions but the first) and of
a binary perceptron. Everything that a layer does at run time counts: ours also packs the signs of
its float inputs and gives floats. One row per batch size; all forms of a layer take turns in one
run. Ours is checked against float convolution first.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.data import cache_folder
from benchmarks.harness import Bench, Row
from benchmarks.stages import apply
from laconic.core.task import embedding
from laconic.methods.base import Context
from laconic.program.capture import capture
from laconic.program.program import Program
from laconic.runtimes._binary import BinaryLayer, has_vectors
from laconic.runtimes.base import Precision
from laconic.runtimes.openvino import OpenVino

# name -> channels in, out, side of the image (0: a linear layer), stride
LAYERS = {
    "conv_64_56": (64, 64, 56, 1), "conv_64_128_56": (64, 128, 56, 2),
    "conv_128_28": (128, 128, 28, 1), "conv_128_256_28": (128, 256, 28, 2),
    "conv_256_14": (256, 256, 14, 1), "conv_256_512_14": (256, 512, 14, 2),
    "conv_512_7": (512, 512, 7, 1),
    "linear_1024": (1024, 1024, 0, 1), "linear_4096": (4096, 4096, 0, 1),
}  # fmt: skip
BATCHES = (1, 16)


def layer(name: str) -> nn.Module:
    """A float layer with weights of +-1."""
    inputs, outputs, side, stride = LAYERS[name]
    made: nn.Module
    if side:
        made = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    else:
        made = nn.Linear(inputs, outputs, bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1)
    return made.eval()


def sample(name: str, batch: int) -> Tensor:
    """Inputs of a layer."""
    inputs, _, side, _ = LAYERS[name]
    shape = (batch, inputs, side, side) if side else (batch, inputs)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def in_openvino(program: Program, name: str, precision: Precision, x: Tensor, threads: int) -> Any:
    """A one-layer program in OpenVINO at a fixed batch size."""
    path = cache_folder() / "binary_kernel" / f"{name}-{precision}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    OpenVino().write(program, path, precision)
    shapes = {node.name: tuple(x.shape) for node in program.placeholders}
    return OpenVino().load(path, precision, threads, shapes).run


def runners(name: str, batch: int, threads: int) -> tuple[dict[str, peers.Runner], Row]:
    """Every form of a layer; and how far ours is from float convolution."""
    model, x = layer(name), sample(name, batch)
    weight = next(model.parameters())
    stride, padding = LAYERS[name][3], int(weight.ndim == 4)
    codes = (weight.detach() > 0).to(torch.uint8)
    ours = BinaryLayer.of(codes, torch.ones(()), stride=stride, padding=padding)
    signs = torch.where(x >= 0, 1.0, -1.0)
    with torch.inference_mode():
        off = (ours(x, threads) - model(signs)).abs().max().item()
    held = x.contiguous(memory_format=torch.channels_last) if padding else x
    program = capture(model, sample(name, 2))
    context = Context(task=embedding(calibration=[((signs,), None)]), original=program)
    options = {"method": "quantize.static", "skip_above": None, "smoothing": None}
    int8 = apply(program, options, context).program
    found: dict[str, peers.Runner] = {
        "ours": lambda _: [ours(held, threads).numpy()],
        "openvino_int8": in_openvino(int8, name, "int8", x, threads),
        "openvino_bf16": in_openvino(program, name, "bf16", x, threads),
        "eager_fp32": peers.eager(model, threads),
    }
    return found, {"difference": off}


def batch_row(batch: int, threads: int, quick: bool) -> Row:
    """Milliseconds of every layer at one batch size."""
    found: Row = {"threads": threads, "vectors": has_vectors()}
    names = ["conv_256_14", "linear_1024"] if quick else list(LAYERS)
    rounds, seconds = (2, 0.02) if quick else (9, 0.15)
    for name in names:
        forms, checked = runners(name, batch, threads)
        arrays: list[np.ndarray] = [sample(name, batch).numpy()]
        timed = peers.interleaved(forms, dict.fromkeys(forms, arrays), rounds=rounds,
                                  seconds=seconds)  # fmt: skip
        found[name] = {
            **checked,
            **{form: values["ms"] for form, values in timed.items()},
            "spread": {form: [v["low"], v["high"]] for form, v in timed.items()},
            "busy": max(values["busy"] for values in timed.values()),
            "faster_than_int8": timed["openvino_int8"]["ms"] / timed["ours"]["ms"],
            "faster_than_fp32": timed["eager_fp32"]["ms"] / timed["ours"]["ms"],
        }
    return found


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("binary_kernel", __doc__ or "")
    bench.parser.add_argument("--threads", type=int, default=0, help="0: up to two")
    args = bench.parse(argv)
    threads = args.threads or min(2, torch.get_num_threads())
    rows = {
        f"batch_{batch}": bench.row(
            f"batch_{batch}", lambda batch=batch: batch_row(batch, threads, bool(args.quick)),
            threads=threads,
        )
        for batch in BATCHES
    }  # fmt: skip
    summary: Row = {}
    for row, values in rows.items():
        ratios = {k: v["faster_than_int8"] for k, v in values.items() if isinstance(v, dict)}
        if ratios:
            summary[f"{row}_faster_than_int8_least"] = min(ratios.values())
            summary[f"{row}_faster_than_int8_most"] = max(ratios.values())
    return bench.finish(**summary)


if __name__ == "__main__":
    main()
