"""What autocast leaves in float32."""

import torch
from torch import nn

from laconic.training.precision import autocast, set_layout

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


def test_layouts_change_4d_tensors_and_leave_others():
    """5-d ones, as layers that share a basis have them, have no such layout."""
    held = nn.Module()
    held.kernel, held.basis = (nn.Parameter(torch.randn(n * [3])) for n in (4, 5))
    kernel, value = held.kernel, held.kernel.detach().clone()
    set_layout(held, channels_last=True)
    assert held.kernel is kernel
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert held.basis.is_contiguous()
    set_layout(held, channels_last=False)
    assert kernel.is_contiguous()
    assert torch.equal(kernel, value)
