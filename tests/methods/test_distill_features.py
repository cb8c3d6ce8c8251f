"""distill.features: any two Programs, matched nodes, projections that leave no trace."""

import pytest
import torch
from torch import nn

from laconic import storage
from laconic.core.errors import RecipeError
from laconic.core.task import classification
from laconic.methods.base import Context, method_of
from laconic.methods.distill.features import Features
from laconic.program.capture import capture
from laconic.program.sites import Sites

ALL = Sites()
SHORT = {"steps": 4, "precision": "fp32", "evaluations": 1, "teacher": "torch"}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv(x))


class Residual(nn.Module):
    """Two stages of `blocks` residual blocks: [batch, 3, 8, 8] -> [batch, classes]."""

    def __init__(self, width, blocks, classes=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.second = nn.Sequential(*[Block(2 * width) for _ in range(blocks)])
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.second(self.down(self.first(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """Layers of attention with padding: ids and mask [batch, tokens] -> [batch, 4]."""

    def __init__(self, width, heads, layers):
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(layers)])
        self.head = nn.Linear(width, 4)
        self.heads = heads

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        hidden = attention_mask[:, None, None] == 1
        for layer in self.qkv:
            q, k, v = (
                t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in layer(x).chunk(3, 2)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
            x = x + y.transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


def images(count=4, size=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


def residual(width, blocks, classes=4):
    return capture(Residual(width, blocks, classes).eval(), (torch.randn(2, 3, 8, 8),))


@pytest.fixture
def teacher():
    return residual(6, 3)


def apply(options, student, teacher, task, **more):
    method = Features(**{**SHORT, **options})
    return method.apply(student, ALL, Context(task=task, original=teacher, **more))


@pytest.mark.parametrize("match", ["hint", "attention", "relational", "contrastive"])
def test_another_architecture_is_matched_by_stage(teacher, match):
    student = residual(4, 1)
    task = classification(train=images(), validation=images(1))
    made = apply({"match": match}, student, teacher, task)
    # ends of both stages; blocks of one stage are add ... add_2, add_3 ... add_5 in the teacher
    pairs = {"add": "add_2", "add_1": "add_5"}
    if match in ("relational", "contrastive"):
        pairs = {"add_1": "add_5"}
    assert made.resolved["nodes"] == pairs
    # nothing is left of what stood beside the student
    assert set(made.program.state_dict()) == set(student.state_dict())
    assert str(made.program.graph) == str(student.graph)
    assert all(p.requires_grad for p in made.program.parameters())
    assert "beside" not in dict(made.program.named_children())
    again = method_of(Features(**dict(made.resolved)).step(), "step 1")
    repeated = again.apply(student, ALL, Context(task=task, original=teacher))
    for name, tensor in made.program.tensors():
        assert torch.equal(tensor, repeated.program.tensor(name))


def test_hints_bring_values_as_close_as_a_projection_can(teacher):
    """Only what is inside counts: the loss falls although widths differ."""
    student = residual(4, 1)
    task = classification(train=images())
    options = {"alpha": 0.0, "hard": "teacher", "steps": 150, "lr": 0.01, "evaluations": 5}
    made = apply({**options, "features": 10.0}, student, teacher, task)
    history = [entry["loss"] for entry in made.figures["history"]]
    assert history[-1] < 0.8 * history[0]


def test_a_teacher_of_other_classes_teaches_what_is_inside(teacher):
    student = residual(4, 1, classes=7)
    labelled = [(x, torch.arange(12) % 7) for x in images()]
    made = apply({"alpha": 0.0}, student, teacher, classification(train=labelled))
    assert made.program(images(1)[0]).shape == (12, 7)


def test_a_stopped_run_goes_on_with_its_projections(teacher, tmp_path):
    student, calls = residual(4, 1), []
    data = images()

    def failing(batch):
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return (batch,), None

    options = {"save_every": 0}
    whole = apply(options, student, teacher, classification(train=data))
    with pytest.raises(RuntimeError, match="power cut"):
        apply(
            options, student, teacher, classification(train=data, split=failing), workdir=tmp_path
        )
    assert list(tmp_path.iterdir())
    resumed = apply(options, student, teacher, classification(train=data), workdir=tmp_path)
    for name, tensor in whole.program.tensors():
        assert torch.equal(tensor, resumed.program.tensor(name))


def texts(count=4):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < 4).long().expand(5, 6)
    draw = [torch.randint(0, 11, (5, 6), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": mask} for ids in draw]


def encoder(width, heads, layers):
    return capture(Encoder(width, heads, layers).eval(), texts(1)[0])


def test_relations_of_transformers():
    teacher, student = encoder(12, 3, 4), encoder(8, 2, 2)
    task = classification(train=texts(), split=lambda batch: (batch, None))
    made = apply({"match": "relations"}, student, teacher, task)
    last, final = "scaled_dot_product_attention_1", "scaled_dot_product_attention_3"
    assert made.resolved["nodes"] == {last: final}
    assert made.resolved["heads"] == 2  # both widths are four times something; two heads at most
    every = {"scaled_dot_product_attention": "scaled_dot_product_attention_1", last: final}
    again = apply({"match": "relations", "nodes": every, "heads": 4}, student, teacher, task)
    assert again.resolved["nodes"] == every
    hints = apply({"match": "hint"}, student, teacher, task)
    assert hints.resolved["nodes"] == {"add": "add_1", "add_1": "add_3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "relations"}, "the program has no attention"),
        ({"nodes": {"add": "add_5"}}, r"add has shape \[2, 4, 8, 8\] and add_5 .*\[2, 12, 4, 4\]"),
        ({"nodes": {"ad": "add_5"}}, "the program has no float node 'ad'.*add"),
        ({"nodes": ["layer*"]}, "match nothing"),
        ({"data": "synthetic", "synthetic": 4}, "batch normalisation, and the teacher has none"),
    ],
)
def test_what_cannot_be_matched_is_refused(teacher, options, message):
    student = residual(4, 1)
    before = str(student.graph)
    with pytest.raises(RecipeError, match=message):
        apply(options, student, teacher, classification(train=images()))
    assert str(student.graph) == before


def test_heads_that_do_not_divide_are_refused():
    teacher, student = encoder(12, 3, 4), encoder(8, 2, 2)
    task = classification(train=texts(), split=lambda batch: (batch, None))
    with pytest.raises(RecipeError, match="3 heads do not divide all widths, of which 4"):
        apply({"match": "relations", "heads": 3}, student, teacher, task)
    with pytest.raises(RecipeError, match="the teacher has no attention 'nowhere'"):
        nodes = {"scaled_dot_product_attention": "nowhere"}
        apply({"match": "relations", "nodes": nodes}, student, teacher, task)


def test_nothing_in_common_is_refused(teacher):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Tanh(), nn.Linear(5, 4))
    student = capture(net.eval(), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(RecipeError, match="no node of one name and shape"):
        apply({"match": "attention"}, student, teacher, classification(train=images()))


def test_teachers_from_files(teacher, tmp_path):
    path = tmp_path / "wise.laconic"
    storage.save(teacher, path)
    student = residual(4, 1)
    task = classification(train=images())
    made = apply({"teachers": [str(path)]}, student, student, task)
    same = apply({}, student, teacher, task)
    for name, tensor in made.program.tensors():
        assert torch.equal(tensor, same.program.tensor(name))
