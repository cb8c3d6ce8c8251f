"""quantize.rotate: the function stays, outliers go, and what cannot be rotated is named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.core.errors import RecipeError
from laconic.core.task import Task
from laconic.methods.base import Context
from laconic.methods.prune.magnitude import Magnitude
from laconic.methods.quantize.rotate import QuantizeRotate
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.program.sites import Sites
from laconic.testing import zoo
from laconic.testing.contracts import own_outputs

EXACT = {"rtol": 0, "atol": 1e-10}
"""float64 rotated and back: a few hundred products of ordinary size, 1e-13 in practice."""
SINGLE = {"rtol": 0, "atol": 1e-4}
"""Llama's norms compute in float32, whatever the rest does: 1e-7 a layer, times its gain."""


def rotate(program, sites="*", **options):
    needless = options == {"judge": False}  # no data are asked for
    task = Task(loss=min, metric=min) if needless else own_outputs(program)
    context = Context(task=task, original=program)
    return QuantizeRotate(**options).apply(program, Sites.of(sites), context)


def same(one, other, tolerance=EXACT):
    with torch.no_grad():
        for a, b in zip(one.run_flat(*one.example), other.run_flat(*one.example), strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture(scope="module")
def rotated_zoo():
    """Zoo transformers in float64 → program and outcome, every axis that can be is rotated."""
    names = ("fused_view", "rotary", "tied_language_model", "learned_queries")
    made = {}
    for name in names:
        model, inputs = zoo.make(name)
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        program = capture(model.double(), inputs)
        made[name] = program, rotate(program, judge=False)
    return made


def test_rotated_is_unrotated(rotated_zoo):
    for name, (program, outcome) in rotated_zoo.items():
        assert outcome.figures["rotated"], name
        changed = outcome.program
        moved = [n for n, t in program.tensors() if not torch.equal(t, changed.tensor(n))]
        assert moved, name
        same(program, changed)


def test_the_graph_stays(rotated_zoo):
    program, outcome = rotated_zoo["rotary"]
    ours = [node.target for node in outcome.program.graph.nodes if node.op == "call_function"]
    assert ours == [node.target for node in program.graph.nodes if node.op == "call_function"]


def test_what_is_in_the_way_is_named(rotated_zoo):
    notes = {name: "\n".join(outcome.notes) for name, (_, outcome) in rotated_zoo.items()}
    assert "gelu gelu is not known to keep a rotation" in notes["fused_view"]
    assert "cos cos in attention" in notes["rotary"]
    assert "reads it besides layers" in notes["tied_language_model"]
    assert "treats every index of it for itself" in notes["fused_view"]


def transformer(kind):
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(10).reshape(2, 5) * 7 % 40
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 40}  # fmt: skip
    words = size | {"vocab_size": 40}
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            **words, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False
        )
        return transformers.LlamaForCausalLM(config), (ids,)
    if kind == "bert":
        config = transformers.BertConfig(**words)
        return transformers.BertForSequenceClassification(config), (ids,)
    config = transformers.ViTConfig(**size, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config), (torch.randn(2, 3, 16, 16).double(),)


@pytest.mark.parametrize(
    ("kind", "stream", "heads"), [("llama", 1, 2), ("bert", 0, 4), ("vit", 1, 4)]
)
def test_transformers(kind, stream, heads):
    """Llama (tied, RMS norm, grouped heads), BERT (norms behind the sums), ViT (norms in front)."""
    model, inputs = transformer(kind)
    program = capture(zoo.shake(model).double(), inputs)
    outcome = rotate(program, judge=False)
    rotated = outcome.figures["rotated"]
    assert sum(name.endswith("head_dim") for name in rotated) == heads
    assert sum(not name.endswith("head_dim") for name in rotated) == stream
    same(program, outcome.program, SINGLE if kind == "llama" else EXACT)
    if kind == "llama":
        assert any("no longer shares its weight" in note for note in outcome.notes)
        assert not outcome.program.aliases


GRIDS = {"bits": 8, "activation_bits": 4}
"""An outlier of activations stretches the grid of the others; the weights are fine."""


class Outlier(nn.Module):
    """Two linear layers in a row; one channel between them is far from zero."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.one.bias[3] += 100

    def forward(self, x):
        return self.two(self.one(self.norm(F.relu(x))))


@pytest.fixture(scope="module")
def outlier():
    torch.manual_seed(0)
    return capture(Outlier().eval(), torch.randn(2, 6, 8))


def test_an_outlier_is_spread_and_the_error_falls(outlier):
    outcome = rotate(outlier, **GRIDS)
    assert outcome.figures["rotated"] == ["one.out"]
    before, after = outcome.figures["judged"]
    assert after < before
    assert outcome.program.tensor("one.bias").abs().max() < 30  # 100 / 4, and what was there
    same(outlier, outcome.program, {"rtol": 1e-4, "atol": 1e-4})  # float32


def test_learning_only_ever_helps(outlier):
    before, after = rotate(
        outlier, judge=False, steps=30, bits=3, first_last=None, activation_bits=None
    ).figures["learned"]
    assert after < before


def test_the_task_s_loss_can_be_learned_on(outlier):
    outcome = rotate(outlier, steps=4, loss="task", **GRIDS)
    before, after = outcome.figures["learned"]
    assert after <= before
    same(outlier, outcome.program, {"rtol": 1e-4, "atol": 1e-4})


def test_kept_groups_have_to_be_there(outlier):
    with pytest.raises(RecipeError, match="no group nowhere"):
        rotate(outlier, kept=("nowhere",))


def test_pruned_zeros_are_not_filled(outlier):
    context = Context(task=own_outputs(outlier), original=outlier)
    pruned = Magnitude(ratio=0.5).apply(outlier, Sites(), context)
    outcome = rotate(pruned.program, judge=False)
    assert not outcome.figures["rotated"]
    assert any("pruned weights" in note for note in outcome.notes)


def test_every_group_is_either_rotated_or_said_why(outlier):
    outcome = rotate(outlier, judge=False)
    named = {note.partition(" keeps")[0] for note in outcome.notes} | set(
        outcome.figures["rotated"]
    )
    assert {group.name for group in groups(outlier)} <= named
