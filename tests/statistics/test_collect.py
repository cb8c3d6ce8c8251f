import pytest
import torch
from torch import nn

from laconic.core.errors import DataError, RecipeError
from laconic.core.task import classification
from laconic.program.capture import capture
from laconic.statistics.batches import Batches, padding_mask
from laconic.statistics.collect import collect
from laconic.statistics.histogram import Histogram
from laconic.statistics.min_max import MinMax
from laconic.statistics.moments import Moments


def small():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )
    return model.eval(), capture(model, torch.randn(2, 3, 6, 6))


def node_of(program, word):
    return next(n.name for n in program.graph.nodes if word in str(n.target))


def test_collect_sees_what_the_model_computes():
    model, program = small()
    data = [torch.randn(n, 3, 6, 6) for n in (4, 3)]
    relu, linear = node_of(program, "relu"), node_of(program, "linear")
    found = collect(
        program,
        [(x,) for x in data],
        {
            "relu": (relu, "output", MinMax(axis=1)),
            "in": (linear, "input 0", Moments()),
            "out": (linear, "output", Histogram()),
        },
    )
    x = torch.cat(data)
    hidden = model[2](model[1](model[0](x))).detach()
    assert torch.allclose(found["relu"].maximum, hidden.amax((0, 2, 3)), atol=1e-6)
    assert found["in"].count == hidden.numel()
    assert abs(float(found["in"].mean) - float(hidden.double().mean())) < 1e-6
    out = model(x).detach()
    assert found["out"].total == out.numel()
    assert abs(found["out"].minimum - float(out.min())) < 1e-6


def test_one_pass_stops_after_the_last_node_needed():
    _, program = small()
    linear = next(n for n in program.graph.nodes if "linear" in str(n.target))
    calls = []
    true_linear = linear.target
    linear.target = lambda *a: calls.append(1) or true_linear(*a)
    collect(
        program, [(torch.randn(2, 3, 6, 6),)], {0: (node_of(program, "conv2d"), "output", MinMax())}
    )
    assert not calls


def test_two_halves_merged_are_the_whole():
    _, program = small()
    data = [(torch.randn(3, 3, 6, 6),) for _ in range(4)]
    name = node_of(program, "conv2d")

    def run(batches):
        requests = {
            "m": (name, "output", MinMax(1)),
            "h": (name, "output", Histogram(64)),
            "v": (name, "output", Moments(1)),
        }
        return collect(program, batches, requests)

    whole, left, right = run(data), run(data[:1]), run(data[1:])
    for key in whole:
        left[key].merge(right[key])
    assert torch.equal(whole["m"].minimum, left["m"].minimum)
    assert torch.equal(whole["h"].counts, left["h"].counts)
    assert torch.allclose(whole["v"].variance, left["v"].variance, rtol=1e-12)


def test_a_training_program_is_observed_in_eval_mode_and_left_alone():
    _, program = small()
    name = node_of(program, "batch_norm")
    x = torch.randn(4, 3, 6, 6)
    before = collect(program, [(x,)], {0: (name, "output", MinMax())})[0]
    program.train()
    mean = program.tensor("1.running_mean").clone()
    after = collect(program, [(x,)], {0: (name, "output", MinMax())})[0]
    assert program.training
    assert torch.equal(mean, program.tensor("1.running_mean"))
    assert torch.equal(before.maximum, after.maximum)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (("nowhere", "output"), RecipeError, "no node named"),
        (("conv2d", "input 9"), RecipeError, "input 9"),
        (("conv2d", "inputs"), RecipeError, "neither"),
    ],
)
def test_wrong_requests_are_named(request_, error, words):
    _, program = small()
    with pytest.raises(error, match=words):
        collect(program, [(torch.randn(2, 3, 6, 6),)], {0: (*request_, MinMax())})


def test_no_batch_and_nan_are_errors_that_name_the_place():
    _, program = small()
    name = node_of(program, "conv2d")
    with pytest.raises(DataError, match="no batch"):
        collect(program, [], {0: (name, "output", MinMax())})
    with pytest.raises(DataError, match=f"{name} input 0"):
        collect(program, [(torch.full((2, 3, 6, 6), torch.nan),)], {0: (name, "input 0", MinMax())})


def test_batches_cut_split_and_check():
    _, program = small()
    images = torch.randn(10, 3, 6, 6)
    pairs = [(images[:6], torch.zeros(6)), (images[6:], torch.zeros(4))]
    task = classification(calibration=pairs)
    sizes = [flat[0].shape[0] for flat in Batches(program, task, samples=8)]
    assert sizes == [6, 2]
    parts = [flat[0] for flat in Batches(program, task, size=4)]
    assert [len(p) for p in parts] == [4, 2, 4]
    assert torch.equal(torch.cat(parts), images)
    with pytest.raises(DataError, match="empty"):
        list(Batches(program, classification(calibration=[])))
    with pytest.raises(DataError, match=r"calibration batch 0.*\['batch', 3, 6, 6\]"):
        list(Batches(program, classification(calibration=[torch.randn(2, 3, 5, 5)])))
    with pytest.raises(DataError, match="3 of 108 values are NaN"):
        bad = images[:1].clone()
        bad.view(-1)[:3] = torch.nan
        list(Batches(program, classification(calibration=[bad])))
    with pytest.raises(DataError, match="expected torch.float32"):
        list(Batches(program, classification(calibration=[images.long()])))
    with pytest.raises(DataError, match="no calibration or train data"):
        list(Batches(program, classification()))


class Masked(nn.Module):
    """Tokens of which some are padding; attention in heads, so that shapes differ."""

    def __init__(self):
        super().__init__()
        self.inner, self.heads = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, tokens, attention_mask):
        x = torch.relu(self.inner(tokens))
        queries = self.heads(x).unflatten(-1, (2, 3)).transpose(1, 2) * 2
        x = queries.transpose(1, 2).flatten(2) * attention_mask[..., None]
        return x.sum(1)


def test_padded_places_do_not_count():
    torch.manual_seed(0)
    lengths = (5, 2, 3)
    texts = [torch.randn(1, length, 4) for length in lengths]
    whole = torch.full((3, 5, 4), 1e3)
    mask = torch.zeros(3, 5, dtype=torch.int64)
    for row, text in enumerate(texts):
        whole[row, : text.shape[1]], mask[row, : text.shape[1]] = text[0], 1
    program = capture(Masked().eval(), (whole, mask), dynamic=("batch", "sequence"))
    names = {word: node_of(program, word) for word in ("relu", "mul", "linear")}

    def run(batches):
        requests = {
            "range": (names["relu"], "output", MinMax()),
            "channels": (names["linear"], "output", Moments(-1)),
            "heads": (names["mul"], "output", Histogram(64)),
            "input": (names["linear"], "input 0", MinMax(-1)),
        }
        return collect(program, batches, requests)

    padded = run([(whole, mask)])
    plain = run([(text, torch.ones(text.shape[:2], dtype=torch.int64)) for text in texts])
    assert padded["range"].maximum == plain["range"].maximum < 100
    torch.testing.assert_close(padded["channels"].mean, plain["channels"].mean)
    assert padded["channels"].count == plain["channels"].count == sum(lengths)
    assert torch.equal(padded["heads"].counts, plain["heads"].counts)
    assert torch.equal(padded["input"].maximum, plain["input"].maximum)


def test_without_padding_everything_counts():
    program = capture(Masked().eval(), (torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.long)))
    flat = (torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.int64))
    name = node_of(program, "relu")
    found = collect(program, [flat], {0: (name, "output", Histogram(64))})[0]
    assert found.total == 2 * 5 * 6
    assert bool(padding_mask(program, flat).all())
    _, plain = small()
    assert padding_mask(plain, (torch.randn(3, 3, 6, 6),)) is None
