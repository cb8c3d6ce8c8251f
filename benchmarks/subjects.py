"""Six trained models with their calibration data and their judge, for benchmarks over models.

CIFAR-10: `resnet20`, `resnet56`, `resnet8` (MLPerf Tiny, raw pixels) and `vit` (the one that
`benchmarks.transformer_pruning` has trained); `squeezenet` on 1,000 ImageNet photographs (each
fifth calibrates, the others are validation and test in turn); `minilm`, judged by the cosine to
its own float embeddings of SST-2 sentences at 128 tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import models, vit
from benchmarks.data import cifar10, data_folder, photographs, sst2, tokenised
from benchmarks.harness import Bench, Row
from benchmarks.stages import Stages
from laconic.core.task import Task, embedding
from laconic.program.capture import capture
from laconic.program.program import Program
from laconic.runtimes.base import fixed_shapes

NAMES = ("resnet20", "resnet56", "resnet8", "squeezenet", "vit", "minilm")
SAMPLES, TOKENS = 300, 128
Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Subject:
    """A trained model and what belongs to it.

    Attributes:
        model: in eval mode.
        example: its inputs, one sample each.
        calibration: inputs without labels, one sample each.
        splits: split → (inputs, all samples stacked; what the judge compares with).
        large: the second batch size.
        sentences: judged by cosines, not by classes; its length may change.
    """

    name: str
    model: nn.Module
    example: tuple[Tensor, ...]
    calibration: list[Arrays]
    splits: dict[str, tuple[Arrays, Tensor]]
    large: int = 32
    sentences: bool = False

    @cached_property
    def program(self) -> Program:
        """The model, captured."""
        double = tuple(torch.cat([tensor, tensor]) for tensor in self.example)
        return capture(self.model, double, dynamic="batch")

    @cached_property
    def task(self) -> Task:
        """The calibration samples, fifty at a time; no targets."""
        parts = [self.calibration[i : i + 50] for i in range(0, len(self.calibration), 50)]
        stacked = [
            tuple(torch.from_numpy(np.concatenate(x)) for x in zip(*part, strict=True))
            for part in parts
        ]
        return embedding(calibration=[(inputs, None) for inputs in stacked])

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Input shapes at a batch size, for a runtime."""
        return {name: tuple(shape) for name, shape in fixed_shapes(self.program, batch).items()}

    def judged(self, run: Callable[[Arrays], Arrays], split: str, batch: int = 50) -> Row:
        """`value`: accuracy in percent or mean cosine; `least`: the smallest cosine."""
        inputs, wanted = self.splits[split]
        found = torch.cat([
            torch.from_numpy(run([array[i : i + batch] for array in inputs])[0])
            for i in range(0, len(inputs[0]), batch)
        ])  # fmt: skip
        if not self.sentences:
            return {"value": 100 * (found.argmax(1) == wanted).float().mean().item()}
        cosines = torch.cosine_similarity(found, wanted, dim=-1)
        return {"value": cosines.mean().item(), "least": cosines.min().item()}


def subject(name: str, bench: Bench) -> Subject:
    """One of `NAMES`; with `--quick` few samples.

    Raises:
        SystemExit: the vision transformer has not been trained.
    """
    quick = bool(bench.args.quick)
    if name == "minilm":
        return _minilm(quick)
    if name == "squeezenet":
        return _squeezenet(quick)
    return _cifar(name, bench, quick)


def _cifar(name: str, bench: Bench, quick: bool) -> Subject:
    folder, raw = data_folder(), name == "resnet8"
    if raw:
        model: nn.Module = models.resnet8(folder / "resnet8_mlperf_tiny" / "resnet8.safetensors")
    elif name == "vit":
        model = _vit(bench)
    else:
        weights = folder / "resnet_cifar10" / f"{name}.safetensors"
        model = models.cifar_resnet(int(name.removeprefix("resnet")), weights)
    samples = cifar10("train")[: 20 if quick else SAMPLES].tensor(normalise=not raw)
    splits: dict[str, tuple[Arrays, Tensor]] = {}
    for split in ("validation", "test"):
        images = cifar10(split)[: 200 if quick else 5_000]
        splits[split] = ([images.tensor(normalise=not raw).numpy()], images.labels)
    return Subject(name, model, (torch.zeros(1, 3, 32, 32),), _one_by_one([samples]), splits)


def _vit(bench: Bench) -> nn.Module:
    if bench.args.quick:
        return vit.untrained(0, width=32, depth=2, heads=4, hidden=64)
    stages = Stages(bench, "transformer_pruning")
    made = vit.untrained(0)
    made.load_state_dict({k: v for k, v in stages.program("vit_dense").state_dict().items()},
                         strict=False)  # fmt: skip
    return made.eval()


def _squeezenet(quick: bool) -> Subject:
    stored = data_folder() / "squeezenet_deep_compression" / "squeezenet_v1_0_decoded.safetensors"
    pixels, labels = photographs()
    rows = torch.arange(len(labels))
    parts = {"calibration": rows[::5], "validation": rows[rows % 5 % 2 == 1],
             "test": rows[(rows % 5 > 0) & (rows % 5 % 2 == 0)]}  # fmt: skip
    parts = {part: chosen[: 8 if quick else None] for part, chosen in parts.items()}
    splits = {
        split: ([pixels[parts[split]].numpy()], labels[parts[split]])
        for split in ("validation", "test")
    }
    calibration = _one_by_one([pixels[parts["calibration"]]])
    example = (torch.zeros(1, 3, 227, 227),)
    return Subject("squeezenet", models.squeezenet(stored), example, calibration, splits, large=8)


def _minilm(quick: bool) -> Subject:
    model, tokenizer = models.minilm(), models.minilm_tokenizer()

    def texts(split: str, count: int) -> list[Tensor]:
        sentences = [text for text, _ in sst2(split)][: 16 if quick else count]
        batch = tokenised(sentences, tokenizer, len(sentences), TOKENS)[0]
        return [batch["input_ids"], batch["attention_mask"]]

    splits: dict[str, tuple[Arrays, Tensor]] = {}
    for name, split, count in (("validation", "dev", 600), ("test", "test", 872)):
        inputs = texts(split, count)
        with torch.inference_mode():
            parts = zip(*(tensor.split(50) for tensor in inputs), strict=True)
            wanted = torch.cat([model(*part) for part in parts])
        splits[name] = ([tensor.numpy() for tensor in inputs], wanted)
    calibration = texts("train", SAMPLES)
    example = tuple(tensor[:1] for tensor in calibration)
    return Subject("minilm", model, example, _one_by_one(calibration), splits, sentences=True)


def _one_by_one(inputs: Sequence[Tensor]) -> list[Arrays]:
    count: Any = len(inputs[0])
    return [[tensor[i : i + 1].numpy() for tensor in inputs] for i in range(count)]
