"""simplify.drop_layers: residual branches are found from the graph, and the idle one goes first."""

import pytest
import torch
from torch import nn

from laconic.core.errors import DataError, RecipeError
from laconic.core.task import Task
from laconic.methods.base import Context
from laconic.methods.simplify.drop_layers import DropLayers
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.testing import zoo

EPS = torch.finfo(torch.float32).eps


class Res(nn.Sequential):
    """What it computes is added to what it is given."""

    def forward(self, x):
        return x + super().forward(x)


def task(data=None, targets=None):
    def error(outputs, wanted):
        return (outputs - wanted).square().flatten(1).mean(1)

    return Task(
        loss=lambda outputs, wanted: error(outputs, wanted).mean(),
        metric=lambda outputs, wanted: -error(outputs, wanted),
        train=None if data is None else [(data, targets)],
    )


def drop(program, sites="*", data=None, **options):
    with torch.no_grad():
        targets = None if data is None else program(data)
    context = Context(task=task(data, targets), original=program)
    return DropLayers(**options).apply(program, Sites.of(sites), context)


def stream(idle=1):
    """Four residual branches of a perceptron, of which `idle` adds nothing."""
    blocks = [Res(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(4)]
    model = zoo.shake(nn.Sequential(*blocks, nn.Linear(6, 3)), 1)
    with torch.no_grad():
        for parameter in blocks[idle].parameters():
            parameter.zero_()
    return model


def test_blocks_are_found_and_projections_stay():
    program = zoo.captured("resnet")
    context = Context(task=task(), original=program)
    outcome = DropLayers(importance="l2", ratio=0.5).apply(program, Sites(), context)
    assert outcome.figures["branches"] == [2, 1]
    assert set(outcome.figures["scores"]) == {"blocks.0", "blocks.2"}
    (gone,) = outcome.figures["dropped"]
    assert not [name for name, _ in outcome.program.tensors() if name.startswith(gone)]
    assert outcome.figures["macs"][1] < outcome.figures["macs"][0]


@pytest.mark.parametrize("importance", ["influence", "l1", "l2", "taylor", "loss"])
@pytest.mark.parametrize("idle", [0, 2])
def test_the_branch_that_adds_nothing_goes_first_and_nothing_changes(importance, idle, generator):
    x = torch.randn(16, 6, generator=generator)
    program = capture(stream(idle), x[:2])
    outcome = drop(program, data=x, importance=importance, count=1)
    assert outcome.figures["dropped"] == [str(idle)]
    scores = outcome.figures["scores"]
    assert abs(scores[str(idle)]) <= 4 * EPS
    assert all(score > 1e-4 for name, score in scores.items() if name != str(idle))
    assert torch.equal(outcome.program(x), program(x))
    assert f"{idle}.0.weight" not in outcome.program.state_dict()


def test_what_is_left_is_the_network_without_the_branch(generator):
    model = stream()
    x = torch.randn(16, 6, generator=generator)
    program = capture(model, x[:2])
    outcome = drop(program, drop=["0", "3"])
    with torch.no_grad():
        assert torch.equal(outcome.program(x), model[4](model[2](x)))  # branch 1 adds zero
    assert outcome.resolved["drop"] == ["0", "3"]


def test_units_go_together(generator):
    x = torch.randn(16, 6, generator=generator)
    program = capture(stream(2), x[:2])
    outcome = drop(program, data=x, unit=2, importance="l1")
    assert outcome.figures["dropped"] == ["2", "3"]


@pytest.mark.parametrize("importance", ["influence", "taylor", "l2"])
def test_units_stay_on_one_stream(importance, generator):
    """Branches of two stages, whose streams have other shapes, are no unit."""
    program = zoo.captured("resnet")
    x = torch.cat([program.example[0]] * 4)
    outcome = drop(program, data=x, unit=2, importance=importance)
    assert outcome.figures["dropped"] == [] and "of 0 units" in outcome.notes[0]
    with pytest.raises(RecipeError, match="0 units of 2") as caught:
        drop(program, data=x, unit=2, importance=importance, count=1)
    assert "to one stream" in str(caught.value.hint)


@pytest.mark.parametrize(("ratio", "gone"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.9, 3)])
def test_the_ratio_is_the_part_that_goes(ratio, gone):
    program = capture(stream(), torch.randn(2, 6))
    outcome = drop(program, importance="l2", ratio=ratio)
    assert len(outcome.figures["dropped"]) == gone
    assert bool(outcome.notes) == (gone == 0)


# linear replacement ---------------------------------------------------------------------------


@pytest.mark.parametrize("image", [False, True])
def test_a_linear_branch_is_replaced_exactly(image, generator):
    if image:
        body = [Res(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 3, 1)), nn.ReLU(), nn.Conv2d(3, 2, 1)]
        x = torch.randn(16, 3, 6, 6, generator=generator)
    else:
        body = [Res(nn.Linear(6, 24), nn.Linear(24, 6)), nn.ReLU(), nn.Linear(6, 2)]
        x = torch.randn(256, 6, generator=generator)
    model = zoo.shake(nn.Sequential(*body), 1)
    program = capture(model, x[:2])
    outcome = drop(program, data=x, count=1, replace="linear", samples=256)
    # a ridge of 1e-5 leaves its square; the residual is a difference of float32 moments
    assert outcome.figures["fit_error"]["0"] <= 64 * EPS
    with torch.no_grad():
        wanted, found = program(x), outcome.program(x)
        skipped = drop(program, data=x, count=1).program(x)
    assert (wanted - found).square().mean() <= 1e-6 * (wanted - skipped).square().mean()
    assert outcome.figures["macs"][1] < outcome.figures["macs"][0]
    assert outcome.program.tensor("0.linear.weight").requires_grad


def test_few_samples_and_constant_data_fall_back_in_words(generator):
    model = zoo.shake(nn.Sequential(Res(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6))), 1)
    x = torch.randn(4, 6, generator=generator)
    program = capture(model, x[:2])
    few = drop(program, data=x, count=1, replace="linear")
    assert any("4 calibration rows for 6 channels" in note for note in few.notes)
    assert bool(torch.isfinite(few.program(x)).all())
    zeros = drop(program, data=torch.zeros(64, 6), count=1, replace="linear")
    assert any("constant stream" in note for note in zeros.notes)
    assert torch.equal(zeros.program(x), x)


def test_a_stream_too_large_to_be_squared_gets_no_linear_map(generator):
    model = nn.Sequential(Res(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6)))
    x = 1e25 * torch.randn(64, 6, generator=generator)  # its square is beyond float32
    outcome = drop(capture(model, x[:2]), data=x, count=1, replace="linear", importance="l1")
    assert any("too large to be multiplied" in note for note in outcome.notes)
    assert torch.equal(outcome.program(x), x)


# shared weights -------------------------------------------------------------------------------


class Repeated(nn.Module):
    """One residual step, three times."""

    def __init__(self, times=3):
        super().__init__()
        self.times, self.step, self.head = times, nn.Linear(6, 6), nn.Linear(6, 3)

    def stream(self, x):
        found = [x]
        for _ in range(self.times):
            found.append(found[-1] + torch.tanh(self.step(found[-1])))
        return found

    def forward(self, x):
        return self.head(self.stream(x)[-1])


@pytest.mark.parametrize("importance", ["influence", "taylor", "loss"])
def test_a_use_of_shared_weights_goes_and_the_weights_stay(importance, generator):
    model = zoo.shake(Repeated(), 1)
    x = torch.randn(16, 6, generator=generator)
    program = capture(model, x[:2])
    outcome = drop(program, data=x, importance=importance, count=1)
    scores, dropped = outcome.figures["scores"], outcome.figures["dropped"]
    assert set(scores) == {"step", "step~2", "step~3"} and outcome.figures["branches"] == [3, 2]
    assert dropped == [min(scores, key=scores.__getitem__)]
    if importance == "influence":
        stream = model.stream(x)
        turned = [1 - nn.functional.cosine_similarity(a, b, -1).mean()
                  for a, b in zip(stream, stream[1:], strict=False)]  # fmt: skip
        assert list(scores.values()) == pytest.approx([one.item() for one in turned], rel=1e-4)
    model.times = 2
    with torch.no_grad():
        assert torch.equal(outcome.program(x), model(x))
    assert outcome.program.state_dict().keys() == program.state_dict().keys()
    before, after = outcome.figures["macs"]
    assert before - after == 36


def test_weights_go_with_their_last_use(generator):
    x = torch.randn(4, 6, generator=generator)
    model = zoo.shake(Repeated(), 1)
    outcome = drop(capture(model, x[:2]), drop=["step", "step~2", "step~3"])
    with torch.no_grad():
        assert torch.equal(outcome.program(x), model.head(x))
    assert set(outcome.program.state_dict()) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_norms_cannot_tell_uses_of_one_weight_apart(importance):
    with pytest.raises(RecipeError, match="shares all its weights with step:"):
        drop(capture(Repeated(), torch.randn(2, 6)), importance=importance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_albert_loses_depth(attention, generator):
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    model = transformers.AlbertModel._from_config(config, attn_implementation=attention)
    zoo.shake(model, 1)
    words = torch.randint(0, 50, (8, 7), generator=generator)
    program = capture(model, {"input_ids": words[:2]})
    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    with torch.no_grad():
        outcome = drop(program, data=words, unit=2, count=1)
        gone = list(outcome.figures["scores"]).index(" + ".join(outcome.figures["dropped"]))
        x = model.encoder.embedding_hidden_mapping_in(model.embeddings(words))
        for place in range(4):
            alone = layer.full_layer_layer_norm(layer.attention.LayerNorm(x))
            x = alone if place == gone else layer(x)
        found = outcome.program(words)["last_hidden_state"]
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
    assert outcome.figures["branches"] == [8, 6]
    before, after = outcome.figures["parameters"]
    assert before == after and outcome.figures["macs"][1] < outcome.figures["macs"][0]


# what is refused ------------------------------------------------------------------------------


def test_wrong_options_sites_and_data_are_refused(generator):
    program = capture(stream(), torch.randn(2, 6))
    with pytest.raises(RecipeError, match="count 5 is more than the 4 units"):
        drop(program, importance="l1", count=5)
    with pytest.raises(RecipeError, match="no residual branch is named '7'"):
        drop(program, drop=["7"])
    with pytest.raises(RecipeError, match="match nothing"):
        drop(program, "9", importance="l1")
    with pytest.raises(DataError):
        drop(program)


def test_a_network_without_streams_is_left_alone_in_words():
    program = zoo.captured("plain_cnn")
    outcome = DropLayers().apply(program, Sites(), Context(task=task(), original=program))
    assert outcome.figures["dropped"] == []
    assert "no residual branch" in outcome.notes[0]


# refit ------------------------------------------------------------------------------------------


class PostNorm(nn.Module):
    """Layers whose norm stands behind the sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.first = nn.LayerNorm(6)
        self.bodies = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)) for _ in range(3)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(self.stem(x))
        for body, norm in zip(self.bodies, self.norms, strict=True):
            x = norm(x + body(x))
        return self.head(x)


def error(program, other, x):
    with torch.no_grad():
        return float((program(x) - other(x)).square().mean())


@pytest.mark.parametrize("gone", [["1"], ["1", "2"], ["0"], ["0", "3"]])
def test_a_linear_branch_is_taken_over_by_the_one_before(gone, generator):
    """Stem and branches end in linear maps; what left was linear, so the fit is exact."""
    blocks = [Res(nn.Linear(6, 6)) for _ in range(4)]
    model = zoo.shake(nn.Sequential(nn.Linear(6, 6), *blocks, nn.Linear(6, 3)), 1)
    x = torch.randn(256, 6, generator=generator)
    program = capture(model, x[:2])
    names = [f"{int(name) + 1}.0" for name in gone]
    plain = drop(program, data=x, drop=names)
    refit = drop(program, data=x, drop=names, replace="refit", samples=256)
    assert refit.figures["macs"] == plain.figures["macs"]
    assert error(program, refit.program, x) <= 1e-6 * error(program, plain.program, x)
    assert refit.figures["fit_error"]


class Images(nn.Module):
    """Residual blocks of convolution and batch norm, an activation behind every sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
            )
            for _ in range(4)
        )  # fmt: skip
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("gone", [["blocks.2"], ["blocks.0", "blocks.1"], ["blocks.0", "blocks.3"]])
def test_blocks_of_a_resnet_make_up_for_those_that_left(gone, generator):
    model = zoo.shake(Images(), 5)
    x = torch.randn(64, 3, 8, 8, generator=generator)
    program = capture(model, x[:2])
    plain = drop(program, data=x, drop=gone)
    refit = drop(program, data=x, drop=gone, replace="refit", samples=64)
    assert error(program, refit.program, x) < 0.5 * error(program, plain.program, x)
    assert refit.figures["macs"] == plain.figures["macs"]
    activations = [n for n in refit.program.graph.nodes if "relu" in n.name]
    assert len(activations) == 1 + 2 * (4 - len(gone))


@pytest.mark.parametrize("gone", [["bodies.0"], ["bodies.1"], ["bodies.1", "bodies.2"]])
def test_the_norm_behind_what_left_takes_the_place_of_the_one_before(gone, generator):
    model = zoo.shake(PostNorm(), 3)
    x = torch.randn(256, 6, generator=generator)
    program = capture(model, x[:2])
    refit = drop(program, data=x, drop=gone, replace="refit", samples=256)
    plain = drop(program, data=x, drop=gone)
    assert error(program, refit.program, x) < error(program, plain.program, x)
    kept = [name for name, _ in refit.program.tensors() if name.startswith("norms.")]
    assert len(kept) == 2 * 3 - (2 * len(gone) if gone[0] != "bodies.0" else 0)


class Tapped(nn.Module):
    """The stream between two branches is an output as well."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Res(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in "abc")

    def forward(self, x):
        first = self.blocks[0](x)
        return first, self.blocks[2](self.blocks[1](first))


def test_a_stream_that_others_read_keeps_its_value(generator):
    model = zoo.shake(Tapped(), 2)
    x = torch.randn(64, 6, generator=generator)
    program = capture(model, x[:2])
    context = Context(task=Task(loss=None, metric=None, train=[x]), original=program)
    method = DropLayers(drop=["blocks.1"], replace="refit", samples=64)
    outcome = method.apply(program, Sites(), context)
    with torch.no_grad():
        (first, last), (told, found) = program(x), outcome.program(x)
        skipped = model.blocks[2](first)
    assert torch.equal(first, told)
    assert (last - found).square().mean() < (last - skipped).square().mean()
