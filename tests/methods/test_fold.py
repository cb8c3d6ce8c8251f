"""simplify.fold: the folded network computes what the unfolded one does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from laconic.core.task import Task
from laconic.methods.base import Context
from laconic.methods.prune.magnitude import Magnitude
from laconic.methods.simplify.fold import Fold
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.testing import zoo

NO_TASK = Task(loss=lambda o, t: o.sum(), metric=lambda o, t: o.flatten(1).sum(1))
BATCH_NORM = torch.ops.aten.batch_norm.default


def fold(program, sites="*", **options):
    context = Context(task=NO_TASK, original=program)
    return Fold(**options).apply(program, Sites.of(sites), context)


def batch_norms(program):
    return sum(node.target is BATCH_NORM for node in program.graph.nodes)


def tolerance(model, x, made):
    """Rounding bound: every layer's weights and outputs move by a few eps of their own size."""
    with torch.no_grad():
        wanted = model(x)
    return 64 * torch.finfo(torch.float32).eps * float(wanted.abs().max())


def same(model, program, x, made):
    with torch.no_grad():
        assert (made(x) - model(x)).abs().max() <= tolerance(model, x, made)
        assert torch.equal(program(x), model(x))


# how batch norm and a layer can stand beside each other: (name, layers, input, folded)
PLACEMENTS = [
    ("conv-bn", [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()], (4, 3, 8, 8), 1),
    ("no bias", [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)], (4, 3, 8, 8), 1),
    ("grouped", [nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8)], (4, 6, 8, 8), 1),
    ("depthwise", [nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)], (4, 6, 8, 8), 1),
    ("not affine", [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)], (4, 3, 8, 8), 1),
    ("1-d", [nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)], (4, 3, 8), 1),
    ("3-d", [nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)], (3, 2, 4, 4, 4), 1),
    ("same", [nn.Conv2d(3, 6, 3, padding="same"), nn.BatchNorm2d(6)], (4, 3, 8, 8), 1),
    ("transposed", [nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)], (4, 4, 5, 5), 1),
    ("transposed 1-d", [nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)], (4, 4, 5), 1),
    (
        "transposed grouped",
        [nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)],
        (4, 4, 5, 5),
        1,
    ),
    ("linear-bn", [nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Tanh()], (4, 7), 1),
    ("bn-linear", [nn.BatchNorm1d(7), nn.Linear(7, 5)], (4, 7), 1),
    ("bn-conv", [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)], (4, 4, 8, 8), 1),
    ("bn-conv grouped", [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)], (4, 4, 8, 8), 1),
    ("bn-conv padded", [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)], (4, 4, 8, 8), 0),
    ("bn-relu-conv", [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)], (4, 4, 8, 8), 0),
    ("twice", [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)], (4, 3, 8, 8), 2),
]


@pytest.mark.parametrize(
    ("layers", "shape", "folded"), [p[1:] for p in PLACEMENTS], ids=[p[0] for p in PLACEMENTS]
)
def test_folded_equals_unfolded(layers, shape, folded, generator):
    model = zoo.shake(nn.Sequential(*layers), 3)
    x = torch.randn(shape, generator=generator)
    program = capture(model, x)
    before = batch_norms(program)
    outcome = fold(program)
    assert outcome.figures["batch_norms"] == folded
    assert before - batch_norms(outcome.program) == folded
    assert bool(outcome.notes) == (folded == 0)
    same(model, program, x, outcome.program)


def test_statistics_far_from_ordinary_fold_within_float_rounding(generator):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    norm = model[1]
    norm.running_var.copy_(torch.tensor([0.0, 1e-8, 1e-3, 1.0, 1e4, 1e8]))
    norm.running_mean.copy_(torch.tensor([0.0, 1e-3, -1.0, 10.0, -100.0, 0.5]))
    norm.weight.data.copy_(torch.tensor([1e-3, -1.0, 0.0, 2.0, -3.0, 1e-6]))
    x = torch.randn(4, 3, 8, 8, generator=generator)
    program = capture(model, x)
    same(model, program, x, fold(program).program)


def test_a_layer_that_is_read_before_its_norm_keeps_it(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    model = zoo.shake(Net(), 1)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    outcome = fold(capture(model, x))
    assert outcome.figures["batch_norms"] == 0
    assert "conv2d is also read without it" in outcome.notes[0]


def test_a_layer_used_twice_keeps_its_norms(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.two(self.conv(torch.relu(self.one(self.conv(x)))))

    model = zoo.shake(Net(), 1)
    x = torch.randn(2, 4, 4, 4, generator=generator)
    program = capture(model, x)
    outcome = fold(program)
    assert outcome.figures["batch_norms"] == 0
    assert all("shared" in note for note in outcome.notes[:2])
    same(model, program, x, outcome.program)


def test_a_norm_over_another_axis_stays(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.linear(x))

    model = zoo.shake(Net(), 1)
    x = torch.randn(4, 3, 5, generator=generator)
    program = capture(model, x)
    outcome = fold(program)
    assert "another axis" in outcome.notes[0]
    same(model, program, x, outcome.program)


def test_sites_choose_which_weights_may_change(generator):
    blocks = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    model = zoo.shake(nn.Sequential(*blocks), 1)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    program = capture(model, x)
    outcome = fold(program, ["*", "!0.weight", "!2.weight"])
    assert batch_norms(outcome.program) == 2
    assert torch.equal(outcome.program(x), model(x))
    one = fold(program, "0")
    assert one.figures["batch_norms"] == 1
    assert torch.equal(one.program.tensor("2.weight"), program.tensor("2.weight"))


def test_identities_and_dead_work_go_and_the_rest_stays(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)
            self.unused = nn.Linear(6, 2)
            self.register_buffer("table", torch.randn(5, 6))

        def forward(self, x):
            self.unused(x)
            y = self.drop(self.linear(x)) * 1.0 + 0
            y = y.reshape(y.shape[0], 6).clone()
            return (y + self.table.mean(0).exp()) * 2.0

    model = Net().eval()
    x = torch.randn(4, 6, generator=generator)
    program = capture(model, x)
    outcome = fold(program)
    names = [n.target for n in outcome.program.graph.nodes if n.op == "call_function"]
    aten = torch.ops.aten
    assert names == [aten.linear.default, aten.add.Tensor, aten.mul.Tensor]
    assert "unused.weight" not in outcome.program.state_dict()
    assert outcome.figures["constants"] == 2
    for batch in (1, 3, 4):
        assert torch.equal(outcome.program(x[:batch]), model(x[:batch]))
    assert any("dropout" in note for note in outcome.notes)
    kept = fold(program, dropout=False)
    assert any(n.target is aten.dropout.default for n in kept.program.graph.nodes)


def test_a_view_that_is_an_identity_for_the_example_only_stays(generator):
    class Net(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 2) + 1

    program = capture(Net(), torch.randn(2, 2))
    assert program.dynamic
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.reshape.default)
    assert len(list(fold(program).program.graph.nodes)) < len(list(program.graph.nodes))
    node.update_arg(1, [2, -1])  # the same shape for a batch of 2 only
    program.recompile()
    x = torch.randn(6, 2, generator=generator)
    assert fold(program).program(x).shape == (2, 6)
    assert torch.equal(fold(program).program(x), x.reshape(2, -1) + 1)


def test_trainable_tensors_are_no_constants():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x * self.weight.exp()

    outcome = fold(capture(Net(), torch.randn(2, 3)))
    assert outcome.figures["constants"] == 0
    assert "nothing to fold" in outcome.notes[-1]
    assert outcome.program.weight.requires_grad


class Parts(nn.Module):
    """Weights that are computed: weight norm, spectral norm, a mask, and one that is read twice."""

    def __init__(self):
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Conv1d(4, 6, 3, padding=1))
        self.spectral = parametrizations.spectral_norm(nn.Linear(6, 8))
        self.masked = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8, bias=False)
        self.register_buffer("mask", (torch.rand(8, 8) > 0.5).float())

    def forward(self, x):
        x = self.spectral(F.relu(self.normed(x)).mean(-1))
        x = F.linear(F.relu(x), self.masked.weight * self.mask, self.masked.bias)
        return F.linear(self.twice(x), self.twice.weight * 2)


@pytest.fixture
def parts(generator):
    x = torch.randn(3, 4, 5, generator=generator)
    model = Parts().eval()
    return model, capture(model, x), x


def test_weights_that_are_computed_become_what_they_are(parts):
    model, program, x = parts
    outcome = fold(program)
    same(model, program, x, outcome.program)
    names = ["normed.weight", "spectral.weight", "masked.weight"]
    assert outcome.figures["weights"] == names
    held = dict(outcome.program.named_parameters())
    assert all(name in held and held[name].requires_grad for name in names)
    assert not any("parametrizations" in name for name, _ in outcome.program.tensors())
    assert torch.equal(held["masked.weight"] == 0, model.mask == 0)
    assert torch.equal(held["twice.weight"], model.twice.weight)  # has another reader
    kept = fold(program, weights=False).program
    assert {n for n, _ in kept.named_parameters()} == {n for n, _ in program.named_parameters()}


def test_what_needs_whole_weights_says_to_fold_and_takes_them_then(parts):
    _, program, _ = parts
    context = Context(task=NO_TASK, original=program)
    notes = Magnitude().apply(program, Sites(), context).notes
    said = [note for note in notes if "simplify.fold first" in note]
    assert [note.split(":")[0] for note in said] == [
        "normed.parametrizations.weight.original1",
        "spectral.parametrizations.weight.original",
        "masked.weight",
    ]
    folded = fold(program).program
    made = Magnitude().apply(folded, Sites(), context)
    assert {"normed.weight", "spectral.weight", "masked.weight"} == set(made.figures["kept"])


@pytest.mark.parametrize("name", zoo.names())
def test_the_zoo_keeps_its_function(name):
    program = zoo.captured(name)
    made = fold(program).program
    with torch.no_grad():
        wanted, found = program.run_flat(*program.example), made.run_flat(*program.example)
    for one, two in zip(wanted, found, strict=True):
        bound = 256 * torch.finfo(torch.float32).eps * max(1.0, float(one.float().abs().max()))
        assert (one.float() - two.float()).abs().max() <= bound


@pytest.mark.data
def test_the_real_resnet_keeps_its_logits(data_dir):
    from benchmarks import data, models

    model = models.cifar_resnet(20, data_dir / "resnet_cifar10" / "resnet20.safetensors")
    images = data.cifar10("validation", data_dir)[:64]
    program = capture(model, torch.zeros(2, 3, 32, 32))
    outcome = fold(program)
    assert outcome.figures["batch_norms"] == 19
    assert not any("running_mean" in name for name in outcome.program.state_dict())
    with torch.no_grad():
        wanted, found = model(images.tensor()), outcome.program(images.tensor())
    assert (wanted - found).abs().max() <= 1e-4 * wanted.abs().max()
    assert torch.equal(wanted.argmax(1), found.argmax(1))
