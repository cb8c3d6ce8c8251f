"""What autocast leaves in float32."""

import torch

from laconic.training.precision import autocast

CPU = torch.device("cpu")


def test_attention_stays_in_float32_and_products_do_not():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 8, generator=generator)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    with autocast(CPU, "bf16"):
        got = attention(q.bfloat16(), k, v, scale=0.5)
        assert torch.matmul(q, k.mT).dtype == torch.bfloat16
    wanted = attention(q.bfloat16().float(), k, v, scale=0.5)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_float32_changes_nothing():
    x = torch.ones(2, 2)
    with autocast(CPU, "fp32"):
        assert torch.matmul(x, x).dtype == torch.float32
