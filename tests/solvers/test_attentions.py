"""One finder for attentions: as one operator, and written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.program.capture import capture
from laconic.solvers.layers.attentions import attentions


class Attention(nn.Module):
    """Two heads; `written`: fused, scaled (its products) or turned (its queries)."""

    def __init__(self, written):
        super().__init__()
        self.written, self.qkv = written, nn.Linear(8, 24)

    def forward(self, x, mask):
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        hidden = (1.0 - mask[:, None, None, :]) * -1e9
        if self.written == "fused":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=0.3)
        products = q @ k.transpose(-2, -1) if self.written == "scaled" else (q * 0.3) @ k.mT
        products = products * 0.6 / 2.0 if self.written == "scaled" else products
        shares = (products + hidden).softmax(-1, dtype=torch.float64).to(x.dtype)
        return F.dropout(shares, 0.1, self.training) @ v


@pytest.mark.parametrize("written", ["fused", "scaled", "turned"])
def test_all_is_found(written):
    held = capture(Attention(written).eval(), (torch.randn(2, 5, 8), torch.ones(2, 5)))
    held.propagate()
    (found,) = attentions(held)
    assert found.sizes == (5, 5)
    assert found.scale == pytest.approx(1.0 if written == "turned" else 0.3)
    parts = (found.query, found.key, found.value, found.output)
    assert [node.meta["shape"] for node in parts] == [(2, 2, 5, 4)] * 4
    (mask,) = found.masks
    assert mask.value.meta["shape"] == (2, 1, 1, 5)


@pytest.mark.parametrize("written", ["fused", "scaled"])
def test_a_mask_that_is_taken_hides_nothing(written):
    torch.manual_seed(0)
    model, x = Attention(written).eval(), torch.randn(2, 5, 8)
    held = capture(model, (x, torch.ones(2, 5)))
    held.propagate()
    attentions(held)[0].masks[0].take()
    held.recompile()
    torch.testing.assert_close(held(x, torch.zeros(2, 5)), model(x, torch.ones(2, 5)))
