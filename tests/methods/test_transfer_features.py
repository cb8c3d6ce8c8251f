"""transfer.features: where a network is cut, what stays, what the new head says."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from laconic.core.errors import DataError, RecipeError
from laconic.core.task import classification, language_modelling, regression
from laconic.methods.base import Context
from laconic.methods.transfer.features import TransferFeatures
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.solvers.teaching import heads, probes
from laconic.testing import zoo

EPS = torch.finfo(torch.float32).eps
QUICK = {"steps": 3, "evaluations": 1, "precision": "fp32"}


def net():
    """Three hidden layers; names of what they give: relu, relu_1, relu_2."""
    model = nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip
    return capture(zoo.shake(model, 1), (torch.randn(2, 6),))


def labelled(program, node=None, classes=3, count=256):
    """A task whose classes a linear map of `node` gives exactly, of the input without a node."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(3):
        x = torch.randn(count, 6, generator=generator)
        known = x
        if node is not None:
            program.propagate()
            with torch.no_grad():
                known = heads.cut_at(program, probes.spot_at(program, node)).run_flat(x)[0]
        found.append((x, known[:, :classes].argmax(1)))
    return classification(train=found[:2], validation=found[2:])


def extract(program, task, sites="*", seed=0, **options):
    context = Context(task=task, original=program, seed=seed)
    return TransferFeatures(**{**QUICK, **options}).apply(program, Sites.of(sites), context)


def test_the_cut_is_the_cheapest_within_the_tolerance():
    program = net()
    outcome = extract(program, labelled(program), tolerance=100.0)
    first = outcome.figures["probes"][0]
    assert outcome.figures["cut"] == first["node"] == "relu"
    scores = {row["node"]: row["score"] for row in outcome.figures["probes"]}
    best = max(scores, key=scores.__getitem__)
    assert extract(program, labelled(program), tolerance=0.0).figures["cut"] == best
    shares = [row["macs"] for row in outcome.figures["probes"]]
    total = 6 * 24 + 24 * 16 + 16 * 8 + 8 * 3
    assert shares == [144 / total, 528 / total, 656 / total]


def test_what_lies_behind_the_cut_is_gone():
    program = net()
    outcome = extract(program, labelled(program), node="relu")
    names = {name for name, _ in outcome.program.tensors()}
    assert names == {"0.weight", "0.bias", "head.weight", "head.bias"}
    assert outcome.figures["macs"] == [6 * 24 + 24 * 16 + 16 * 8 + 8 * 3, 6 * 24 + 24 * 3]


def test_a_frozen_body_stays_bit_for_bit_and_an_adapted_one_moves():
    model, inputs = zoo.make("resnet")
    program = capture(model, inputs)
    program.propagate()
    classes = program.output_node.all_input_nodes[0].meta["shape"][1]
    x = torch.randn(16, *inputs[0].shape[1:])
    task = classification(train=[(x, torch.arange(16) % classes)])
    frozen, moved = (extract(program, task, adapt=adapt) for adapt in (False, True))
    assert frozen.resolved["node"] == moved.resolved["node"]
    body = [name for name, _ in frozen.program.tensors() if not name.startswith("head")]
    assert all(torch.equal(frozen.program.tensor(n), program.tensor(n)) for n in body)
    assert not all(torch.equal(moved.program.tensor(n), program.tensor(n)) for n in body)
    assert any("scored on training data" in note for note in frozen.notes)


def test_another_task_has_its_own_outputs():
    program = net()
    task = labelled(program, classes=5)
    for hidden in (None, 12):
        outcome = extract(program, task, classes=5, hidden=hidden)
        assert outcome.program(torch.randn(4, 6)).shape == (4, 5)
    assert outcome.program.tensor("head.0.weight").shape[0] == 12
    with pytest.raises(DataError, match=r"label 4 in a task of 3 classes"):
        extract(program, task)


def test_the_closed_form_is_ridge_regression():
    program = net()
    task = labelled(program)
    outcome = extract(program, task, node="relu_1", fit=False)
    (row,) = outcome.figures["probes"]
    program.propagate()
    body = heads.cut_at(program, probes.spot_at(program, "relu_1"))
    with torch.no_grad():
        x = torch.cat([body.run_flat(batch)[0] for batch, _ in task.train]).double()
    y = nn.functional.one_hot(torch.cat([labels for _, labels in task.train]), 3).double()
    covariance = torch.cov(x.T, correction=0)
    covariance += row["ridge"] * covariance.diagonal().mean() * torch.eye(16)
    cross = (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)
    wanted = torch.linalg.solve(covariance, cross).T * outcome.figures["scale"]
    found = outcome.program.tensor("head.weight").double()
    # Rows are float32 when multiplied; no eigenvalue is above the trace, none below the ridge.
    assert torch.allclose(
        found, wanted, rtol=0, atol=16 * EPS / row["ridge"] * float(wanted.abs().max())
    )
    validation = task.validation[0]
    right = (outcome.program(validation[0]).argmax(1) == validation[1]).float().mean()
    assert row["score"] == pytest.approx(100 * float(right), abs=1e-4)


def test_a_head_that_is_trained_beats_its_start():
    program = net()
    task = labelled(program, "relu")
    outcome = extract(program, task, node="relu", steps=60, lr=0.05, evaluations=3)
    assert outcome.figures["score"] >= outcome.figures["probes"][0]["score"]


class Masked(nn.Module):
    """Tokens, of which some are padding, to one answer."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.up, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, ids, attention_mask):
        x = torch.relu(self.up(self.norm(self.table(ids))))
        return self.head(x[:, 0] * attention_mask.sum(1, keepdim=True))


def test_padded_tokens_do_not_count():
    ids = torch.randint(0, 11, (2, 5))
    program = capture(
        zoo.shake(Masked(), 1),
        {"ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic=("batch", "sequence"),
    )
    program.propagate()
    body = heads.cut_at(program, probes.spot_at(program, "relu"))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        one = body.run_flat(ids, mask)[0]
        other = body.run_flat(ids.masked_fill(mask == 0, 7), mask)[0]
        alone = body.run_flat(ids[:1, :3], mask[:1, :3])[0]
    assert torch.equal(one, other)
    assert torch.allclose(one[:1], alone, rtol=0, atol=10 * EPS * float(alone.abs().max()))


def test_numbers_are_regressed_on():
    program = net()
    x = torch.randn(256, 6)
    task = regression(train=[(x, torch.stack([x[:, 0], x[:, 1], x[:, 2]], 1))])
    outcome = extract(program, task, fit=False)
    assert outcome.figures["scale"] == 1.0  # least squares is the best scale of its own loss
    assert outcome.figures["cut"] == min(
        outcome.figures["probes"], key=lambda row: (row["score"] > 1.0 + min(
            r["score"] for r in outcome.figures["probes"]), row["macs"])
    )["node"]  # fmt: skip


def test_what_cannot_be_done_is_refused():
    program = net()
    task = labelled(program)
    with pytest.raises(RecipeError, match="relu_1"):
        extract(program, task, node="relu1")
    with pytest.raises(RecipeError, match="output itself"):
        extract(program, task, node="linear_3")
    with pytest.raises(RecipeError, match="takes 0.2"):
        extract(program, task, macs=0.01)
    with pytest.raises(DataError, match="no labels"):
        extract(program, classification(train=[(torch.randn(4, 6), None)]))
    with pytest.raises(RecipeError, match="match nothing"):
        extract(program, task, sites="nowhere")
    with pytest.raises(ValueError, match="need training"):
        TransferFeatures(fit=False, hidden=3)


def test_what_cannot_be_pooled_says_why():
    model, inputs = zoo.make("fused_split")
    program = capture(model, inputs)
    task = classification(train=[(torch.randn(2, *inputs[0].shape[1:]), torch.zeros(2).long())])
    with pytest.raises(RecipeError, match="which dimension"):
        extract(program, task, node="matmul")
    with pytest.raises(RecipeError, match="not one float tensor"):
        extract(program, task, node="split")


def test_answers_for_every_token_are_refused():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

        def forward(self, ids):
            return self.head(torch.relu(self.table(ids)))

    ids = torch.randint(0, 11, (2, 5))
    program = capture(zoo.shake(Tokens(), 1), (ids,), dynamic=("batch", "sequence"))
    with pytest.raises(RecipeError, match="one answer for each sample"):
        extract(program, language_modelling(train=[(ids, ids)]))


def test_validation_data_without_labels_are_not_asked():
    program = net()
    task = labelled(program)
    bare = replace(task, validation=[(x, None) for x, _ in task.validation])
    made = extract(program, bare, node="relu_1")
    assert any("no labelled validation data" in note for note in made.notes)
    without = extract(program, replace(task, validation=None), node="relu_1")
    assert made.figures["probes"] == without.figures["probes"]
    assert made.figures["scale"] == without.figures["scale"]
