"""Networks that carry more than they need: brought back exactly to what they are, and further.

Rows: `planted` (the inner layers of the CIFAR-10 ResNet-20 get duplicates up to a positive factor
and dead channels, shuffled in; `simplify.merge_neurons` has to find its true widths and the same
function), `repvgg` (3x3 + 1x1 + identity branches with batch norms become one convolution each),
`linear_N` (N activations of ResNet-20 become straight lines, the layers that meet one, then
recovery), `test` (accuracies on all 10,000 images) and `latency` (OpenVINO, batch 1 and 32, all of
them interleaved with what they came from).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import models, peers
from benchmarks.data import data_folder
from benchmarks.harness import Bench, Row
from benchmarks.resnet56_main import Job
from benchmarks.stages import Stages, apply
from laconic.methods.base import Context, Outcome
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.program import Program
from laconic.runtimes.base import Precision, fixed_shapes
from laconic.runtimes.openvino import OpenVino

WIDER, DEAD = 0.75, 0.25  # of a layer's channels: duplicates, dead ones
COUNTS = (3, 6)  # activations of the nine inner ones that become lines
RECOVER: dict[str, Any] = {"method": "distill.logits", "steps": 800}
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)


class Merging(Job):
    """The job of `resnet56_main` on ResNet-20, with files of its own."""

    def __init__(self, bench: Bench) -> None:
        bench.args.depth = 20
        bench.args.weights = data_folder() / "resnet_cifar10" / "resnet20.safetensors"
        super().__init__(bench.args, bench)
        bench.variant = ""
        self.stages = Stages(bench, "merging")


def widened(model: models.CifarResNet, generator: torch.Generator) -> models.CifarResNet:
    """The same function with wider inner layers: duplicates and dead channels, shuffled."""
    for block in (module for module in model.modules() if isinstance(module, models.CifarBlock)):
        width = block.conv1.out_channels
        twins = torch.randperm(width, generator=generator)[: int(WIDER * width)]
        factors = 0.5 + torch.rand(len(twins), generator=generator)
        dead = int(DEAD * width)
        rows = torch.cat([torch.arange(width), twins])
        scale = torch.cat([torch.ones(width), factors])
        share = torch.ones(width)
        share[twins] = 0.5
        outgoing = block.conv2.weight.data * share[None, :, None, None]
        second = outgoing[:, twins] / factors[None, :, None, None]
        extra = torch.randn(len(outgoing), dead, 3, 3, generator=generator)
        first = block.conv1.weight.data
        unread = torch.randn(dead, *first.shape[1:], generator=generator)
        order = torch.randperm(len(rows) + dead, generator=generator)
        norm = block.bn1
        made = nn.BatchNorm2d(len(order))
        for name, fill in (("weight", 0.0), ("bias", -1.0), ("running_mean", 0.1),
                           ("running_var", 2.0)):  # fmt: skip
            values = getattr(norm, name).data[rows]
            values = values * scale if name in ("weight", "bias") else values
            getattr(made, name).data = torch.cat([values, torch.full((dead,), fill)])[order]
        block.bn1 = made
        block.conv1.weight.data = torch.cat([first[rows], unread])[order]
        block.conv2.weight.data = torch.cat([outgoing, second, extra], dim=1)[:, order]
        block.conv1.out_channels = block.conv2.in_channels = len(order)
    return model.eval()


class RepBlock(nn.Module):
    """RepVGG (Ding et al. 2021): 3x3, 1x1 and identity, each with batch norm, summed, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.point = nn.Conv2d(width, width, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.norms
        return functional.relu(first(self.wide(x)) + second(self.point(x)) + third(x))


def repvgg(width: int = 64, blocks: int = 8) -> nn.Module:
    """Ten-class network of such blocks; its batch statistics are those of random images."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
    model = nn.Sequential(
        stem, *(RepBlock(width) for _ in range(blocks)), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 10),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 3, 32, 32))
    return model.eval()


def layers(program: Program) -> int:
    """Convolutions and linear layers in a graph."""
    return sum(node.target in _CONVOLUTIONS for node in program.graph.nodes)


def compared(before: Program, after: Program, inputs: Tensor) -> Row:
    """Layers, multiply-adds and the largest difference of the outputs, relative to their size."""
    with torch.inference_mode():
        wanted, got = before(inputs), after(inputs)
    return {
        "layers": layers(before), "layers_after": layers(after),
        "macs": cost(before).macs, "macs_after": cost(after).macs,
        "difference": ((got - wanted).abs().max() / wanted.abs().max()).item(),
    }  # fmt: skip


def widths(program: Program) -> list[int]:
    """Output channels of every inner convolution."""
    names = [name for name, _ in program.tensors() if name.endswith("conv1.weight")]
    return [int(program.tensor(name).shape[0]) for name in names if "layer" in name]


def planted_row(job: Merging) -> Row:
    """Widths before, planted and after; the function must be the same."""
    images = job.split("validation")[:200].tensor()
    model = models.cifar_resnet(20, job.weights)
    wide = capture(widened(model, torch.Generator().manual_seed(0)), (images[:2],))
    save = job.stages.row(
        "planted_merged", lambda: apply(wide, {"method": "simplify.merge_neurons"}, job.context()),
        lambda program: {"widths": widths(program), **compared(wide, program, images)},
    )  # fmt: skip
    true = widths(job.program)
    return {
        "widths_true": true, "widths_planted": widths(wide), **save,
        "true_width": save.get("widths") == true,
        "difference_to_original": compared(job.program, wide, images)["difference"],
    }  # fmt: skip


def fused(program: Program, context: Context) -> Outcome:
    """Branches merged."""
    return apply(program, {"method": "simplify.merge_linear"}, context)


def linear_rows(job: Merging) -> dict[str, Row]:
    """ResNet-20 with some activations gone, its layers merged, recovered."""
    rows: dict[str, Row] = {}
    images = job.split("validation")[:200].tensor()
    recover = RECOVER | ({"steps": 3} if job.quick else {})
    for count in COUNTS[:1] if job.quick else COUNTS:
        step = {"method": "simplify.linearize", "rise": None, "count": count, "merge": "always"}

        def made(step: dict[str, Any] = step) -> Outcome:
            context = job.context()
            return apply(apply(job.program, step, context).program, recover, context)

        def measured(program: Program) -> Row:
            return {"val": job.score(program, "validation"),
                    **compared(job.program, program, images)}  # fmt: skip

        rows[f"linear_{count}"] = job.stages.row(
            f"linear_{count}", made, measured, steps=[step, recover]
        )
    return rows


def test_row(job: Merging) -> Row:
    """Accuracy over the test rows and all 10,000: the original and each linearised network."""
    found: Row = {}
    programs = {"base": job.program}
    for count in COUNTS:
        if job.stages.path(f"linear_{count}").exists():
            programs[f"linear_{count}"] = job.stages.program(f"linear_{count}")
    for name, program in programs.items():
        for split in ("test", "all"):
            found[f"{name}_{split}"] = job.score(program, split)
    return found


def runner(job: Merging, program: Program, name: str, batch: int) -> peers.Runner:
    """A Program in OpenVINO, bf16."""
    precision: Precision = "bf16"
    runtime = OpenVino()
    path = runtime.write(program, job.stages.folder / f"{name}.xml", precision)
    return runtime.load(path, precision, job.threads, fixed_shapes(program, batch)).run


def latency_row(job: Merging, branched: Program) -> Row:
    """Milliseconds in OpenVINO (bf16), batch 1 and 32, before and after, interleaved."""
    programs = {"resnet20": job.program, "repvgg": branched}
    for name in ("repvgg_merged", *(f"linear_{count}" for count in COUNTS)):
        if job.stages.path(name).exists():
            programs[name] = job.stages.program(name)
    runners: dict[str, peers.Runner] = {}
    inputs: dict[str, list[np.ndarray]] = {}
    for batch in (1,) if job.quick else (1, 32):
        for name, program in programs.items():
            runners[f"{name}_b{batch}"] = runner(job, program, name, batch)
            inputs[f"{name}_b{batch}"] = job.arrays(batch)
    rounds, seconds = (2, 0.05) if job.quick else (11, 0.2)
    timed = peers.interleaved(runners, inputs, rounds=rounds, seconds=seconds)
    return {"threads": job.threads, **{name: values["ms"] for name, values in timed.items()}}


def main(argv: list[str] | None = None) -> Row:
    """Run the rows and print the JSON line."""
    bench = Bench("merging", __doc__ or "")
    bench.parser.add_argument("--seed", type=int, default=0)
    bench.parse(argv)
    job = Merging(bench)
    branched = capture(repvgg(), (torch.zeros(2, 3, 32, 32),))
    images = job.split("validation")[:64].tensor()
    rows: dict[str, Row] = {
        "planted": bench.row("planted", lambda: planted_row(job)),
        "repvgg": job.stages.row(
            "repvgg_merged", lambda: fused(branched, job.context()),
            lambda program: compared(branched, program, images),
        ),
        **linear_rows(job),
    }  # fmt: skip
    rows["test"] = bench.row("test", lambda: test_row(job))
    rows["latency"] = bench.row("latency", lambda: latency_row(job, branched))
    found: Row = {
        "true_width": rows["planted"].get("true_width"),
        "planted_difference": rows["planted"].get("difference"),
        "repvgg_layers": rows["repvgg"].get("layers_after"),
        "repvgg_difference": rows["repvgg"].get("difference"),
    }
    for count in COUNTS:
        found[f"linear_{count}_layers"] = rows.get(f"linear_{count}", {}).get("layers_after")
        found[f"linear_{count}_acc"] = rows["test"].get(f"linear_{count}_all")
        for batch in (1, 32):
            base = rows["latency"].get(f"resnet20_b{batch}")
            ours = rows["latency"].get(f"linear_{count}_b{batch}")
            found[f"linear_{count}_speedup_b{batch}"] = base / ours if base and ours else None
    return bench.finish(base_acc=rows["test"].get("base_all"), **found)


if __name__ == "__main__":
    main()
