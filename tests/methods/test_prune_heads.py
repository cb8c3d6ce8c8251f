"""prune.heads: only heads go, whole key/value groups stay legal, the idle head goes first."""

import pytest
import torch
from pydantic import ValidationError

from laconic.core.errors import BudgetError, RecipeError
from laconic.methods.base import Context
from laconic.methods.prune.heads import PruneHeads
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.groups import groups
from laconic.program.sites import Sites
from laconic.testing import zoo
from laconic.testing.contracts import own_outputs
from laconic.testing.masked import masked

PLAIN = {"compensate": False, "importance": "l1", "samples": 16}
LAYERS = [f"layers.{n}.self_attn.in_proj_weight.heads" for n in (0, 1)]


def run(model, sites="*", kind=PruneHeads, **options):
    program = zoo.captured(model)
    context = Context(task=own_outputs(program), original=program)
    return program, kind(**options).apply(program, Sites.of(sites), context)


@pytest.mark.parametrize("model", ["fused_view", "native_attention", "rotary", "windows"])
def test_without_compensation_it_is_the_masked_original_and_only_heads_go(model):
    program, outcome = run(model, ratio=0.25, **PLAIN)
    assert outcome.figures["kept"]
    for name, (size, now) in outcome.figures["kept"].items():
        assert groups(program).find(name).atom.hint == "heads"
        assert now == size * 3 // 4
    x = program.example
    with torch.no_grad():
        cut, wanted = outcome.program.run_flat(*x), masked(program, outcome.changes, x)
    for one, two in zip(cut, wanted, strict=True):
        assert torch.allclose(one, two, atol=1e-5 * max(1.0, float(two.abs().max())))


def test_attention_whose_shapes_hold_batch_times_heads_is_compensated():
    """There the cut computes new sizes, so that it has more nodes than the original."""
    program = zoo.captured("native_attention")
    task = own_outputs(program, batches=32)

    def error(**options):
        context = Context(task=task, original=program)
        made = PruneHeads(ratio=0.5, samples=64, **options).apply(program, Sites(), context)
        held = own_outputs(program, batches=8, seed=9)
        with torch.no_grad():
            return sum(float(-held.metric(made.program(**x), t).mean()) for x, t in held.train)

    assert error() < error(compensate=False)


@pytest.mark.parametrize("importance", ["l1", "obs", "taylor"])
def test_the_head_that_does_nothing_goes_first_and_is_not_missed(importance):
    module, inputs = zoo.make("fused_view")
    with torch.no_grad():  # head 2: columns 16 to 23 of the output layer; its values too
        module.attention.out.weight[:, 16:24] = 0
        module.attention.qkv.weight[64 + 16 : 64 + 24] = 0
        module.attention.qkv.bias[64 + 16 : 64 + 24] = 0
        module.attention.qkv.weight[16:24] *= 0.01
        module.attention.qkv.weight[32 + 16 : 32 + 24] *= 0.01
    program = capture(module, inputs)
    context = Context(task=own_outputs(program), original=program)
    method = PruneHeads(count=1, importance=importance, compensate=False, samples=16)
    outcome = method.apply(program, Sites(), context)
    assert outcome.resolved["keep"] == {"attention.qkv.heads": [0, 1, 3]}
    with torch.no_grad():
        old, new = program(*inputs), outcome.program(*inputs)
    assert torch.allclose(old, new, atol=1e-5 * float(old.abs().max()))


def test_a_count_is_in_total_or_from_every_layer():
    for count in (1, 3):
        _, outcome = run("tied_language_model", count=count, **PLAIN)
        assert sum(size - now for size, now in outcome.figures["kept"].values()) == count
    _, outcome = run("tied_language_model", count=2, scope="layer", **PLAIN)
    assert outcome.figures["kept"] == {name: [4, 2] for name in LAYERS}
    _, outcome = run("tied_language_model", count=0, **PLAIN)
    assert not outcome.changes and outcome.notes


def test_parts_by_layer_and_sites():
    _, outcome = run("tied_language_model", ratio={"layers.0.*": 0.5, "layers.1.*": 0.25}, **PLAIN)
    assert outcome.figures["kept"] == {LAYERS[0]: [4, 2], LAYERS[1]: [4, 3]}
    _, outcome = run("tied_language_model", sites="layers.1.*", ratio=0.5, **PLAIN)
    assert outcome.figures["kept"] == {LAYERS[1]: [4, 2]}


def test_a_key_goes_with_all_its_queries():
    program, outcome = run("rotary", count=1, **PLAIN)
    made = outcome.program
    assert outcome.figures["kept"] == {"attention.q.heads": [4, 3]}
    for name, rows in (("q", 48), ("k", 24), ("v", 24)):
        assert made.tensor(f"attention.{name}.weight").shape[0] == rows
    _, outcome = run("rotary", ratio=0.5, scope="layer", queries=True, **PLAIN)
    assert outcome.figures["kept"] == {
        "attention.q.heads": [4, 2],
        "attention.q.heads_per_kv": [2, 1],
    }
    x = program.example
    with torch.no_grad():
        wanted = masked(program, outcome.changes, x)
        for one, two in zip(outcome.program.run_flat(*x), wanted, strict=True):
            assert torch.allclose(one, two, atol=1e-5 * max(1.0, float(two.abs().max())))


def test_replay_is_bit_exact_and_compensation_helps():
    program = zoo.captured("fused_view")
    context = Context(task=own_outputs(program, batches=24), original=program)
    first = PruneHeads(count=1, samples=48).apply(program, Sites(), context)
    again = PruneHeads(**first.resolved).apply(program, Sites.of("nowhere"), context)
    for (name, one), (_, two) in zip(first.program.tensors(), again.program.tensors(), strict=True):
        assert torch.equal(one, two), name
    bare = PruneHeads(keep=first.resolved["keep"], compensate=False)

    def error(made):
        with torch.no_grad():
            rows = context.task.train[:8]
            return sum(float((-context.task.metric(made(**x), t)).mean()) for x, t in rows)

    assert error(first.program) < error(bare.apply(program, Sites(), context).program)


class Timed(PruneHeads):
    """With a clock that is a formula: a nanosecond a multiply-add."""

    def timer(self, context):
        return lambda programs: {name: 1e-6 * cost(p).macs for name, p in programs.items()}


def test_a_budget_in_milliseconds():
    program, outcome = run("tied_language_model", kind=Timed, ratio=0.2, of="ms", **PLAIN)
    whole, fast = outcome.figures["latency"]["milliseconds"]
    assert fast <= 0.8 * whole
    assert fast == pytest.approx(1e-6 * cost(outcome.program).macs, abs=1e-6)
    with pytest.raises(BudgetError, match="latency can fall by") as caught:
        run("tied_language_model", kind=Timed, ratio=0.9, of="ms", **PLAIN)
    assert caught.value.where in LAYERS


# Bad input ----------------------------------------------------------------------------------


def test_a_network_without_attention_is_told_so():
    program, outcome = run("resnet", **PLAIN)
    assert any("no attention" in note for note in outcome.notes)
    assert not outcome.changes
    with torch.no_grad():
        for one, two in zip(
            outcome.program.run_flat(*program.example),
            program.run_flat(*program.example),
            strict=True,
        ):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, "not from 0 to below 1"),
        ({"count": -1}, "greater than or equal to 0"),
        ({"count": 1, "ratio": 0.5}, "takes the place of ratio"),
        ({"count": 2, "of": "macs"}, "need of: heads"),
        ({"ratio": {"a": 0.5}, "of": "ms"}, "need of: heads"),
        ({"importance": "ob"}, "did you mean 'obs'"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        PruneHeads(**options)


def test_impossible_counts_and_sites_are_refused_in_words():
    with pytest.raises(RecipeError, match="8 heads are to go, there are 8"):
        run("tied_language_model", count=8, **PLAIN)
    with pytest.raises(RecipeError, match=r"in_proj_weight\.heads: 4 heads are to go"):
        run("tied_language_model", count=4, scope="layer", **PLAIN)
    with pytest.raises(BudgetError, match="at most"):
        run("tied_language_model", count=7, **PLAIN)
    with pytest.raises(RecipeError, match="match nothing"):
        run("fused_view", sites="up.out", **PLAIN)
