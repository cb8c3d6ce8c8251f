"""Exits and cascades: what they give, what they promise, what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import laconic
from laconic.core.errors import DataError, RecipeError, TrainingError
from laconic.core.task import classification, embedding, regression
from laconic.methods.base import Context
from laconic.methods.dynamic.cascade import Cascade
from laconic.methods.dynamic.early_exit import EarlyExit
from laconic.program import chain
from laconic.program.capture import capture
from laconic.program.choices import choices
from laconic.program.sites import Sites
from laconic.solvers.dynamic import exits
from laconic.solvers.dynamic.confidence import NEVER

SIZE, CLASSES = 12, 3


class Deep(nn.Module):
    """Residual blocks on points of the plane; the task is easy far from the borders."""

    def __init__(self, blocks=4, width=SIZE):
        super().__init__()
        self.stem = nn.Linear(2, width)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
             for _ in range(blocks)]
        )  # fmt: skip
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.out(x)


def points(count, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=draw) * 2
    angle = torch.atan2(x[:, 1], x[:, 0]) + 0.3 * x.norm(dim=1)
    label = ((angle % (2 * torch.pi)) / (2 * torch.pi) * CLASSES).long().clamp(max=CLASSES - 1)
    return x, label


def loader(count, seed):
    x, y = points(count, seed)
    return list(zip(x.split(250), y.split(250), strict=True))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    models = {}
    for name, model in (("deep", Deep()), ("shallow", Deep(blocks=1, width=8))):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(12 if name == "deep" else 4):
            for x, y in loader(2000, 1):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        models[name] = capture(model.eval(), (torch.randn(2, 2),))
    return models


@pytest.fixture(scope="module")
def task():
    return classification(train=loader(2000, 1), validation=loader(4000, 2), test=loader(4000, 3))


def context_of(program, task, **more):
    return Context(task=task, original=program, **more)


@pytest.fixture(scope="module")
def outcome(trained, task):
    program = trained["deep"]
    method = EarlyExit(steps=60, exits=2, size=0.1, max_drop=1.0, lr=0.02)
    return method.apply(program, Sites(), context_of(program, task))


def accuracy(predict, task, split):
    right = [(torch.as_tensor(predict(x)).argmax(1) == y).float() for x, y in getattr(task, split)]
    return 100 * float(torch.cat(right).mean())


def test_samples_leave_and_the_promise_is_kept_on_data_nobody_looked_at(outcome, trained, task):
    figures = outcome.figures
    assert sum(figures["leaving"]) == pytest.approx(1)
    assert figures["leaving"][-1] < 0.9
    assert figures["expected_cost"] < 1
    assert figures["bound"] <= figures["promised"] == 1.0
    assert figures["tested_on"] == 4000 - round(4000 / 3)
    with torch.no_grad():
        before = accuracy(trained["deep"], task, "test")
        after = accuracy(outcome.program, task, "test")
    assert before - after <= 1.0  # the seeds are fixed, so this holds always or never


def test_rows_get_the_answer_of_where_they_leave(outcome):
    made = outcome.program
    assert len(choices(made)) == sum(limit >= 0 for limit in outcome.resolved["limits"])
    x, _ = points(500, 9)
    held = chain.split(made)
    assert held.decides
    with torch.no_grad():
        wanted = made(x).numpy()
    np.testing.assert_allclose(held.run([x.numpy()])[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_limit_that_nobody_meets_changes_no_output(trained, task):
    program = trained["deep"]
    made = EarlyExit(steps=1, exits=2, limits=0.0).apply(
        program, Sites(), context_of(program, task)
    )
    x, _ = points(200, 5)
    with torch.no_grad():
        assert torch.equal(made.program(x), program(x))


def test_a_limit_that_everybody_meets_gives_the_exit_alone(trained, task):
    program = trained["deep"]
    program.propagate()
    (end,) = [node.name for node in program.graph.nodes if node.name == "add_1"]
    made = EarlyExit(steps=3, at=[end], limits=99.0, depth=0).apply(
        program, Sites(), context_of(program, task)
    )
    x, _ = points(100, 5)
    seen = []
    pieces = chain.split(made.program)
    plain = [chain._eager(piece) for piece in pieces.pieces]
    watched = [lambda a, run=run, i=i: (seen.append(i), run(a))[1] for i, run in enumerate(plain)]
    found = chain.execute(pieces.plan, [x.numpy()], watched)
    assert len(seen) == 1  # the rest of the network never runs
    weight, bias = (made.program.tensor(f"exits.0.out.{k}").detach() for k in ("weight", "bias"))
    with torch.no_grad():
        value = program.tensor("stem.weight") @ x.T
        value = value.T + program.tensor("stem.bias")
        for block in range(2):
            names = [f"blocks.{block}.{layer}.{k}" for layer in (0, 2) for k in ("weight", "bias")]
            w, b, v, c = (program.tensor(name) for name in names)
            value = value.relu() if block else value
            value = value + (value @ w.T + b).relu() @ v.T + c
        torch.testing.assert_close(torch.from_numpy(found[0]), value @ weight.T + bias)


def test_too_few_samples_promise_nothing_and_change_nothing(trained, task):
    program = trained["deep"]
    few = classification(train=task.train[:1], validation=task.validation[:1])
    made = EarlyExit(steps=1, max_drop=0.3).apply(program, Sites(), context_of(program, few))
    assert "cannot certify 0.3 points at 95 % confidence" in made.notes[-1]
    x, y = task.validation[0]
    one = classification(train=task.train[:1], validation=[(x[:1], y[:1])])
    with pytest.raises(DataError, match="1 validation samples; limits are chosen on some"):
        EarlyExit(steps=1).apply(program, Sites(), context_of(program, one))
    assert made.resolved["limits"] == [NEVER, NEVER]
    assert not choices(made.program)


def test_without_labelled_validation_data_nothing_is_promised(trained, task):
    program = trained["deep"]
    without = classification(train=task.train)
    with pytest.raises(DataError, match="no validation data"):
        EarlyExit(steps=1).apply(program, Sites(), context_of(program, without))
    bare = classification(train=[], validation=[(x, None) for x, _ in task.validation])
    with pytest.raises(DataError, match="no targets"):  # before anything is trained
        EarlyExit(steps=1).apply(program, Sites(), context_of(program, bare))


def test_the_network_is_trained_along_if_asked(trained, task):
    program = trained["deep"]
    made = EarlyExit(steps=2, backbone="trained", limits=0.1, exits=1).apply(
        program, Sites(), context_of(program, task)
    )
    assert not torch.equal(made.program.tensor("stem.weight"), program.tensor("stem.weight"))
    frozen = EarlyExit(steps=2, limits=0.1, exits=1).apply(
        program, Sites(), context_of(program, task)
    )
    assert torch.equal(frozen.program.tensor("stem.weight"), program.tensor("stem.weight"))


def test_labels_alone_need_nothing_that_lies_behind_the_exits(trained, task):
    program = trained["deep"].clone()
    name = [name for name, _ in program.tensors()][-1]
    program.set_tensor(name, torch.full_like(program.tensor(name), torch.nan))
    options = {"steps": 3, "exits": 1, "limits": 99.0}  # everybody leaves
    x, _ = points(100, 5)
    made = EarlyExit(alpha=0, **options).apply(program, Sites(), context_of(program, task))
    with torch.no_grad():
        assert made.program(x).isfinite().all()
    with pytest.raises(TrainingError):
        EarlyExit(**options).apply(program, Sites(), context_of(program, task))


@pytest.mark.parametrize("backbone", ["frozen", "trained"])
def test_without_labels_and_teacher_there_is_nothing_to_learn(trained, backbone):
    task = classification(train=[(x, None) for x, _ in loader(500, 1)])
    method = EarlyExit(steps=1, alpha=0, backbone=backbone, limits=0.1, measure="max")
    with pytest.raises(DataError, match="alpha above 0"):
        method.apply(trained["deep"], Sites(), context_of(trained["deep"], task))


def test_places_are_the_ends_of_blocks_and_spread_over_the_work(trained):
    program = trained["deep"].clone()
    program.propagate()
    found = exits.places(program)
    nodes = {node.name: node for node in program.graph.nodes}
    streams = [nodes[place.node] for place in found if place.node.startswith("relu")]
    assert all(node.all_input_nodes[0].name.startswith("add") for node in streams)
    assert len(streams) >= 3  # the first and the last may lie beyond 5 % and 95 %
    shares = [place.share for place in exits.spread(found, 3)]
    assert shares == sorted(shares)
    assert max(abs(share - (i + 1) / 4) for i, share in enumerate(shares)) < 0.15


def test_what_has_no_confidence_is_refused(trained, task):
    program = trained["deep"]
    for other in (regression(train=task.train), embedding(train=task.train)):
        for method in (EarlyExit(), Cascade()):
            with pytest.raises(RecipeError, match="no confidence to leave by"):
                method.apply(program, Sites(), context_of(program, other))


class Named(nn.Module):
    """What a network gives, with what it saw."""

    def __init__(self, network, seen=lambda x: x.square()):
        super().__init__()
        self.network, self.seen = network, seen

    def forward(self, x):
        logits = self.network(x)
        return {"features": self.seen(logits), "logits": logits}


def named_pair(**options):
    torch.manual_seed(1)
    x = points(40, 5)[0]
    pair = [Named(Deep(1, 8), **options).eval(), Named(Deep(4), **options).eval()]
    return *pair, *(capture(model, x[:2]) for model in pair), x


def test_a_cascade_takes_all_outputs_of_a_sample_from_one_model(task):
    small, large, *programs, x = named_pair()
    with torch.no_grad():
        first, second = small(x), large(x)
        doubt = -first["logits"].log_softmax(-1).amax(-1)
        limit = doubt.median().item()
        context = context_of(programs[1], task)
        made = Cascade(limit=limit).apply(programs[0], Sites(), context).program
        found = made(x)
    sure = (doubt <= limit)[:, None]
    assert found.keys() == first.keys() and 0 < sure.sum() < len(x)
    for name in found:
        torch.testing.assert_close(found[name], torch.where(sure, first[name], second[name]))
    pieces = chain.split(made)
    assert len(pieces.pieces) > 1 and len(choices(made)) == 2
    for ours, theirs in zip(pieces.run([x.numpy()]), found.values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=1e-4, atol=1e-5)


def test_the_limit_of_several_outputs_is_that_of_the_scores_alone(task):
    small, large, *programs, x = named_pair()
    alone = [capture(model.network, x[:2]) for model in (small, large)]
    many, one = (
        Cascade(max_drop=50.0).apply(a, Sites(), context_of(b, task)) for a, b in (programs, alone)
    )
    assert many.resolved == one.resolved and many.figures["leaving"] == one.figures["leaving"]
    assert many.figures["leaving"][0] > 0


def test_several_outputs_are_refused_where_it_is_unclear(task):
    _, _, small, large, _ = named_pair()
    with pytest.raises(RecipeError, match="no value for the others"):
        EarlyExit().apply(large, Sites(), context_of(large, task))
    unclear = replace(task, logits=lambda outputs: outputs["logits"] * 2)
    with pytest.raises(RecipeError, match="unclear which holds class scores"):
        Cascade().apply(small, Sites(), context_of(large, unclear))
    _, _, small, large, _ = named_pair(seen=lambda x: x.square().mean())
    with pytest.raises(RecipeError, match="not all have the batch in front"):
        Cascade().apply(small, Sites(), context_of(large, task))


class Words(nn.Module):
    """Two layers on tokens and their mean: [batch, 5, 4], mask [batch, 5] -> [batch, 3]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x, mask):
        for layer in self.layers:
            x = x + layer(x).tanh()
        real = mask.unsqueeze(-1).to(x.dtype)
        return self.out((x * real).sum(1) / real.sum(1))


@pytest.mark.parametrize("backbone", ["frozen", "trained"])
def test_padding_does_not_speak_at_an_exit(backbone):
    x = torch.randn(6, 5, 4)
    mask = (torch.arange(5) < torch.tensor([5, 1, 2, 3, 4, 3])[:, None]).long()
    program = capture(Words().eval(), {"x": x[:2], "mask": mask[:2]})
    task = classification(train=[({"x": x, "mask": mask}, torch.arange(6) % CLASSES)])
    method = EarlyExit(at=["layers.0"], steps=2, limits=100.0, backbone=backbone)
    made = method.apply(program, Sites(), context_of(program, task)).program
    other = torch.where(mask.bool().unsqueeze(-1), x, 7.0)
    assert torch.equal(made(x, mask), made(other, mask))
    assert not torch.equal(made(x, mask), made(x, torch.ones_like(mask)))


def test_a_value_that_cannot_be_pooled_is_named(trained, task):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(2, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.one(x).relu()
            return self.two(x * (x > 0).sum(1, keepdim=True).clamp(min=1).reciprocal())

    program = capture(Counting().eval(), (torch.randn(2, 2),))
    names = [n.name for n in program.graph.nodes if n.name.startswith(("sum", "gt"))]
    for name in names:
        with pytest.raises(RecipeError, match=r"can be pooled: .*expected float"):
            EarlyExit(at=[name]).apply(program, Sites(), context_of(program, task))
    with pytest.raises(RecipeError, match=r"'block\.1'.*blocks\.1"):
        deep = trained["deep"]
        EarlyExit(at=["block.1"]).apply(deep, Sites(), context_of(deep, task))
    with pytest.raises(RecipeError, match="2 limits for 1 exits"):
        EarlyExit(exits=1, limits=[0.1, 0.2]).apply(
            trained["deep"], Sites(), context_of(trained["deep"], task)
        )


def test_a_cascade_asks_the_large_model_about_the_rest(trained, task, tmp_path):
    small, large = trained["shallow"], trained["deep"]
    made = Cascade(max_drop=1.0).apply(small, Sites(), context_of(large, task))
    assert made.figures["bound"] <= 1.0
    assert 0 < made.figures["leaving"][0] < 1
    x, _ = points(400, 7)
    limit = made.program.tensor("cascade.limit")
    with torch.no_grad():
        sure = -small(x).log_softmax(-1).amax(-1) <= limit
        wanted = torch.where(sure[:, None], small(x), large(x))
        assert 0 < int(sure.sum()) < len(x)
        torch.testing.assert_close(made.program(x), wanted)
    pieces = chain.split(made.program)
    np.testing.assert_allclose(pieces.run([x.numpy()])[0], wanted, rtol=1e-5, atol=1e-6)
    laconic.save(small, tmp_path / "small.laconic")
    by_file = Cascade(small=str(tmp_path / "small.laconic"), limit=float(limit))
    again = by_file.apply(large, Sites(), context_of(large, task))
    with torch.no_grad():
        torch.testing.assert_close(again.program(x), wanted)
    assert again.program.tensor("stem.weight").shape == large.tensor("stem.weight").shape


def test_models_that_do_not_answer_the_same_question_make_no_cascade(trained, task):
    other = capture(nn.Linear(2, CLASSES + 1).eval(), (torch.randn(2, 2),))
    with pytest.raises(RecipeError, match=r"gives .*4.*, the large one .*3"):
        Cascade().apply(other, Sites(), context_of(trained["deep"], task))
    taller = capture(nn.Linear(5, CLASSES).eval(), (torch.randn(2, 5),))
    with pytest.raises(RecipeError, match=r"takes .*5.*, the large one .*2"):
        Cascade().apply(taller, Sites(), context_of(trained["deep"], task))
