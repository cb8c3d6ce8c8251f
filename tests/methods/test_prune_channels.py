"""What `prune.channels` promises: the ratio, the masked identity, replay, compensation, clear errors."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from laconic.core import registry
from laconic.core.errors import BudgetError, DataError, RecipeError
from laconic.core.task import Task, classification
from laconic.methods.base import Context
from laconic.methods.prune.channels import PruneChannels
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.groups import groups
from laconic.program.sites import Sites
from laconic.solvers.channels import channel_block
from laconic.testing import zoo
from laconic.testing.contracts import own_outputs
from laconic.testing.masked import masked

PLAIN = {"compensate": False, "recalibrate": False, "block": 1, "samples": 16}


def setting(model, **options):
    program = zoo.captured(model)
    return program, Context(task=own_outputs(program), original=program, **options)


def run(model, sites="*", **options):
    program, context = setting(model)
    return program, PruneChannels(**options).apply(program, Sites.of(sites), context)


@pytest.mark.parametrize("importance", registry.names("laconic.solvers.importance"))
@pytest.mark.parametrize("model", ["padded_shortcut", "per_head", "grouped"])
def test_without_compensation_it_is_the_masked_original(model, importance):
    if importance == "bn_scale" and model != "padded_shortcut":
        pytest.skip("bn_scale refuses networks without batch norms")
    program, outcome = run(model, ratio=0.3, importance=importance, **PLAIN)
    assert outcome.changes
    x = program.example
    with torch.no_grad():
        cut, whole = outcome.program.run_flat(*x), program.run_flat(*x)
    for one, two, dense in zip(cut, masked(program, outcome.changes, x), whole, strict=True):
        assert torch.allclose(one, two, atol=1e-5 * max(1.0, float(two.abs().max())))
        assert not torch.allclose(one, dense, atol=1e-3)


@pytest.mark.parametrize(
    ("of", "scope"),
    list(itertools.product(["channels", "macs", "parameters"], ["global", "layer"])),
)
def test_the_ratio_is_reached(of, scope):
    program, outcome = run("resnet", ratio=0.4, of=of, scope=scope, importance="l1", **PLAIN)
    before, after = cost(program), cost(outcome.program)
    kept = outcome.figures["kept"]
    every = sum(group.size for group in groups(program))
    gone = sum(size - now for size, now in kept.values())
    reached = {
        "macs": 1 - after.macs / before.macs,
        "parameters": 1 - after.params / before.params,
        "channels": gone / every,
    }[of]
    assert 0.4 <= reached < 0.55
    assert outcome.figures["macs"] == [before.macs, after.macs]
    assert outcome.figures["parameters"] == [before.params, after.params]


def test_changes_name_what_was_kept_in_the_input():
    program, outcome = run("plain_cnn", ratio=0.4, importance="l2", **PLAIN)
    for name, dims in outcome.changes.items():
        tensor = program.tensor(name)
        for dim, kept in dims.items():
            tensor = tensor.index_select(dim, kept)
        assert torch.equal(tensor, outcome.program.tensor(name))
    assert set(outcome.resolved["keep"]) == set(outcome.figures["kept"])


@pytest.mark.parametrize(
    "options", [{}, {"rounds": 3}, {"importance": "taylor", "refit": "consumers"}]
)
def test_replay_is_bit_exact(options):
    program, context = setting("resnet")
    first = PruneChannels(ratio=0.4, block=1, samples=32, **options).apply(
        program, Sites(), context
    )
    second = PruneChannels(**first.resolved).apply(
        program, Sites.of("nothing.of.that.name"), context
    )
    for (name, one), (_, two) in zip(
        first.program.tensors(), second.program.tensors(), strict=True
    ):
        assert torch.equal(one, two), name
    assert second.resolved == first.resolved


def test_the_input_is_left_as_it_was_even_in_training_mode():
    program, context = setting("resnet")
    program.train()
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    outcome = PruneChannels(ratio=0.3, block=1, samples=16).apply(program, Sites(), context)
    assert program.training and not outcome.program.training
    assert all(torch.equal(before[n], t) for n, t in program.state_dict().items())


class Wide(nn.Module):
    """Twice as wide as it needs to be: every hidden channel exists twice."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3), nn.Linear(32, 6)
        zoo.shake(self)
        with torch.no_grad():
            for tensor in (
                self.a.weight,
                self.a.bias,
                *self.norm.parameters(),
                *self.norm.buffers(),
            ):
                if tensor.ndim:
                    tensor[4:] = tensor[:4]
            self.b.weight[4:], self.b.bias[4:] = self.b.weight[:4], self.b.bias[:4]

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.norm(self.a(x))))).flatten(1))


def test_redundant_channels_go_without_a_trace_through_a_flatten():
    program = capture(Wide().eval(), torch.randn(2, 3, 6, 6))
    data = [torch.randn(64, 3, 6, 6) for _ in range(2)]
    context = Context(task=classification(calibration=data), original=program)
    method = PruneChannels(ratio=0.5, of="channels", block=1, limit=0.5)
    outcome = method.apply(program, Sites(), context)
    x = torch.randn(16, 3, 6, 6)
    with torch.no_grad():
        miss = float((outcome.program(x) - program(x)).abs().max() / program(x).abs().max())
    assert miss < 1e-3
    assert all(now == 4 for _, now in outcome.figures["kept"].values())
    naive = PruneChannels(ratio=0.5, of="channels", block=1, limit=0.5, compensate=False)
    cut = naive.apply(program, Sites(), context).program
    with torch.no_grad():
        lost = float((cut(x) - program(x)).abs().max() / program(x).abs().max())
    assert lost > 10 * miss


def test_compensation_pays_on_a_transformer_with_ratios_by_site():
    program = zoo.captured("fused_view")
    context = Context(task=own_outputs(program, batches=24), original=program)
    names = [group.name for group in groups(program)]
    heads = next(name for name in names if "heads" in name)
    units = next(name for name in names if name.startswith("up"))
    sizes = {name: groups(program).find(name).size for name in (heads, units)}
    options = {"ratio": {heads: 0.34, units: 0.5}, "of": "channels", "block": 1, "samples": 48}

    def error(**more):
        outcome = PruneChannels(**options, **more).apply(program, Sites.of([heads, units]), context)
        kept = outcome.figures["kept"]
        assert kept[units][1] == sizes[units] // 2
        assert kept[heads][1] < sizes[heads]
        rows = context.task.train[:8]
        with torch.no_grad():
            return sum(
                float((-context.task.metric(outcome.program(**x), t)).mean()) for x, t in rows
            )

    assert error() < 0.8 * error(compensate=False)


def test_kept_channels_are_multiples_of_the_block():
    _, outcome = run("resnet", ratio=0.4, importance="l1", **{**PLAIN, "block": 4})
    assert all(now % 4 == 0 or now == size for size, now in outcome.figures["kept"].values())


def test_the_automatic_block_is_measured_once_and_recorded(monkeypatch):
    asked = []

    def probe(runtime, threads):
        asked.append((runtime, threads))
        return {64: 1.0, 63: 1.0, 62: 0.9, 60: 0.9, 56: 0.8, 48: 0.7}

    monkeypatch.setattr(channel_block, "measured", probe)
    channel_block.block_for.cache_clear()
    options = {**PLAIN, "block": "auto"}
    program, context = setting("resnet", runtime="onnxruntime", threads=2)
    method = PruneChannels(ratio=0.3, importance="l1", **options)
    outcome = method.apply(program, Sites(), context)
    method.apply(program, Sites(), context)
    channel_block.block_for.cache_clear()
    assert asked == [("onnxruntime", 2)]
    assert outcome.resolved["block"] == 2
    assert all(now % 2 == 0 or now == size for size, now in outcome.figures["kept"].values())


def test_each_round_goes_on_where_the_last_one_stopped():
    program, outcome = run("resnet", ratio=0.5, block=1, samples=16, rounds=4, importance="fisher")
    assert 0.5 <= 1 - cost(outcome.program).macs / cost(program).macs < 0.65
    for name, kept in outcome.resolved["keep"].items():
        assert kept == sorted(set(kept))
        assert max(kept) < groups(program).find(name).size


# Milliseconds -------------------------------------------------------------------------------


class Timed(PruneChannels):
    """With a clock that is a formula: a nanosecond a multiply-add, and a call."""

    def timer(self, context):
        return lambda programs: {n: 0.001 + 1e-6 * cost(p).macs for n, p in programs.items()}


class Untimed(PruneChannels):
    """Fails when it is asked to measure."""

    def timer(self, context):
        def refuse(programs):
            raise AssertionError("a replay measures nothing")

        return refuse


@pytest.mark.parametrize("rounds", [1, 2])
def test_measured_milliseconds_fall_by_the_ratio_and_a_replay_measures_nothing(rounds):
    program, context = setting("resnet")
    options = {"ratio": 0.4, "of": "ms", "importance": "l1", "rounds": rounds, "samples": 16}
    first = Timed(block=1, **options).apply(program, Sites(), context)
    whole, fast = first.figures["latency"]["milliseconds"]
    assert whole == pytest.approx(0.001 + 1e-6 * cost(program).macs, abs=1e-6)
    assert fast == pytest.approx(0.001 + 1e-6 * cost(first.program).macs, abs=1e-6)
    assert 0.4 <= 1 - fast / whole < 0.5
    again = Untimed(**first.resolved).apply(program, Sites(), context)
    for (name, one), (_, two) in zip(first.program.tensors(), again.program.tensors(), strict=True):
        assert torch.equal(one, two), name
    assert "latency" not in again.figures


@pytest.mark.parametrize("of", ["macs", "parameters", "ms"])
def test_against_the_original_counts_what_earlier_steps_have_saved(of):
    program, context = setting("resnet")
    options = {"of": of, "importance": "l1", **PLAIN}
    half = Timed(ratio=0.3, **options).apply(program, Sites(), context).program
    outcome = Timed(ratio=0.5, against="original", **options).apply(half, Sites(), context)
    whole, left = (
        found.params if of == "parameters" else found.macs
        for found in (cost(program), cost(outcome.program))
    )
    assert 0.5 - 1e-3 <= 1 - left / whole < 0.65
    enough = Timed(ratio=0.2, against="original", **options).apply(half, Sites(), context)
    assert cost(enough.program).macs == cost(half).macs
    again = Untimed(**outcome.resolved).apply(half, Sites(), context)
    for (name, one), (_, two) in zip(
        outcome.program.tensors(), again.program.tensors(), strict=True
    ):
        assert torch.equal(one, two), name


def test_milliseconds_come_from_the_runtime_of_the_context():
    layers = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3))
    program = capture(layers.eval(), torch.randn(2, 3, 64, 64))
    context = Context(task=own_outputs(program), original=program, runtime="openvino", threads=1)
    options = {"of": "ms", "importance": "l1", **PLAIN, "block": 16, "limit": 0.5}
    outcome = PruneChannels(ratio=0.01, **options).apply(program, Sites(), context)
    held = outcome.figures["latency"]
    assert (held["runtime"], held["threads"], held["batch"]) == ("openvino", 1, 1)
    whole, fast = held["milliseconds"]
    assert 0 < fast <= 0.99 * whole  # of two to four times less work
    assert [kind["sizes"] for kind in held["table"]] == [[[32, 48, 64]], [[32, 48, 64]]]
    assert outcome.figures["kept"]["0.out"][1] in (32, 48)


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, "not from 0 to below 1"),
        ({"ratio": -0.1}, "not from 0 to below 1"),
        ({"ratio": {"a": 0.5}}, "of: channels"),
        ({"importance": "taylo"}, "did you mean 'taylor'"),
        ({"block": 0}, "below 1"),
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"of": "flops"}, "macs"),
        ({"ratio": {"a": 0.5}, "of": "ms"}, "of: channels"),
        ({"against": "original", "of": "channels"}, "macs, parameters or ms"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        PruneChannels(**options)


def test_an_impossible_ratio_says_how_far_it_can_go_and_what_is_in_the_way():
    with pytest.raises(BudgetError, match=r"at most.*99\.0%") as caught:
        run("resnet", ratio=0.99, importance="l1", **PLAIN)
    assert caught.value.where


def test_impossible_milliseconds_say_how_far_they_can_fall():
    program, context = setting("resnet")
    method = Timed(ratio=0.999, of="ms", importance="l1", **PLAIN)
    with pytest.raises(BudgetError, match=r"latency can fall by .*% at most.*99\.9%") as caught:
        method.apply(program, Sites(), context)
    assert caught.value.where in {group.name for group in groups(program)}


def test_sites_that_match_nothing_or_only_frozen_groups():
    with pytest.raises(RecipeError, match="match nothing"):
        run("resnet", sites="no.such.layer", **PLAIN)
    program, context = setting("resnet")
    frozen = groups(program).frozen[0].name
    with pytest.raises(RecipeError, match="cannot shrink"):
        PruneChannels(**PLAIN).apply(program, Sites.of(frozen), context)


def test_nothing_to_do_says_why():
    program, context = setting("resnet")
    outcome = PruneChannels(ratio=0.0).apply(program, Sites(), context)
    assert any("ratio is 0" in note for note in outcome.notes)
    assert not outcome.changes
    rigid = capture(nn.Linear(4, 3), torch.randn(2, 4))
    held = PruneChannels(**PLAIN).apply(
        rigid, Sites(), Context(task=own_outputs(rigid), original=rigid)
    )
    assert any("no group" in note for note in held.notes)


def test_data_that_cannot_serve_are_refused_or_noted():
    program, _ = setting("plain_cnn")
    shape = tuple(program.example[0].shape)

    def apply(data, **options):
        context = Context(task=classification(calibration=data), original=program)
        return PruneChannels(ratio=0.3, block=1, **options).apply(program, Sites(), context)

    with pytest.raises(DataError, match="empty"):
        apply([])
    with pytest.raises(DataError, match="calibration batch 1.*NaN"):
        apply([torch.randn(shape), torch.full(shape, torch.nan)])
    with pytest.raises(DataError, match="expected"):
        apply([torch.randn(2, 1, 3, 3)])
    with pytest.raises(DataError, match="no calibration or train data"):
        apply(None)
    constant = apply([torch.zeros(shape)])
    assert any("same constant" in note for note in constant.notes)
    few = apply([torch.randn(shape)])
    assert any("calibration rows for" in note for note in few.notes)
    for outcome in (constant, few):
        assert all(bool(torch.isfinite(t).all()) for _, t in outcome.program.tensors())


def test_scores_without_data_need_none():
    program, _ = setting("plain_cnn")
    empty = Task(loss=lambda o, t: o.sum(), metric=lambda o, t: o)
    context = Context(task=empty, original=program)
    outcome = PruneChannels(ratio=0.3, importance="l1", **PLAIN).apply(program, Sites(), context)
    assert outcome.changes


def test_a_replay_with_an_unknown_group_is_refused():
    program, context = setting("plain_cnn")
    with pytest.raises(Exception, match="no group named"):
        PruneChannels(keep={"nowhere.out": [0]}).apply(program, Sites(), context)
