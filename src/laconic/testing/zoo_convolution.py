"""Awkward convolutional models."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def _image(channels: int = 3, size: int = 8) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, size, size),)


def _block(into: int, out: int, kernel: int = 3, **options: int) -> nn.Sequential:
    padding = kernel // 2
    convolution = nn.Conv2d(into, out, kernel, padding=padding, bias=False, **options)  # type: ignore[arg-type]
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


class PlainCNN(nn.Module):
    """Flattens with a size that is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_block(3, 12), nn.MaxPool2d(2), _block(12, 16), nn.MaxPool2d(2))
        self.first, self.head = nn.Linear(16 * 2 * 2, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).view(-1, 16 * 2 * 2)
        return self.head(torch.relu(self.first(x)))


class Residual(nn.Module):
    """A residual block; the shortcut is a convolution where sizes differ."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.one, self.two = _block(into, out, stride=stride), _block(out, out)[:2]
        same = into == out and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(into, out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.two(self.one(x)) + self.short(x))


class ResNet(nn.Module):
    """Residuals with a projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 12)
        self.blocks = nn.Sequential(Residual(12, 12), Residual(12, 20, 2), Residual(20, 20))
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class PaddedShortcut(nn.Module):
    """Shortcuts that subsample and pad channels with zeros (option A of the CIFAR ResNets)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 8)
        self.blocks = nn.ModuleList(
            _block(i, o, stride=o // i) for i, o in [(8, 8), (8, 16), (16, 32)]
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            if y.shape != x.shape:
                extra = (y.shape[1] - x.shape[1]) // 2
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
            x = x + y
        return self.head(x.mean((2, 3)))


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(_block(8 + 6 * i, 6) for i in range(3))
        self.norm, self.head = nn.BatchNorm2d(26), nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


class MobileNet(nn.Module):
    """Inverted residual: depthwise with a multiplier, squeeze and excite, hardswish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 8)
        self.expand, self.depth = _block(8, 24, 1), _block(24, 48, groups=24)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(48, 10, 1), nn.ReLU(),
                                     nn.Conv2d(10, 48, 1), nn.Hardsigmoid())  # fmt: skip
        self.project = nn.Sequential(nn.Conv2d(48, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.hardswish(self.depth(self.expand(x)))
        x = x + self.project(y * self.squeeze(y))
        return self.head(x.flatten(2).mean(-1))


class Grouped(nn.Module):
    """Grouped convolutions of several group counts, group norm, and PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.one = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.slope = nn.PReLU(24)
        self.two = nn.Conv2d(24, 16, 3, padding=1, groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = torch.sigmoid(self.two(self.slope(self.one(x)))) + x
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Down, up by transposed convolutions (one grouped), skips by concatenation, resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = _block(3, 8), _block(8, 16, stride=2)
        self.bottom = _block(16, 24, stride=2)
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.join = _block(32, 12)
        self.last = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=4)
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        middle = self.deep(high)
        x = self.join(torch.cat([self.up(self.bottom(middle)), middle], 1))
        x = self.head(torch.cat([self.last(x), high], 1))
        return F.interpolate(x, scale_factor=2.0, mode="bilinear")


class OneChannel(nn.Module):
    """A grey image, and a bottleneck of one channel that cannot shrink."""

    def __init__(self) -> None:
        super().__init__()
        narrow = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.ReLU())
        wide = (nn.Conv2d(1, 12, 3), nn.InstanceNorm2d(12, affine=True))
        self.body = nn.Sequential(*narrow, *wide)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)).amax((2, 3)))


class Shuffle(nn.Module):
    """Channel shuffle written as view, transpose, view, between grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 16)
        self.one, self.two = _block(16, 32, 1, groups=4), _block(32, 16, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.one(x)
        n, c, h, w = y.shape
        y = y.view(n, 4, c // 4, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head((x + self.two(y)).mean((2, 3)))


class ShuffleV2(nn.Module):
    """Half of the channels pass, the other half is worked on; then both are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 16)
        self.branches = nn.ModuleList(
            nn.Sequential(_block(8, 8, 1), _block(8, 8, groups=8), _block(8, 8, 1))
            for _ in range(2)
        )
        self.last, self.head = _block(16, 24, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            one, two = x.chunk(2, 1)
            x = torch.cat([one, branch(two)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.last(x).mean((2, 3)))


class CrossStage(nn.Module):
    """Split, a chain of bottlenecks that all go into one concatenation (as detectors have it)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = _block(3, 16, 1)
        self.chain = nn.ModuleList(nn.Sequential(_block(8, 10), _block(10, 8)) for _ in range(2))
        self.leave, self.head = _block(32, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).split((8, 8), 1))
        for step in self.chain:
            parts.append(parts[-1] + step(parts[-1]))
        return self.head(self.leave(torch.cat(parts, 1)).mean((2, 3)))


class Pixels(nn.Module):
    """Pixel unshuffle at the entrance, pixel shuffle at the exit."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.middle = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(24, 20, 3, padding=1)
        self.up, self.head = nn.Conv2d(20, 32, 1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(F.pixel_unshuffle(self.enter(x), 2)))
        return self.head(F.pixel_shuffle(self.up(x), 2))


class Sound(nn.Module):
    """One-dimensional convolutions, weight norm (grouped too), strided, with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 16, 5, stride=2)
        self.norm = nn.GroupNorm(16, 16)
        self.position = weight_norm(nn.Conv1d(16, 16, 4, padding=2, groups=4), name="weight", dim=2)
        self.last = weight_norm(nn.Conv1d(16, 12, 3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.stem(x)))
        x = x + F.gelu(self.position(x)[:, :, :-1])
        return self.head(self.last(x).transpose(1, 2).mean(1))


class Volume(nn.Module):
    """Three-dimensional convolutions and pooling, softmax and a sum over channels as attention."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 12, 3)
        self.gate, self.head = nn.Conv3d(12, 6, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.two(F.max_pool3d(F.elu(self.one(x)), 2)), 0.1)
        share = self.gate(x).softmax(1).square().sum(1, keepdim=True)
        return self.head((x * share).mean((2, 3, 4)))


class ConvNeXt(nn.Module):
    """Depthwise, channels-last layer norm, layer scale, a channels-first norm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = (
            nn.Conv2d(3, 12, 2, stride=2),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
        )
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 32), nn.Linear(32, 12)
        self.scale = nn.Parameter(torch.ones(12))
        self.weight = nn.Parameter(torch.ones(12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        centred = x - x.mean(1, keepdim=True)
        x = (
            self.weight[:, None, None]
            * centred
            / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        )
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean([-2, -1]))


ZOO: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "plain_cnn": lambda: (PlainCNN(), _image()),
    "resnet": lambda: (ResNet(), _image()),
    "padded_shortcut": lambda: (PaddedShortcut(), _image()),
    "densenet": lambda: (DenseNet(), _image()),
    "mobilenet": lambda: (MobileNet(), _image()),
    "grouped": lambda: (Grouped(), _image()),
    "unet": lambda: (UNet(), _image()),
    "one_channel": lambda: (OneChannel(), _image(1)),
    "channel_shuffle": lambda: (Shuffle(), _image()),
    "shuffle_v2": lambda: (ShuffleV2(), _image()),
    "cross_stage": lambda: (CrossStage(), _image()),
    "pixel_shuffle": lambda: (Pixels(), _image()),
    "sound": lambda: (Sound(), (torch.randn(2, 1, 40),)),
    "volume": lambda: (Volume(), (torch.randn(2, 1, 6, 6, 6),)),
    "convnext": lambda: (ConvNeXt(), _image()),
}
