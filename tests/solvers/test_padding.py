"""What may be padded is found by running: a mask that hides, samples that are strangers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.program.capture import capture
from laconic.solvers.dynamic.padding import find_padding


class Encoder(nn.Module):
    """One attention layer, a masked mean; each way in which padding can leak is a switch."""

    def __init__(self, leak=""):
        super().__init__()
        self.leak = leak
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(40, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, ids, attention_mask):
        batch, length = ids.shape
        x = self.words(ids) + self.places(torch.arange(length))
        parts = self.qkv(x).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        kept = attention_mask.unsqueeze(-1).to(x.dtype)
        lost = -5.0 if self.leak == "weak" else -1e9
        hidden = None if self.leak == "attention" else (1 - kept)[:, None, None, :, 0] * lost
        y = F.scaled_dot_product_attention(*parts, attn_mask=hidden)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, 16))
        if self.leak == "flat":
            return x.reshape(-1, 16)
        if self.leak == "length":
            return (x * kept).sum(1) / length
        if self.leak == "batch":
            x = x - x.mean(0, keepdim=True)
        return {"tokens": x, "mean": (x * kept).sum(1) / kept.sum(1)}


def _captured(leak):
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 5))
    inputs = {"ids": ids, "attention_mask": torch.ones_like(ids)}
    return capture(Encoder(leak).eval(), inputs, dynamic=("batch", "sequence"))


def test_a_mask_that_hides_lets_lengths_be_padded():
    found = find_padding(_captured(""))
    assert found.masks == {"batch": "", "sequence": "attention_mask"}
    assert found.refused == {}
    assert found.outputs == ({0: "batch", 1: "sequence"}, {0: "batch"})


@pytest.mark.parametrize(
    ("leak", "name", "why"),
    [
        ("attention", "sequence", "what stands in the padding changes output 0"),
        ("weak", "sequence", "what stands in the padding changes output 0"),
        ("length", "sequence", "padding changes output 0 by"),
        ("flat", "sequence", "cannot be cut"),
        ("batch", "batch", "what stands in the padding changes output 0"),
    ],
)
def test_each_leak_is_found_and_told(leak, name, why):
    found = find_padding(_captured(leak))
    assert name not in found.masks
    assert why in found.refused[name]


def test_images_have_no_mask_and_keep_their_sizes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    sides = {"args[0]": {0: "batch", 2: "height", 3: "width"}}
    found = find_padding(capture(net.eval(), (torch.randn(2, 3, 8, 9),), dynamic=sides))
    assert found.masks == {"batch": ""}
    assert set(found.refused) == {"height", "width"}
    assert all("no input is a mask" in why for why in found.refused.values())
    assert found.outputs == ({0: "batch"},)


def test_grids_of_activations_do_not_stand_in_the_way():
    program = _captured("")
    node = next(n for n in program.graph.nodes if "linear" in str(n.target))
    names = [program.add_tensor("s", torch.tensor(0.05)), program.add_tensor("z", torch.tensor(0))]
    source = node.args[0]
    with program.graph.inserting_before(node):
        sides = [program.graph.get_attr(name) for name in names]
        grid = program.graph.call_function(
            torch.ops.laconic.fake_quantize.default, (source, *sides, None, -127, 127)
        )
    node.replace_input_with(source, grid)
    program.recompile()
    assert set(find_padding(program).masks) == {"batch", "sequence"}
