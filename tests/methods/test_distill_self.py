"""distill.self: heads that come and go, a past that teaches, nothing of either left."""

import pytest
import torch
from torch import nn

from laconic.core.errors import DataError, RecipeError
from laconic.core.task import classification
from laconic.methods.base import Context, method_class
from laconic.methods.distill.self import SelfTaught
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.solvers.teaching.earlier import Earlier
from laconic.training.plan import Plan

SHORT = {"steps": 6, "precision": "fp32", "evaluations": 2}
CPU = torch.device("cpu")


class Net(nn.Module):
    """Three blocks at two resolutions: [batch, 3, 8, 8] -> [batch, 4]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.inner = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        for conv in self.inner:
            x = x + torch.relu(conv(x))
        x = torch.relu(self.down(x))
        x = x + torch.relu(self.last(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def program():
    return capture(Net().eval(), (torch.randn(2, 3, 8, 8),))


def batches(count=4, size=16):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]
    return [(x, x.mean((2, 3)).argmax(1)) for x in made]


def apply(options, program, task, **more):
    method = SelfTaught(**{**SHORT, **options})
    return method.apply(program, Sites(), Context(task=task, original=program, **more))


def same(left, right):
    return all(torch.equal(t, right.tensor(n)) for n, t in left.tensors())


def test_nothing_is_left_of_heads_and_past(program):
    task = classification(train=batches(), validation=batches(1))
    made = apply({}, program, task)
    assert made.resolved["nodes"] == ["add", "add_1"]
    assert str(made.program.graph) == str(program.graph)
    assert set(made.program.state_dict()) == set(program.state_dict())
    assert method_class("distill.self") is SelfTaught
    again = SelfTaught(**dict(made.resolved))
    repeated = again.apply(program, Sites(), Context(task=task, original=program))
    assert same(made.program, repeated.program)


def test_without_heads_and_past_it_is_plain_training(program):
    task = classification(train=batches())
    made = apply({"exits": 0, "past": 0.0}, program, task)
    plain = method_class("distill.logits")(**SHORT, alpha=0.0, teacher="torch")
    other = plain.apply(program, Sites(), Context(task=task, original=program))
    assert same(made.program, other.program)


@pytest.mark.parametrize("options", [{"exits": 0}, {"past": 0.0}])
def test_each_part_changes_what_is_learned_and_learns(program, options):
    task = classification(train=batches())
    made = apply({**options, "steps": 60, "lr": 0.05}, program, task)
    plain = apply({"exits": 0, "past": 0.0, "steps": 60, "lr": 0.05}, program, task)
    assert not same(made.program, plain.program)
    x, y = (torch.cat(part) for part in zip(*task.train, strict=True))
    with torch.no_grad():
        before, after = (float(task.loss(p(x), y)) for p in (program, made.program))
    assert after < 0.8 * before


def test_the_past_is_a_running_mean(program):
    student = program.clone().train()
    past = Earlier(student, decay=0.5, device=CPU, precision="fp32")
    past.begin(student, Plan(steps=4, accumulate=2))
    assert past.batches == 8
    start = student.tensor("head.weight").detach().clone()
    with torch.no_grad():
        student.tensor("head.weight").add_(1.0)
    past.after(1, torch.optim.SGD([student.tensor("head.weight")], lr=0.1))
    # young: (1 + 1) / (10 + 1) of the mean stays
    wanted = start + 9 / 11
    torch.testing.assert_close(past.tensors()["head.weight"], wanted)
    copy = {name: tensor.clone() for name, tensor in past.tensors().items()}
    past.after(2, torch.optim.SGD([student.tensor("head.weight")], lr=0.1))
    past.restore(copy)
    assert torch.equal(past.tensors()["head.weight"], copy["head.weight"])


def test_a_stopped_run_goes_on_with_heads_and_past(program, tmp_path):
    calls = []

    def failing(batch):
        calls.append(0)
        if len(calls) == 5:
            raise RuntimeError("power cut")
        return (batch[0],), batch[1]

    options = {"save_every": 0}
    task = classification(train=batches())
    whole = apply(options, program, task)
    with pytest.raises(RuntimeError, match="power cut"):
        apply(options, program, classification(train=batches(), split=failing), workdir=tmp_path)
    resumed = apply(options, program, task, workdir=tmp_path)
    assert same(whole.program, resumed.program)


@pytest.mark.parametrize(
    ("options", "task", "error", "message"),
    [
        ({}, [x for x, _ in batches()], DataError, "no targets.*distill.logits"),
        ({"nodes": ["ad"]}, batches(), RecipeError, "no node 'ad'.*add"),
        ({"nodes": ["x"]}, batches(), RecipeError, "no node 'x'"),
    ],
)
def test_bad_input(program, options, task, error, message):
    with pytest.raises(error, match=message):
        apply(options, program, classification(train=task))
    assert not program.training


def test_a_value_that_cannot_be_pooled_is_refused():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            turned = x.transpose(0, 1) * 2
            return turned.transpose(0, 1) * self.weight

    program = capture(Weighted().eval(), (torch.randn(2, 6),))
    task = classification(train=[(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))])
    with pytest.raises(RecipeError, match=r"mul gives \[6, 2\], which cannot be pooled"):
        apply({"nodes": ["mul"]}, program, task)
    made = apply({}, program, task)
    assert "0 of 2 heads" in made.notes[0]


def test_trial_steps_cost_what_the_past_costs(program, monkeypatch):
    asked = []
    known = Earlier.__call__

    def counted(self, flat):
        asked.append(self.batches)
        return known(self, flat)

    monkeypatch.setattr(Earlier, "__call__", counted)
    task = classification(train=batches())
    made = apply({"steps": None, "minutes": 0.01, "evaluations": 1}, program, task)
    trials = [length for length in asked if not length]
    assert len(trials) >= 3
    assert len(asked) - len(trials) == made.resolved["steps"]


def test_padding_says_nothing_to_a_head():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.out = nn.Linear(4, 4)

        def forward(self, x, mask):
            for layer in self.layers:
                x = x + layer(x).tanh()
            return self.out((x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))

    x = torch.randn(6, 5, 4)
    mask = (torch.arange(5) < torch.tensor([5, 1, 2, 3, 4, 3])[:, None]).float()
    other = torch.where(mask.bool().unsqueeze(-1), x, 7.0)
    held = capture(Words().eval(), {"x": x[:2], "mask": mask[:2]})
    made = [
        apply({}, held, classification(train=[({"x": one, "mask": mask}, torch.arange(6) % 4)]))
        for one in (x, other)
    ]
    assert made[0].figures["heads"]
    assert same(made[0].program, made[1].program)
