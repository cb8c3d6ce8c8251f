"""distill.logits with other teachers, other losses, chosen positions, and held-out divergence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic import storage
from laconic.core.errors import DataError, RecipeError, TrainingError
from laconic.core.task import classification, language_modelling
from laconic.methods.base import Context
from laconic.methods.distill.logits import Logits
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.solvers.teaching.held_out import turned
from laconic.training import losses
from laconic.training.distillation import Distillation
from laconic.training.teacher import Original

SHORT = {"steps": 6, "precision": "fp32", "evaluations": 2, "teacher": "torch"}
CPU = torch.device("cpu")


def net(width, classes=4):
    layers = [nn.Linear(6, width), nn.Tanh(), nn.Linear(width, classes)]
    made = nn.Sequential(*layers)
    with torch.no_grad():
        made[2].weight.mul_(5)
    return capture(made.eval(), (torch.randn(2, 6),))


def data(count=4, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 6, generator=generator) for _ in range(count)]


@pytest.fixture
def files(tmp_path):
    """Two teachers of other widths, and their files."""
    made = [net(12), net(20)]
    paths = [str(tmp_path / f"teacher{i}.laconic") for i in range(2)]
    for program, path in zip(made, paths, strict=True):
        storage.save(program, path)
    return made, paths


def apply(options, student, original, task, **more):
    method = Logits(**{**SHORT, **options})
    return method.apply(student, Sites(), Context(task=task, original=original, **more))


def same(left, right):
    return all(torch.equal(t, right.tensor(n)) for n, t in left.tensors())


def test_a_teacher_from_a_file_takes_the_originals_place(files):
    (one, _), (path, _) = files
    student, task = net(5), classification(train=data())
    made = apply({"teachers": [path]}, student, student, task)
    assert same(made.program, apply({}, student, one, task).program)
    assert made.resolved["teachers"] == [path]
    assert list(Logits(teachers=(path,)).files()) == [path]
    twice = apply({"teachers": [path, path]}, student, student, task)
    for name, tensor in made.program.tensors():
        # the mean of two equal distributions, through a logarithm: six steps of 5e-5
        torch.testing.assert_close(tensor, twice.program.tensor(name), rtol=0, atol=1e-6)


def test_several_teachers_are_learned_from_as_one(files):
    (one, two), paths = files
    student = net(5)
    task = classification(train=data(), validation=data(1, seed=1))
    options = {"teachers": paths, "steps": 300, "lr": 0.02, "temperature": 1.0}
    made = apply(options, student, student, task)
    x = data(1)[0]
    with torch.no_grad():
        mean = (one(x).softmax(-1) + two(x).softmax(-1)) / 2
        before, after = (
            F.kl_div(program(x).log_softmax(-1), mean, reduction="batchmean")
            for program in (student, made.program)
        )
    assert after < 0.3 * before


def test_teachers_that_do_not_fit_are_refused(files, tmp_path):
    _, (path, _) = files
    task = classification(train=data())
    other = tmp_path / "other.laconic"
    storage.save(capture(nn.Linear(7, 4).eval(), (torch.randn(2, 7),)), other)
    with pytest.raises(DataError, match=r"teacher other.laconic.*\[2, 6\]"):
        apply({"teachers": [str(other)]}, net(5), net(5), task)
    five = tmp_path / "five.laconic"
    storage.save(net(5, classes=5), five)
    with pytest.raises(TrainingError, match=r"gives \[16, 4\], its teacher \[16, 5\].*vocabulary"):
        apply({"teachers": [path, str(five)]}, net(5), net(5), task)

    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    pair = tmp_path / "pair.laconic"
    storage.save(capture(Two().eval(), (torch.randn(2, 6), torch.randn(2, 6))), pair)
    with pytest.raises(RecipeError, match="teacher pair.laconic: takes 2 inputs, the program 1"):
        apply({"teachers": [str(pair)]}, net(5), net(5), task)


def objective(student, teacher, task, **options):
    def taught(flat, number):
        return list(teacher.run_flat(*flat))

    return Distillation(
        task=task, student=student, teacher=taught, outputs=1, device=CPU, **options
    )


def loss(held, batch):
    with torch.no_grad():
        return held(held.student.run_flat, batch, 0).value


def test_decoupled_takes_labels_and_without_them_the_teachers_choice():
    student, teacher = net(5), net(12)
    task = classification(train=data())
    (x,) = data(1)
    held = objective(student, teacher, task, kind="dkd", weights=(1.0, 2.0), temperature=2.0)
    with torch.no_grad():
        chosen = teacher(x).argmax(1)
    assert loss(held, (x, chosen)) == loss(held, x)
    other = (chosen + 1) % 4
    assert loss(held, (x, other)) != loss(held, x)
    # a label that says there is none is as no label
    assert loss(held, (x, torch.full_like(chosen, -100))) == loss(held, x)
    made = apply({"loss": "dkd", "dkd_beta": 4.0}, student, teacher, task)
    assert made.resolved["loss"] == "dkd"


def tokens():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    return capture(model.eval(), (torch.zeros(2, 7, dtype=torch.long),))


def test_positions_of_language_models():
    student, teacher = tokens(), tokens()
    task = language_modelling(train=[])
    ids = torch.arange(21).reshape(3, 7) % 9
    labels = ids.roll(-1, 1).clone()
    labels[:, 5:] = -100
    every = loss(objective(student, teacher, task), (ids, labels))
    labelled = loss(objective(student, teacher, task, positions="labelled"), (ids, labels))
    with torch.no_grad():
        alone = losses.soft_targets(student(ids)[:, :5], teacher(ids)[:, :5], 4.0)
    torch.testing.assert_close(labelled, alone)
    assert labelled != every
    assert loss(objective(student, teacher, task, positions=1.0), (ids, labels)) == every
    hard = loss(objective(student, teacher, task, positions=0.2, temperature=1.0), (ids, labels))
    assert hard > loss(objective(student, teacher, task, temperature=1.0), (ids, labels))
    with pytest.raises(DataError, match=r"outputs \[3, 7, 9\].*needs targets of \[3, 7\]"):
        loss(objective(student, teacher, task, positions="labelled"), (ids, labels[:, :3]))
    with pytest.raises(DataError, match="targets are NoneType"):
        loss(objective(student, teacher, task, positions="labelled"), ids)


def test_plain_training_does_not_ask_the_teacher():
    def silent(flat, number):
        raise AssertionError("asked")

    student = net(5)
    task = classification(train=data())
    held = Distillation(
        task=task, student=student, teacher=silent, outputs=1, device=CPU, alpha=0.0
    )
    x = data(1)[0]
    labels = torch.arange(16) % 4
    with torch.no_grad():
        assert loss(held, (x, labels)) == F.cross_entropy(student(x), labels)
    # so the teacher may be of any shape
    labelled = [(x, torch.arange(16) % 4) for x in data()]
    made = apply({"alpha": 0.0}, student, net(7, classes=9), classification(train=labelled))
    assert made.resolved["alpha"] == 0.0


def test_held_out_divergence_shows_what_is_learned_by_heart():
    student, teacher = net(40), net(8)
    few, other = data(1, size=8), data(2, size=64, seed=5)
    with torch.no_grad():
        validation = [(x, teacher(x).argmax(1)) for x in other]
    task = classification(train=few, validation=validation)
    options = {"steps": 400, "lr": 0.05, "evaluations": 20, "temperature": 1.0}
    made = apply(options, student, teacher, task)
    seen = [entry["divergence"] for entry in made.figures["history"]]
    assert len(seen) == 21
    assert min(seen) < seen[0]
    assert seen[-1] > 1.05 * min(seen)
    assert any("least at step" in note and "by heart" in note for note in made.notes)
    watched = apply({**options, "watch": "divergence", "patience": 3}, student, teacher, task)
    assert watched.figures["divergence"] == pytest.approx(min(seen), rel=1e-5)
    assert watched.figures["score"] == watched.figures["divergence"]
    assert any("evaluations without a better one" in note for note in watched.notes)
    with torch.no_grad():
        kl = [
            F.kl_div(watched.program(x).log_softmax(-1), teacher(x).softmax(-1), reduction="sum")
            for x in other
        ]
    assert float(sum(kl)) / 128 == pytest.approx(min(seen), rel=1e-4)


def test_divergence_cannot_be_watched_where_there_is_none():
    labelled = [(x, torch.arange(16) % 4) for x in data()]
    for task, options in (
        (classification(train=labelled), {}),
        (classification(train=labelled, validation=labelled), {"alpha": 0.0}),
    ):
        with pytest.raises(RecipeError, match="watch: divergence, but"):
            apply({"watch": "divergence", **options}, net(5), net(6), task)


def test_a_loss_that_becomes_nan_leaves_the_last_good_state():
    student, teacher = net(5), net(8)
    calls = []

    def loss(outputs, targets):
        calls.append(0)
        value = F.cross_entropy(outputs, targets)
        return value * float("nan") if len(calls) > 6 else value

    batches = [(x, torch.arange(16) % 4) for x in data()]
    task = classification(train=batches, loss=loss)
    options = {"alpha": 0.5, "steps": 8, "evaluations": 2}
    made = apply(options, student, teacher, task)
    assert "the loss became nan at step 7 of 8; the state of step 4 was kept" in made.notes
    calls.clear()
    task = classification(train=batches)
    whole = apply(
        {**options, "schedule": "constant", "warmup": 0.0, "steps": 4}, student, teacher, task
    )
    calls.clear()
    nan = classification(train=batches, loss=loss)
    held = apply({**options, "schedule": "constant", "warmup": 0.0}, student, teacher, nan)
    assert same(held.program, whole.program)


class Turning:
    """Two passes of different batches in turn, which says so."""

    def __init__(self, batches):
        self.batches, self.period, self.epoch = batches, len(batches), 0

    def __len__(self):
        return len(self.batches) // 2

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        half = len(self)
        return iter(self.batches[half * (self.epoch % 2) :][:half])


def test_a_teacher_is_asked_once_about_batches_that_come_again(monkeypatch):
    asked = []
    known = Original.__call__

    def counting(self, flat, number):
        asked.append(number)
        return known(self, flat, number)

    monkeypatch.setattr(Original, "__call__", counting)
    student, teacher = net(5), net(8)
    made = apply({"steps": 10}, student, teacher, classification(train=Turning(data(4))))
    assert asked == [0, 1, 2, 3]
    listed = apply({"steps": 10}, student, teacher, classification(train=data(4)))
    assert same(made.program, listed.program)


def test_held_out_batches_of_a_list_are_asked_about_once(monkeypatch):
    asked = []
    known = Original.__call__

    def counting(self, flat, number):
        asked.append(number)
        return known(self, flat, number)

    monkeypatch.setattr(Original, "__call__", counting)
    task = classification(train=data(2), validation=data(2, seed=3))
    made = apply({"steps": 6, "evaluations": 3}, net(5), net(8), task)
    assert sorted(asked) == [-2, -1, 0, 1]
    assert len(made.figures["history"]) == 4


def test_rounding_is_not_learned_by_heart():
    rows = [(0, 0.2), (1, -4.4e-8), (2, -1e-9)]
    history = [{"step": step, "divergence": value} for step, value in rows]
    assert turned({"history": history, "best_step": 2}) == []
    history.append({"step": 3, "divergence": 0.01})
    assert "least at step 1" in turned({"history": history, "best_step": 1})[0]
