"""Awkward attention: every way in which heads are folded into a matrix."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transformer(nn.Module):
    """Embedding, one block around `attention`, and a head: the frame of the models below."""

    def __init__(self, attention: nn.Module, width: int = 32, inputs: int = 6) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(inputs, width), attention
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.up, self.down, self.head = (
            nn.Linear(width, 48),
            nn.Linear(48, width),
            nn.Linear(width, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x).mean(1))


class FusedView(nn.Module):
    """One matrix for query, key and value, viewed as (3, heads, size) and taken apart by number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(n, length, width))


class FusedSplit(nn.Module):
    """One matrix for all three, split by size, attention written out, causal mask from a buffer."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)
        self.register_buffer("mask", torch.ones(16, 16).tril().bool().view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (t.view(n, length, 4, 8).transpose(1, 2) for t in self.qkv(x).split(32, dim=2))
        scores = q @ k.transpose(-2, -1) / 8**0.5
        scores = scores.masked_fill(~self.mask[:, :, :length, :length], float("-inf"))
        x = scores.softmax(-1) @ v
        return self.out(x.transpose(1, 2).contiguous().view(n, length, width))


class PerHead(nn.Module):
    """One matrix viewed as (heads, 3 x size), every head with its own three."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 4, 24).transpose(1, 2).chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))


class Batched(nn.Module):
    """Heads folded into the batch, and `baddbmm` with a slope for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (
            layer(x).view(n, length, 4, 8).transpose(1, 2).reshape(n * 4, length, 8)
            for layer in (self.q, self.k, self.v)
        )
        slopes = torch.pow(0.5, torch.arange(1, 5, device=x.device) * 2.0)
        distance = torch.arange(length, device=x.device).float()
        bias = (slopes[:, None, None] * distance).expand(4, 1, length).repeat(n, 1, 1)
        share = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=8**-0.5).softmax(-1)
        x = torch.bmm(share, v).view(n, 4, length, 8).transpose(1, 2).reshape(n, length, width)
        return self.out(x)


class Einsum(nn.Module):
    """Heads as dimensions of the weights, everything by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(32, 4, 8)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(4, 8, 32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bld,dhe->bhle", x, w) for w in (self.q, self.k, self.v))
        share = (torch.einsum("bhie,bhje->bhij", q, k) * 8**-0.5).softmax(-1)
        return torch.einsum("bhij,bhje,hed->bid", share, v, self.out)


class Rotary(nn.Module):
    """Grouped queries by expand and reshape, rotary positions that couple the halves of a head."""

    frequency: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out = nn.Linear(64, 32)
        self.register_buffer("frequency", 10.0 ** -torch.linspace(0, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, -1, 8).transpose(1, 2)
        k, v = (f(x).view(n, length, -1, 8).transpose(1, 2) for f in (self.k, self.v))
        angles = torch.arange(length, device=x.device).float()[:, None] * self.frequency
        angles = torch.cat([angles, angles], -1)
        q, k = (t * angles.cos() + _rotate(t) * angles.sin() for t in (q, k))
        k, v = (t[:, :, None].expand(n, 4, 2, length, 8).reshape(n, 8, length, 8) for t in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).reshape(n, length, -1))


def _rotate(x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([-two, one], -1)


class Interleaved(nn.Module):
    """Grouped queries by `enable_gqa`; rotary positions that couple neighbours."""

    frequency: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(64, 32)
        self.norm = nn.RMSNorm(8)
        self.register_buffer("frequency", 10.0 ** -torch.linspace(0, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.norm(self.q(x).view(n, length, 8, 8)).transpose(1, 2)
        k, v = self.kv(x).view(n, length, 2, 2, 8).permute(2, 0, 3, 1, 4)
        angles = torch.arange(length, device=x.device).float()[:, None] * self.frequency
        angles = angles.repeat_interleave(2, dim=-1)
        q, k = (t * angles.cos() + _turn(t) * angles.sin() for t in (q, k))
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(x.transpose(1, 2).reshape(n, length, 64))


def _turn(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Linear(nn.Module):
    """Attention without a softmax over pairs: keys and values are summed first; sizes differ."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 16), nn.Linear(32, 16)
        self.v, self.out = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k = (f(x).view(n, length, 4, 4).transpose(1, 2).softmax(-1) for f in (self.q, self.k))
        v = self.v(x).unflatten(-1, (4, 12)).transpose(1, 2)
        x = q @ (k.transpose(-1, -2) @ v) / length
        return self.out(x.transpose(1, 2).flatten(-2))


class Native(nn.Module):
    """`nn.MultiheadAttention` as torch ships it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Windows(nn.Module):
    """Shifted windows: roll, partition, a table of biases for each head, patch merging."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 16, 2, stride=2), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.zeros(9, 4))
        places = torch.stack(
            torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
        ).flatten(1)
        apart = places[:, :, None] - places[:, None] + 1
        self.register_buffer("index", apart[0] * 3 + apart[1])
        self.merge_norm, self.merge = nn.LayerNorm(64), nn.Linear(64, 24, bias=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).view(-1, 4, 3, 4, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(4, 4, 4).permute(2, 0, 1)
        y = ((q * 4**-0.5) @ k.transpose(-2, -1) + bias[None]).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(-1, 4, c)).view(n, h // 2, w // 2, 2, 2, c)
        x = x + torch.roll(y.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c), (1, 1), (1, 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.merge(self.merge_norm(torch.cat(corners, -1)))
        return self.head(x.flatten(1, 2).mean(1))


class TiedLanguageModel(nn.Module):
    """Embeddings tied to the output, learned positions, two `nn.TransformerEncoderLayer`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(40, 32), nn.Embedding(16, 32)
        layers = [nn.TransformerEncoderLayer(32, 4, 48, batch_first=True) for _ in range(2)]
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(32, 40, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Queries(nn.Module):
    """Learned queries expanded over the batch, cross attention, class token, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(6, 32), nn.Parameter(torch.zeros(1, 1, 32))
        self.place, self.queries = (
            nn.Parameter(torch.zeros(1, 10, 32)),
            nn.Parameter(torch.zeros(3, 24)),
        )
        self.q, self.kv, self.out = nn.Linear(24, 32), nn.Linear(32, 64), nn.Linear(32, 24)
        self.scale, self.head = nn.Parameter(torch.ones(24)), nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = torch.cat([self.token.expand(n, -1, -1), self.embed(x)], 1) + self.place
        asked = self.queries.unsqueeze(0).expand(n, 3, 24)
        q = self.q(asked).view(n, 3, 4, 8).transpose(1, 2)
        k, v = (t.reshape(n, 10, 4, 8).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, 3, 32)
        return self.head((asked + self.scale * self.out(y)).flatten(1))


def _framed(
    attention: Callable[[], nn.Module],
) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    return lambda: (Transformer(attention()), (torch.randn(2, 9, 6),))


ZOO: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "fused_view": _framed(FusedView),
    "fused_split": _framed(FusedSplit),
    "per_head": _framed(PerHead),
    "batched_heads": _framed(Batched),
    "einsum_attention": _framed(Einsum),
    "rotary": _framed(Rotary),
    "interleaved_rotary": _framed(Interleaved),
    "linear_attention": _framed(Linear),
    "native_attention": _framed(Native),
    "windows": lambda: (Windows(), (torch.randn(2, 3, 16, 16),)),
    "tied_language_model": lambda: (TiedLanguageModel(), (torch.randint(0, 40, (2, 9)),)),
    "learned_queries": lambda: (Queries(), (torch.randn(2, 9, 6),)),
}
