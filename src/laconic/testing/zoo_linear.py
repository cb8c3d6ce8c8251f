"""Awkward fully connected models."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _rows(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(*shape),)


class NoBias(nn.Module):
    """A plain perceptron without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, 24, bias=False), nn.ReLU(), nn.Linear(24, 16, bias=False), nn.Tanh()
        )
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class Shared(nn.Module):
    """One module called three times: its rows and columns are one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.step, self.head = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for _ in range(3):
            x = torch.relu(self.step(x)) + x
        return self.head(x)


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 20)
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.encoder(x)), self.encoder.weight.t(), self.bias)


class Gated(nn.Module):
    """GLU, a chunk with SiLU, and a fused gate and value of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 32), nn.Linear(16, 40)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.first(x), dim=-1)
        gate, value = self.second(x).chunk(2, dim=-1)
        return self.head(F.silu(gate) * value)


class Mixer(nn.Module):
    """Perceptrons over tokens and over channels, with transposes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 9))
        self.channels = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(x.mean(1))


class Maxout(nn.Module):
    """The largest of four features: a reduction over a factor of an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(10, 48), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).view(-1, 12, 4).amax(-1))


class Experts(nn.Module):
    """A soft mixture of experts: stacked matrices, einsum, a router with softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router = nn.Linear(10, 16), nn.Linear(16, 6)
        self.up = nn.Parameter(torch.randn(6, 16, 20))
        self.down = nn.Parameter(torch.randn(6, 20, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        share = self.router(x).softmax(-1)
        hidden = torch.relu(torch.einsum("bd,edh->beh", x, self.up))
        mixed = torch.einsum("beh,ehd,be->bd", hidden, self.down, share)
        return self.head(x + mixed)


class Statistics(nn.Module):
    """Norms written out: mean, variance, RMS, cosine, all over an axis that can shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 24), nn.Linear(24, 24)
        self.scale = nn.Parameter(torch.ones(24))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = self.second(x) * self.scale
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = F.normalize(x, dim=-1) * x.std(-1, keepdim=True)
        return self.head(x.softmax(-1) * x.amax(-1, keepdim=True))


class TwoOutputs(nn.Module):
    """A dictionary of outputs, one of them a feature: its axis has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16))
        self.head = nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.body(x)
        return {"feature": feature, "logits": self.head(feature)}


ZOO: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "no_bias": lambda: (NoBias(), _rows(2, 10)),
    "shared_module": lambda: (Shared(), _rows(2, 10)),
    "tied_autoencoder": lambda: (TiedAutoencoder(), _rows(2, 12)),
    "gated": lambda: (Gated(), _rows(2, 10)),
    "mixer": lambda: (Mixer(), _rows(2, 9, 6)),
    "maxout": lambda: (Maxout(), _rows(2, 10)),
    "experts": lambda: (Experts(), _rows(2, 10)),
    "statistics": lambda: (Statistics(), _rows(2, 10)),
    "two_outputs": lambda: (TwoOutputs(), _rows(2, 10)),
}
