"""prune.embeddings: seen ids give the same, unseen ones the fallback row, and bytes fall."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic import storage
from laconic.core.errors import DataError, RecipeError
from laconic.core.task import Task
from laconic.measuring.parity import parity
from laconic.methods.base import Context
from laconic.methods.prune.embeddings import PruneEmbeddings
from laconic.methods.quantize.static import QuantizeStatic
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.runtimes import get
from laconic.testing import zoo

WORDS, WIDTH = 60, 16
SEEN = torch.tensor([[3, 7, 7, 11, 42], [59, 3, 0, 12, 13]])
MORE = torch.tensor([[20, 21, 3, 3, 3]])


class Classifier(nn.Module):
    """Words and positions; the positions are looked up by number, not by an input's ids."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH, padding_idx=0), nn.Embedding(9, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, ids):
        places = self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(F.gelu(self.words(ids) + places).mean(1))


class Tied(nn.Module):
    """A language model whose output layer is its table, with a bias."""

    def __init__(self, bias=True):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS, bias=bias)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.words(ids))))


def setting(model, **splits):
    program = capture(zoo.shake(model), SEEN, dynamic="batch")
    splits = splits or {"train": [(SEEN, torch.zeros(2))]}
    task = Task(
        loss=lambda outputs, _: outputs.square().mean(),
        metric=lambda outputs, _: -outputs.square().flatten(1).mean(1),
        **splits,
    )
    return program, Context(task=task, original=program)


def prune(model, sites="*", data=None, **options):
    program, context = setting(model, **(data or {}))
    return program, PruneEmbeddings(**options).apply(program, Sites.of(sites), context)


def test_seen_ids_give_the_same_and_unseen_ones_the_mean_of_what_went():
    program, outcome = prune(Classifier())
    made, kept = outcome.program, SEEN.unique()
    with torch.no_grad():
        assert torch.equal(made(SEEN), program(SEEN))
        gone = torch.tensor([i for i in range(WORDS) if i not in kept])
        mean = program.tensor("words.weight")[gone].mean(0)
        stranger = program.clone()
        table = program.tensor("words.weight").detach().clone()
        table[gone] = mean
        stranger.set_tensor("words.weight", table)
        every = torch.arange(WORDS).view(-1, 5)
        assert torch.allclose(made(every), stranger(every), atol=1e-6)
    assert made.tensor("words.weight").shape == (len(kept) + 1, WIDTH)
    assert made.tensor("places.weight").shape == (9, WIDTH)
    assert outcome.figures["rows_removed"] == {"words.weight": len(gone)}
    assert any(f"{len(gone)} of {WORDS} rows went" in note for note in outcome.notes)
    assert torch.equal(outcome.changes["words.weight"][0], kept)


def test_bytes_fall_in_memory_and_in_the_file(tmp_path):
    program, outcome = prune(Classifier())
    before, after = outcome.figures["bytes"]
    rows = WORDS - outcome.program.tensor("words.weight").shape[0]
    assert before - after == 4 * (rows * WIDTH - WORDS)
    sizes = []
    for name, held in (("a", program), ("b", outcome.program)):
        storage.save(held, tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[1] < sizes[0]


def test_a_named_fallback_stays_and_stands_for_the_others():
    program, outcome = prune(Classifier(), fallback=1)
    made = outcome.program
    assert made.tensor("words.weight").shape[0] == len(SEEN.unique()) + 1  # 1 was never seen
    with torch.no_grad():
        unseen = torch.full((1, 5), 33)
        assert torch.equal(made(unseen), program(torch.ones_like(unseen)))


def test_the_chosen_splits_decide():
    data = {"train": [SEEN], "calibration": [MORE], "validation": [SEEN]}
    wanted = torch.cat([SEEN.flatten(), MORE.flatten()]).unique()
    _, every = prune(Classifier(), data=data)
    assert every.resolved["keep"]["words.weight"] == wanted.tolist()
    _, only = prune(Classifier(), data=data, splits=["calibration"])
    assert only.resolved["keep"]["words.weight"] == MORE.unique().tolist()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fallback", [None, 0])
def test_a_tied_output_layer_gives_the_kept_words_logits_and_a_constant_for_the_others(
    bias, fallback
):
    program, outcome = prune(Tied(bias), fallback=fallback)
    made, kept = outcome.program, SEEN.unique()
    with torch.no_grad():
        new, old = made(SEEN), program(SEEN)
    assert new.shape == old.shape
    assert torch.allclose(new[..., kept], old[..., kept], atol=1e-5)
    gone = torch.ones(WORDS, dtype=torch.bool)
    gone[kept] = False
    assert torch.equal(new[..., gone], torch.full_like(new[..., gone], -10_000.0))
    assert (new.softmax(-1)[..., gone] == 0).all()
    assert made.tensor("head.weight") is made.tensor("words.weight")
    assert outcome.figures["bytes"][1] < outcome.figures["bytes"][0]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("model", [Classifier, Tied])
def test_runtimes_give_what_the_program_gives(runtime, model, tmp_path):
    _, outcome = prune(model())
    engine, made = get(runtime), outcome.program
    path = engine.write(made, tmp_path / f"model{engine.suffix}")
    batches = [{"ids": SEEN}, {"ids": torch.tensor([[1, 2, 3, 4, 5]])}]
    report = parity(made, engine.load(path, threads=1).run, batches)
    assert report.ok, report.failures


@pytest.mark.parametrize("model", [Classifier, Tied])
def test_it_is_stored_trained_and_replayed(model, tmp_path):
    program, outcome = prune(model())
    storage.save(outcome.program, tmp_path / "m")
    _, context = setting(model(), train=[MORE])  # a replay looks at no data
    again = PruneEmbeddings(**outcome.resolved).apply(program, Sites(), context).program
    with torch.no_grad():
        wanted = outcome.program(SEEN)
        assert torch.equal(storage.load(tmp_path / "m")(SEEN), wanted)
        assert torch.equal(again(SEEN), wanted)
    trained = outcome.program.clone().train()
    trained(SEEN).square().mean().backward()
    assert float(trained.tensor("words.weight").grad.abs().sum()) > 0


def test_the_padding_row_takes_no_gradient_afterwards_either():
    _, outcome = prune(Classifier())
    made = outcome.program.clone().train()
    made(SEEN).square().sum().backward()
    gradient = made.tensor("words.weight").grad
    assert not gradient[0].any() and gradient[1].any()  # id 0 pads, it was seen: row 0


def test_nothing_to_remove_or_no_table_is_said():
    program, outcome = prune(Classifier(), data={"train": [torch.arange(WORDS).view(-1, 5)]})
    assert any("stays whole" in note for note in outcome.notes)
    assert outcome.program.tensor("words.weight").shape == program.tensor("words.weight").shape
    cnn = zoo.captured("plain_cnn")
    _, context = setting(Classifier())
    held = PruneEmbeddings().apply(cnn, Sites(), context)
    assert any("no table" in note for note in held.notes)


class Loose(nn.Module):
    """A table that is also read whole."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)

    def forward(self, ids):
        return self.words(ids) + self.words.weight.mean(0)


def test_a_table_with_other_readers_stays_with_the_reason():
    program, outcome = prune(Loose())
    assert any("aten.mean" in note and "words.weight" in note for note in outcome.notes)
    assert torch.equal(outcome.program(SEEN), program(SEEN))


def test_a_quantised_table_says_that_the_order_was_wrong():
    program, context = setting(Classifier())
    codes = QuantizeStatic().apply(program, Sites(), context).program
    outcome = PruneEmbeddings().apply(codes, Sites(), context)
    with torch.no_grad():
        assert torch.equal(outcome.program(SEEN), codes(SEEN))
    assert any("words.weight" in n and "before the one that wrote" in n for n in outcome.notes)


# Bad input ----------------------------------------------------------------------------------


def test_a_loader_that_is_used_up_costs_no_rows():
    program = capture(Classifier().eval(), SEEN)
    used = iter([])
    for data in ({"train": []}, {"train": [SEEN], "validation": used}):
        task = Task(loss=lambda o, t: o.sum(), metric=lambda o, t: o.sum(-1), **data)
        with pytest.raises(DataError, match="data are empty"):
            PruneEmbeddings().apply(program, Sites(), Context(task=task, original=program))


def test_bad_input_is_named():
    with pytest.raises(RecipeError, match=r"no\.such.*|match nothing"):
        prune(Classifier(), sites="no.such.table")
    with pytest.raises(RecipeError, match="places"):
        prune(Classifier(), sites="places.weight")
    with pytest.raises(RecipeError, match="fallback 60"):
        prune(Classifier(), fallback=WORDS)
    with pytest.raises(DataError, match="there are 60"):
        prune(Classifier(), data={"train": [SEEN + 1]})
    with pytest.raises(DataError, match="no validation"):
        prune(Classifier(), data={"train": [SEEN]}, splits=["validation"])
    with pytest.raises(RecipeError, match="0 to 59"):
        prune(Classifier(), keep={"words.weight": [60]})
    with pytest.raises(RecipeError, match="word"):
        prune(Classifier(), keep={"word.weight": [6]})
