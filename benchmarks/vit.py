"""A small vision transformer for CIFAR-10, trained here, and the data that it is judged on.

A convolutional stem (Xiao et al. 2021, arXiv 2106.14881) makes 64 tokens of an image, so that a few
passes over the data are enough; layers are pre-norm (Dosovitskiy et al. 2021, arXiv 2010.11929);
the mean of the tokens is classified. It learns from labels and from the trained ResNet-20, as DeiT
does (Touvron et al. 2021, arXiv 2012.12877).
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import models
from benchmarks.data import Augmented, Batch, batches, cifar10, data_folder
from benchmarks.harness import Bench
from benchmarks.stages import Said, Stages, apply
from laconic.core.task import Task, classification
from laconic.methods.base import Context, Outcome
from laconic.program.capture import capture
from laconic.program.program import Program

BATCH = 64
CALIBRATION = 1_024
TRAIN: dict[str, Any] = {
    "method": "distill.logits", "steps": 10000, "optimizer": "adamw", "lr": 1e-3, "warmup": 0.1,
    "weight_decay": 0.05, "alpha": 0.5, "temperature": 2.0, "evaluations": 4,
}  # fmt: skip


class Attention(nn.Module):
    """Every token looks at all tokens: [batch, tokens, width] -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        seen = functional.scaled_dot_product_attention(*parts)
        return self.out(seen.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and perceptron, each added to the stream behind a norm of its own."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """[batch, 3, 32, 32] normalised pixels -> [batch, 10] logits."""

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 6, hidden: int = 384) -> None:
        super().__init__()
        sizes = (3, width // 4, width // 2, width)
        self.stem = nn.Sequential(*(
            nn.Sequential(
                nn.Conv2d(sizes[i], sizes[i + 1], 3, 1 if i == 0 else 2, 1, bias=False),
                nn.BatchNorm2d(sizes[i + 1]), nn.ReLU() if i < 2 else nn.Identity(),
            )
            for i in range(3)
        ))  # fmt: skip
        self.places = nn.Parameter(torch.zeros(64, width))
        self.layers = nn.Sequential(*(Layer(width, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.layers(tokens)).mean(1))


def untrained(seed: int, **sizes: int) -> VisionTransformer:
    """The model with fresh weights that `seed` names, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = VisionTransformer(**sizes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 0.02, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.Conv2d):
                fan = module.weight[0].numel()
                module.weight.normal_(0.0, (2.0 / fan) ** 0.5, generator=generator)
        model.places.normal_(0.0, 0.02, generator=generator)
    return model.eval()


class Cifar:
    """The transformer, its data and its task; with `--quick` smaller, and every split a slice."""

    def __init__(self, bench: Bench, stages: Stages, steps: int = TRAIN["steps"]) -> None:
        self.bench, self.stages = bench, stages
        self.quick, self.seed = bool(bench.args.quick), int(bench.args.seed)
        self.threads = int(bench.args.threads)
        self.sizes = {"width": 32, "depth": 3, "heads": 4, "hidden": 64} if self.quick else {}
        self.train = TRAIN | ({"steps": 8, "evaluations": 1} if self.quick else {"steps": steps})

    def trained(self) -> Outcome:
        """The dense network, from fresh weights."""
        weights = data_folder() / "resnet_cifar10" / "resnet20.safetensors"
        example = (torch.zeros(2, 3, 32, 32),)
        teacher = capture(models.cifar_resnet(20, weights), example)
        fresh = capture(untrained(self.seed, **self.sizes), example)
        return apply(fresh, self.train, self.context(teacher))

    @cached_property
    def program(self) -> Program:
        """The dense network."""
        return self.stages.program("vit_dense")

    def context(self, original: Program | None = None) -> Context:
        """What the methods get; the dense network is the original unless another one is given."""
        return Context(task=self.task, original=original or self.program, seed=self.seed,
                       progress=Said(self.bench), threads=self.threads)  # fmt: skip

    @cached_property
    def task(self) -> Task:
        """Augmented training images, calibration images without labels, validation rows."""
        train, count = cifar10("train"), 64 if self.quick else CALIBRATION
        calibration = Augmented(train[:count], min(count, 256), seed=1)
        return classification(
            train=Augmented(train[:512] if self.quick else train, BATCH, seed=0),
            calibration=[(pixels,) for pixels, _ in calibration],
            validation=self.batches("validation"),
        )

    @cached_property
    def _held(self) -> dict[str, list[Batch]]:
        return {}

    def batches(self, split: str) -> list[Batch]:
        """(pixels, labels) of a split, 250 at a time."""
        if split not in self._held:
            images = cifar10(split)
            self._held[split] = batches(images[:250] if self.quick else images, 250)
        return self._held[split]

    def arrays(self, batch: int) -> list[np.ndarray]:
        """Real validation images as the one input of a batch."""
        return [self.batches("validation")[0][0][:batch].numpy()]

    def score(self, model: Callable[[Tensor], Tensor], split: str) -> float:
        """Accuracy in percent on "validation", "test" or "all"."""
        with torch.inference_mode():
            right = [(model(x).argmax(1) == y).float() for x, y in self.batches(split)]
        return 100 * torch.cat(right).mean().item()
