"""Tokens that leave: what merging equal tokens changes (nothing), and what cannot follow."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic import runtimes
from laconic.core.errors import RecipeError
from laconic.core.task import classification
from laconic.methods.base import Context
from laconic.methods.dynamic.tokens import Tokens
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.sites import Sites
from laconic.testing import contracts, zoo

TOKENS = 12


class Attention(nn.Module):
    def __init__(self, width=16, heads=2, written_out=False):
        super().__init__()
        self.heads, self.written_out = heads, written_out
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask=None):
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.written_out:
            scores = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5
            if mask is not None:
                scores = scores + (1.0 - mask[:, None, None, :].float()) * -1e9
            y = scores.softmax(-1) @ v
        else:
            held = None if mask is None else mask[:, None, None, :].bool()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=held)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class Layer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.attention, self.up, self.down = (
            Attention(**options), nn.Linear(16, 32), nn.Linear(32, 16),
        )  # fmt: skip

    def forward(self, x, mask=None):
        x = x + self.attention(self.norms[0](x), mask)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Encoder(nn.Module):
    """Three layers; pooled by the mean, the class token, the rest behind it, or not at all."""

    def __init__(self, pool="mean", written_out=False):
        super().__init__()
        self.pool, self.embed = pool, nn.Linear(6, 16)
        self.layers = nn.ModuleList(Layer(written_out=written_out) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)
        self.first = nn.Parameter(torch.zeros(1, 1, 16))

    def forward(self, x, mask=None):
        x = self.embed(x)
        if self.pool in ("class", "behind"):
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        if self.pool == "tokens":
            return self.head(x)
        if mask is not None:
            held = mask.unsqueeze(-1).expand(x.size()).float()
            return self.head((x * held).sum(1) / held.sum(1).clamp(min=1e-9))
        held = {"mean": x, "class": x[:, :1], "behind": x[:, 1:], "one": x}[self.pool]
        return self.head(x[:, 0] if self.pool == "class" else held.mean(1))


@functools.cache
def program(pool="mean", masked=False, **options):
    model = zoo.shake(Encoder(pool, **options), seed=3)
    x = torch.randn(2, TOKENS, 6, generator=torch.Generator().manual_seed(0))
    example = {"x": x, "mask": torch.ones(2, TOKENS, dtype=torch.int64)} if masked else (x,)
    return capture(model, example)


def applied(held, sites="*", **options):
    context = Context(task=classification(), original=held)
    return Tokens(**options).apply(held, Sites.of(sites), context)


def twins(batch=3):
    """Inputs whose tokens stand in equal pairs."""
    half = torch.randn(batch, TOKENS // 2, 6, generator=torch.Generator().manual_seed(1))
    return half.repeat_interleave(2, 1)


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("pool", ["mean", "class", "behind"])
def test_merging_equal_tokens_changes_nothing(pool, written_out):
    # Float32 through three layers: relative 1e-5 of values of size 1.
    same = torch.randn(3, 1, 6).expand(-1, TOKENS, -1)
    held = program(pool, written_out=written_out)
    for sites, r, x in (("layers.1", 5, twins()), ("*", 2, same)):
        made = applied(held, sites, r=r)
        assert made.figures["tokens"][-1] == made.figures["tokens"][0] - (5 if r == 5 else 6)
        assert made.figures["class_tokens"] == (pool != "mean")
        torch.testing.assert_close(made.program(x), held(x), rtol=1e-4, atol=2e-5)
    other = torch.randn(3, TOKENS, 6)
    assert not torch.allclose(made.program(other), held(other), atol=1e-4)


def test_without_proportional_attention_equal_tokens_do_count():
    held, x = program(), twins()
    made = applied(held, "layers.1", r=5, proportional=False).program
    assert not torch.allclose(made(x), held(x), atol=1e-4)


@pytest.mark.parametrize("by", ["merge", "drop", "fuse"])
def test_nothing_goes_nothing_changes(by):
    held = program()
    made = applied(held, r=0, by=by)
    assert str(made.program.graph) == str(held.graph) and made.resolved["removed"] == {}


@pytest.mark.parametrize("by", ["merge", "drop", "fuse"])
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_fewer_tokens_cost_less_and_train(by, pool):
    held = program(pool)
    made = applied(held, by=by, ratio=0.4)
    before, after = made.figures["macs"]
    assert after < before and after == cost(made.program).macs and not cost(made.program).unknown
    student = made.program.clone().train()
    student(torch.randn(4, TOKENS, 6)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters()
               if p.requires_grad)  # fmt: skip


@pytest.mark.parametrize("written_out", [False, True])
def test_padding_goes_first_and_costs_nothing(written_out):
    # Six real tokens in front, six of padding: three of them stand at even places.
    held = program(masked=True, written_out=written_out)
    x = torch.randn(2, TOKENS, 6, generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(TOKENS) < 6).long().expand(2, -1)
    for options in ({"r": 3}, {"r": 3, "proportional": False}, {"r": 6, "by": "drop"}):
        made = applied(held, "layers.0", **options).program
        torch.testing.assert_close(made(x, mask), held(x, mask), rtol=1e-4, atol=2e-5)
        other = made(torch.where(mask[..., None] == 1, x, 7.0), mask)
        torch.testing.assert_close(other, made(x, mask))  # what padding holds does not matter


class Shared(Encoder):
    """One mask `[batch, 1, tokens, tokens]` for all layers, which `made` makes."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, x, mask=None):
        held, y = self.made(x, mask), self.embed(x)
        for layer in self.layers:
            heads = layer.attention.qkv(layer.norms[0](y)).reshape(x.shape[0], TOKENS, 3, 2, 8)
            z = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4), attn_mask=held)
            y = y + layer.attention.out(z.transpose(1, 2).reshape(-1, TOKENS, 16))
            y = y + layer.down(F.gelu(layer.up(layer.norms[1](y))))
        return self.head(y[:, 0])


def test_a_mask_that_knows_the_batch_of_another_input_is_one_of_padding():
    def words(x, mask):  # as in transformers' BERT
        rows = torch.arange(x.shape[0], device=x.device)
        held = mask.bool()[rows[:, None, None, None], torch.arange(TOKENS)]
        return held.expand(-1, 1, TOKENS, TOKENS)

    x = torch.randn(3, TOKENS, 6, generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(TOKENS) < 6).long().expand(3, -1)
    held = capture(zoo.shake(Shared(words), 3), {"x": x[:2], "mask": mask[:2]})
    made = applied(held, by="drop", r=2)
    assert made.figures["tokens"] == [12, 10, 8, 6] and not made.notes
    torch.testing.assert_close(made.program(x, mask), held(x, mask), rtol=1e-4, atol=2e-5)


def transformer(kind, attention):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "num_labels": 5, "hidden_dropout_prob": 0.0}
    images = {"image_size": 16, "patch_size": 4} if kind == "ViT" else {"vocab_size": 50}
    config = getattr(transformers, f"{kind}Config")(**size, **images)
    name = f"{kind}For{'Image' if kind == 'ViT' else 'Sequence'}Classification"
    model = getattr(transformers, name)._from_config(config, attn_implementation=attention)
    return zoo.shake(model, seed=3)


@pytest.mark.parametrize("by", ["merge", "drop", "fuse"])
@pytest.mark.parametrize("kind", ["ViT", "Bert"])
def test_attention_that_is_written_out_loses_the_same_tokens(kind, by):
    generator = torch.Generator().manual_seed(0)
    if kind == "ViT":
        inputs = {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    else:
        words = torch.randint(0, 50, (3, TOKENS), generator=generator)
        mask = (torch.arange(TOKENS) < torch.tensor([[5], [9], [12]])).long()
        inputs = {"input_ids": words, "attention_mask": mask}
    fused, eager = (applied(capture(transformer(kind, written), inputs), by=by, r=2)
                    for written in ("sdpa", "eager"))  # fmt: skip
    names = [{node.target.__name__.split(".")[0] for node in made.program.graph.nodes
              if node.op == "call_function"} for made in (fused, eager)]  # fmt: skip
    fusion = "scaled_dot_product_attention"
    assert fusion in names[0] and fusion not in names[1]
    assert (
        eager.figures["tokens"] == fused.figures["tokens"] and len(eager.resolved["removed"]) == 3
    )
    assert not eager.notes and eager.figures["macs"] == fused.figures["macs"]
    ours, theirs = (made.program(*inputs.values()) for made in (eager, fused))
    torch.testing.assert_close(ours["logits"], theirs["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [0, 3])
def test_a_constant_mask_that_hides_nothing_is_in_nobodys_way(first):
    def idle(x, _):  # as in transformers' ViT
        seen = (torch.arange(TOKENS)[None, None, :, None] >= first).transpose(2, 3)
        return seen.expand(x.shape[0], 1, TOKENS, TOKENS)

    held = capture(zoo.shake(Shared(idle), 3), (torch.randn(2, TOKENS, 6),))
    made = applied(held, r=2)
    assert made.figures["tokens"] == ([12, 10, 8, 6] if first == 0 else [12, 10])


def test_merged_padding_stays_padding_in_every_layer():
    held = program(masked=True)
    made = applied(held, r=2).program
    mask = (torch.arange(TOKENS) < torch.tensor([[4], [9]])).long()
    x = torch.randn(2, TOKENS, 6)
    other = torch.where(mask[..., None] == 1, x, -5.0)
    torch.testing.assert_close(made(x, mask), made(other, mask))


@pytest.mark.parametrize("by", ["drop", "fuse"])
def test_dropping_keeps_what_is_looked_at(by):
    """A token that all heads look away from (its key opposes the mean query) is the first to go."""
    held = program()
    made = applied(held, "layers.2", by=by, r=1).program
    x = torch.randn(2, TOKENS, 6)
    assert made(x).shape == held(x).shape
    assert (made(x) - held(x)).abs().max() < 0.5 * held(x).std()


def test_what_cannot_follow_is_named():
    with pytest.raises(RecipeError, match="output 0 of the model"):
        applied(program("tokens"))
    with pytest.raises(RecipeError, match="at most 6 can"):
        applied(program(), r=7)
    with pytest.raises(RecipeError, match="no layer with attention"):
        applied(program(), removed={"layers.7": 1})


def test_a_table_of_positions_is_named():
    class Biased(Encoder):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1, TOKENS, 16))

        def forward(self, x):
            x = self.layers[0](self.embed(x)) + self.table
            return self.head(self.layers[1](x).mean(1))

    captured = capture(zoo.shake(Biased()), torch.randn(2, TOKENS, 6))
    made = applied(captured, r=2)
    assert list(made.figures["removed"]) == ["layers.1"]
    assert any("layers.0: keeps its tokens: table has a place" in note for note in made.notes)
    with pytest.raises(RecipeError, match="table has a place for every token"):
        applied(captured, "layers.0", r=2)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("by", ["merge", "fuse"])
def test_runtimes_choose_the_same_tokens(runtime, by, tmp_path):
    pytest.importorskip(runtime)
    made = applied(program("class"), "layers.1", by=by, r=4).program
    engine = runtimes.get(runtime)
    path = engine.write(made, tmp_path / f"model{engine.suffix}")
    x = torch.randn(3, TOKENS, 6, generator=torch.Generator().manual_seed(5))
    (found,) = engine.load(path, threads=1).run([x.numpy()])
    torch.testing.assert_close(torch.from_numpy(found), made(x), rtol=1e-4, atol=1e-5)


@functools.cache
def _case(by):
    return contracts.case("dynamic.tokens", "fused_view", by=by)


@pytest.mark.parametrize("check", contracts.PAIR_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("by", ["drop", "fuse"])
def test_contracts(check, by):
    check(_case(by))


def test_two_may_read_the_same_tokens():
    """An exit's head and the network's own both pool what the last merge gave."""
    both = contracts.followed_by(
        contracts.case("dynamic.early_exit", "fused_split"), "dynamic.tokens"
    )
    for check in contracts.PAIR_CHECKS:
        check(both)
