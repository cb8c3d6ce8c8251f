"""simplify.merge_linear: one map computes what several did, and costs less."""

import pytest
import torch
from torch import nn

from laconic.core.errors import RecipeError
from laconic.core.task import Task
from laconic.methods.base import Context
from laconic.methods.simplify.merge_linear import MergeLinear
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.sites import Sites
from laconic.testing import zoo

NO_TASK = Task(loss=lambda o, t: o.sum(), metric=lambda o, t: o.flatten(1).sum(1))
EPS = torch.finfo(torch.float32).eps


def merge(program, sites="*", **options):
    context = Context(task=NO_TASK, original=program)
    return MergeLinear(**options).apply(program, Sites.of(sites), context)


def linear_maps(program):
    names = ("linear", "conv1d", "conv2d", "batch_norm", "avg_pool2d", "avg_pool1d", "add", "mul")
    return sum(str(n.target).split(".")[1] in names for n in program.graph.nodes
               if n.op == "call_function")  # fmt: skip


def bound(model, x):
    """How far rounding can carry an output: a few eps of sums of magnitudes, layer after layer.

    The same network with all weights and inputs made positive has those sums as its outputs; a
    merged weight is rounded once, the layers it stands for each round their sums of n terms, which
    float32 does pairwise, so that 16 eps of the sum of magnitudes are ample for these sizes.
    """
    double = capture(model, x[:2]).clone()
    for name, tensor in list(double.tensors()):
        if tensor.is_floating_point():
            double.set_tensor(name, tensor.detach().abs())
    with torch.no_grad():
        return 16 * EPS * float(double(x.abs()).abs().max())


def check(model, x, merged, left, **options):
    model = zoo.shake(model, 3)
    program = capture(model, x[:2])
    outcome = merge(program, **options)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(program(x), wanted)
        assert (outcome.program(x) - wanted).abs().max() <= bound(model, x)
    assert linear_maps(outcome.program) == left
    assert len(outcome.figures["merged"]) == merged
    before, after = cost(program), cost(outcome.program)
    assert outcome.figures["macs"] == [before.macs, after.macs]
    assert outcome.figures["parameters"] == [before.params, after.params]
    key = "macs" if options.get("by", "macs") == "macs" else "params"
    assert getattr(after, key) <= getattr(before, key)
    return outcome


class Branches(nn.Module):
    """Parallel maps of one input, summed."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return torch.relu(total)


def normed(*args, **options):
    return nn.Sequential(nn.Conv2d(*args, bias=False, **options), nn.BatchNorm2d(args[1]))


IN_A_ROW = [
    ("linear linear", [nn.Linear(6, 9), nn.Linear(9, 4)], (3, 6), 1),
    ("three linear", [nn.Linear(6, 9), nn.Linear(9, 9, bias=False), nn.Linear(9, 4)], (3, 6), 1),
    ("linear on tokens", [nn.Linear(6, 9), nn.Linear(9, 4)], (3, 5, 6), 1),
    ("1x1 then 3x3", [nn.Conv2d(4, 40, 1), nn.Conv2d(40, 5, 3)], (3, 4, 7, 8), 1),
    ("3x3 then 1x1", [nn.Conv2d(4, 9, 3, padding=1), nn.Conv2d(9, 5, 1)], (3, 4, 7, 8), 1),
    ("strided 3x3 then 1x1", [nn.Conv2d(4, 9, 3, 2, 1), nn.Conv2d(9, 5, 1)], (3, 4, 7, 8), 1),
    ("1x1 then padded 3x3", [nn.Conv2d(4, 40, 1, bias=False), nn.Conv2d(40, 5, 3, padding=1)],
     (3, 4, 7, 8), 1),
    ("1x1 then dilated", [nn.Conv2d(4, 40, 1), nn.Conv2d(40, 5, 3, dilation=2)], (3, 4, 9, 8), 1),
    ("strided 1x1 then 2x2", [nn.Conv2d(4, 40, 1, 2), nn.Conv2d(40, 5, 2)], (3, 4, 9, 8), 1),
    ("2x2 then 2x2", [nn.Conv2d(4, 40, 2, padding=1, bias=False), nn.Conv2d(40, 5, 2)],
     (3, 4, 9, 8), 1),
    ("full padding", [nn.Conv2d(2, 40, 2, padding=1, bias=False), nn.Conv2d(40, 3, 2, padding=1)],
     (3, 2, 9, 8), 1),
    ("1-d", [nn.Conv1d(4, 40, 1), nn.Conv1d(40, 5, 3)], (3, 4, 9), 1),
    ("depthwise then pointwise", [nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 1, groups=2)],
     (3, 2, 6, 6), 1),
    ("grouped", [nn.Conv2d(4, 16, 1, groups=2), nn.Conv2d(16, 8, 3, groups=4)], (3, 4, 6, 6), 1),
    ("conv then pool", [nn.Conv2d(4, 5, 3, padding=1), nn.AvgPool2d(2)], (3, 4, 8, 8), 1),
    ("conv, norm, pool", [normed(4, 5, 3, padding=1), nn.AvgPool2d(2)], (3, 4, 8, 8), 1),
    ("norm between", [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)], (3, 6), 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "shape", "left"), [p[1:] for p in IN_A_ROW], ids=[p[0] for p in IN_A_ROW]
)
def test_maps_in_a_row_become_one(layers, shape, left, generator):
    check(nn.Sequential(*layers), torch.randn(shape, generator=generator), 1, left)


BRANCHES = [
    ("repvgg", [normed(6, 6, 3, padding=1), normed(6, 6, 1), nn.BatchNorm2d(6)]),
    ("repvgg strided", [normed(6, 8, 3, stride=2, padding=1), normed(6, 8, 1, stride=2)]),
    ("repvgg grouped",
     [normed(6, 6, 3, padding=1, groups=2), normed(6, 6, 1, groups=6), nn.Identity()]),
    ("mobileone", [normed(6, 6, 3, padding=1, groups=6), normed(6, 6, 1, groups=6),
                   normed(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)]),
    ("lopsided", [nn.Conv2d(6, 6, (1, 3), padding=(0, 1)), nn.Conv2d(6, 6, (3, 1), padding=(1, 0)),
                  nn.Conv2d(6, 6, 3, padding=1)]),
    ("dilated", [nn.Conv2d(6, 6, 5, padding=2), nn.Conv2d(6, 6, 3, padding=2, dilation=2)]),
    ("diverse", [nn.Conv2d(6, 6, 3, padding=1),
                 nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 6, 3, padding=1)),
                 nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.AvgPool2d(3, 1, 1))]),
]  # fmt: skip


@pytest.mark.parametrize("branches", [b[1] for b in BRANCHES], ids=[b[0] for b in BRANCHES])
def test_summed_branches_become_one_convolution(branches, generator):
    x = torch.randn(3, 6, 8, 10, generator=generator)
    check(Branches(*branches), x, 1, 1)


def test_constants_and_signs_are_taken_in(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.scale, self.shift = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

        def forward(self, x):
            y = (self.one(x) * self.scale + self.shift) / 2 - 0.5
            return torch.sub(y, self.two(x), alpha=3) - x

    check(Net(), torch.randn(3, 6, generator=generator), 1, 1)


APART = [
    ("bias under padding", [nn.Conv2d(4, 40, 1), nn.Conv2d(40, 5, 3, padding=1)],
     "pads with zeros where the first one would give its bias"),
    ("window under padding",
     [nn.Conv2d(4, 40, 3, bias=False, stride=2), nn.Conv2d(40, 5, 1, padding=1)],
     "pads with zeros where the first one would still see its input"),
    ("low rank", [nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)], "as one they would cost"),
    ("activation", [nn.Conv2d(4, 40, 1), nn.ReLU(), nn.Conv2d(40, 5, 3)], "nothing to merge"),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "note"), [a[1:] for a in APART], ids=[a[0] for a in APART])
def test_what_stays_apart_is_said(layers, note, generator):
    channels = layers[0].in_channels
    model = zoo.shake(nn.Sequential(*layers), 1)
    x = torch.randn(2, channels, 8, 8, generator=generator)
    outcome = merge(capture(model, x))
    assert any(note in line for line in outcome.notes)
    with torch.no_grad():
        assert torch.equal(outcome.program(x), model(x))


def test_a_result_that_others_read_is_left_alone(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 9), nn.Linear(9, 4)

        def forward(self, x):
            y = self.one(x)
            return self.two(y), torch.tanh(y)

    model = zoo.shake(Net(), 1)
    x = torch.randn(2, 6, generator=generator)
    outcome = merge(capture(model, x))
    assert outcome.figures["merged"] == []
    assert "also read elsewhere" in outcome.notes[0]


def test_a_norm_that_reads_what_its_sum_reads_too_is_merged(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    check(Net(), torch.randn(2, 3, 6, 6, generator=generator), 1, 1)


def test_a_shared_weight_is_left_alone(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.step(torch.relu(self.step(x))))

    outcome = merge(capture(zoo.shake(Net(), 1), torch.randn(2, 6, generator=generator)))
    assert outcome.figures["merged"] == []
    assert "a weight has other uses" in outcome.notes[0]


def test_the_figure_that_has_to_fall_is_chosen():
    layers = [nn.Conv2d(4, 5, 3, padding=1), nn.AvgPool2d(2)]
    check(nn.Sequential(*layers), torch.randn(3, 4, 8, 8), 0, 2, by="parameters")


def test_norms_can_be_kept(generator):
    layers = [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)]
    check(nn.Sequential(*layers), torch.randn(3, 6, generator=generator), 0, 3, batch_norm=False)


def test_sites_choose_and_wrong_ones_are_refused(generator):
    model = zoo.shake(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4)), 1)
    x = torch.randn(3, 6, generator=generator)
    program = capture(model, x)
    outcome = merge(program, ["*", "!0.weight"])
    assert torch.equal(outcome.program.tensor("0.weight"), program.tensor("0.weight"))
    assert outcome.figures["merged"][0]["weights"] == ["1.weight", "2.weight"]
    with pytest.raises(RecipeError, match=r"0\.weight"):
        merge(program, "0.weigth")


def test_other_batches_and_training_work_on(generator):
    model = zoo.shake(Branches(normed(6, 6, 3, padding=1), normed(6, 6, 1), nn.BatchNorm2d(6)), 2)
    made = merge(capture(model, torch.randn(2, 6, 8, 8, generator=generator))).program
    assert made.train()(torch.randn(5, 6, 8, 8, generator=generator)).shape == (5, 6, 8, 8)
    names = {name for name, _ in made.named_parameters()}
    assert names == {"branches.0.0.bias", "branches.0.0.weight"}


@pytest.mark.parametrize("name", zoo.names())
def test_the_zoo_keeps_its_function(name):
    program = zoo.captured(name)
    outcome = merge(program)
    with torch.no_grad():
        wanted = program.run_flat(*program.example)
        found = outcome.program.run_flat(*program.example)
    for one, two in zip(wanted, found, strict=True):
        limit = 256 * EPS * max(1.0, float(one.float().abs().max()))
        assert (one.float() - two.float()).abs().max() <= limit
    assert outcome.figures["macs"][1] <= outcome.figures["macs"][0]
