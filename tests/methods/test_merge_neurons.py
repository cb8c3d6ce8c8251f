"""simplify.merge_neurons: an over-wide network is brought back to its width, and computes the same."""

import pytest
import torch
from torch import nn

from laconic.core.errors import DataError, RecipeError
from laconic.core.task import Task
from laconic.methods.base import Context
from laconic.methods.simplify.merge_neurons import MergeNeurons
from laconic.program import axes
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.program.sites import Sites
from laconic.solvers.layers import intervals
from laconic.testing import zoo

EPS = torch.finfo(torch.float32).eps


def task(data=None):
    return Task(
        loss=lambda o, t: o.sum(),
        metric=lambda o, t: o.flatten(1).sum(1),
        train=[(x, torch.zeros(len(x))) for x in data] if data is not None else None,
    )


def merge(program, sites="*", data=None, **options):
    context = Context(task=task(data), original=program)
    return MergeNeurons(**options).apply(program, Sites.of(sites), context)


def same(program, made, x, slack=64):
    """Rounding: merged weights are sums of rounded ones, so outputs move by eps of their sums."""
    with torch.no_grad():
        wanted, found = program(x), made(x)
    assert (wanted - found).abs().max() <= slack * EPS * max(1.0, float(wanted.abs().max()))


# planting -------------------------------------------------------------------------------------


def mlp(activation=nn.ReLU):
    layers = [nn.Linear(6, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3)]
    return zoo.shake(nn.Sequential(*layers), 1)


def cnn():
    blocks = [
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3),
    ]  # fmt: skip
    return zoo.shake(nn.Sequential(*blocks), 1)


def widen(first, second, copies, dead, generator, scales=True, value=0.0, inner=1):
    """`second` behind `first` with more channels between: copies, then dead ones, shuffled."""
    size = first.weight.shape[0]
    chosen = torch.randint(size, (copies,), generator=generator)
    factor = torch.rand(copies, generator=generator) * 3 + 0.5 if scales else torch.ones(copies)
    shuffle = torch.randperm(size + copies + dead, generator=generator)
    tall = (-1, *[1] * (first.weight.ndim - 1))
    rows = torch.cat([first.weight, first.weight[chosen] * factor.reshape(tall),
                      torch.zeros(dead, *first.weight.shape[1:])])[shuffle]  # fmt: skip
    bias = torch.cat([first.bias, first.bias[chosen] * factor, torch.full((dead,), value)])
    wide = second.weight.unflatten(1, (size, inner)).transpose(0, 1).clone()
    extra = torch.randn(copies + dead, *wide.shape[1:], generator=generator) * 0.3
    for place, origin in enumerate(chosen.tolist()):
        wide[origin] -= extra[place] * factor[place]
    columns = torch.cat([wide, extra])[shuffle].transpose(0, 1).flatten(1, 2)
    return (rows, bias[shuffle]), columns


def refill(layer, weight, bias=None):
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())


@torch.no_grad()
def over_wide_mlp(generator, activation=nn.ReLU, scales=True, value=0.0):
    model = mlp(activation)
    for one, two in ((0, 2), (2, 4)):
        rows, columns = widen(model[one], model[two], 6, 3, generator, scales, value)
        refill(model[one], *rows)
        refill(model[two], columns)
    return model


@torch.no_grad()
def over_wide_cnn(generator):
    model = cnn()
    norm = model[1]
    deviation = (norm.running_var + norm.eps).sqrt()
    held = nn.Conv2d(3, 4, 3, padding=1)
    refill(held, model[0].weight * (norm.weight / deviation)[:, None, None, None],
           norm.bias - norm.running_mean * norm.weight / deviation)  # fmt: skip
    rows, columns = widen(held, model[4], 5, 2, generator)
    refill(model[0], rows[0])
    model[1] = nn.BatchNorm2d(len(rows[1]), eps=0.0).eval()  # the same maps, seen by its mean
    model[1].running_mean.copy_(-rows[1])
    refill(model[4], columns)
    rows, columns = widen(model[4], model[7], 6, 3, generator, inner=16)
    refill(model[4], *rows)
    refill(model[7], columns)
    return model


def widths(program, names):
    return [program.tensor(name).shape[0] for name in names]


# exact ----------------------------------------------------------------------------------------


def test_an_over_wide_mlp_is_brought_back_to_its_width(generator):
    model = over_wide_mlp(generator)
    x = torch.randn(32, 6, generator=generator)
    program = capture(model, x[:2])
    outcome = merge(program)
    assert widths(program, ["0.weight", "2.weight"]) == [14, 13]
    assert widths(outcome.program, ["0.weight", "2.weight"]) == [5, 4]
    assert sum(outcome.figures["dead"].values()) == 6
    assert sum(outcome.figures["merged"].values()) == 12
    same(program, outcome.program, x)
    assert outcome.figures["output_change"] <= 64 * EPS
    assert outcome.changes["0.weight"][0].shape == (5,)
    assert torch.equal(
        outcome.program.tensor("0.weight"),
        program.tensor("0.weight")[outcome.changes["0.weight"][0]],
    )


def test_an_over_wide_cnn_is_brought_back_to_its_width(generator):
    model = over_wide_cnn(generator)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    program = capture(model, x[:2])
    outcome = merge(program)
    assert widths(program, ["0.weight", "4.weight"]) == [11, 14]
    assert widths(outcome.program, ["0.weight", "4.weight"]) == [4, 5]
    same(program, outcome.program, x)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Sigmoid])
def test_copies_merge_behind_any_activation_and_multiples_do_not(activation, generator):
    x = torch.randn(32, 6, generator=generator)
    program = capture(over_wide_mlp(generator, activation, scales=False, value=0.7), x[:2])
    outcome = merge(program)
    assert widths(outcome.program, ["0.weight", "2.weight"]) == [5, 4]
    same(program, outcome.program, x)
    scaled = capture(over_wide_mlp(generator, activation), x[:2])
    assert widths(merge(scaled, dead="none").program, ["0.weight"])[0] > 5


def test_a_constant_goes_into_a_bias_and_one_is_made_where_there_is_none(generator):
    model = zoo.shake(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)), 1)
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1.5
    x = torch.randn(16, 4, generator=generator)
    program = capture(model, x[:2])
    outcome = merge(program)
    assert widths(outcome.program, ["0.weight"]) == [5]
    assert outcome.program.tensor("2.bias").shape == (3,)
    same(program, outcome.program, x)
    assert widths(merge(program, dead="none").program, ["0.weight"]) == [6]


def test_a_constant_goes_behind_a_product_with_a_stored_matrix(generator):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(5, 2)
            self.matrix = nn.Parameter(torch.randn(6, 5))

        def forward(self, x):
            return self.last(torch.relu(torch.relu(self.first(x)) @ self.matrix))

    model = zoo.shake(Product(), 1)
    with torch.no_grad():
        model.first.weight[2] = model.first.weight[4] = 0
        model.first.bias[2], model.first.bias[4] = 1.5, 0.5
        model.matrix.abs_()  # a column of negative ones alone would be dead as well
    x = torch.randn(3, 7, 4, generator=generator)
    program = capture(model, x)
    outcome = merge(program)
    assert outcome.figures["dead"] == {"first.out": 2}
    assert outcome.program.tensor("matrix").shape == (4, 5)
    same(program, outcome.program, x)


def test_a_constant_stays_in_front_of_zero_padding(generator):
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3, padding=1)]
    model = zoo.shake(nn.Sequential(*layers), 1)
    with torch.no_grad():
        model[0].weight[1], model[0].weight[3] = 0, 0
        model[0].bias[1], model[0].bias[3] = 0.5, -0.5  # the second one is zero behind the ReLU
    x = torch.randn(4, 3, 8, 8, generator=generator)
    program = capture(model, x[:2])
    outcome = merge(program)
    assert widths(outcome.program, ["0.weight"]) == [4]
    assert any("pads with zeros" in note for note in outcome.notes)
    same(program, outcome.program, x)


def test_bounds_prove_a_unit_dead_once_the_inputs_have_a_range(generator):
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)]
    model = zoo.shake(nn.Sequential(*layers), 1)
    with torch.no_grad():
        model[0].bias[1] = -100.0  # dead for inputs from -1 to 1
        model[2].weight[3] = -model[2].weight[3].abs()  # reads nothing negative
        model[2].bias[3] = -0.1
    x = torch.rand(32, 4, generator=generator) * 2 - 1
    program = capture(model, x[:2])
    assert widths(merge(program).program, ["0.weight", "2.weight"]) == [6, 5]
    ranged = merge(program, input_range=(-1.0, 1.0))
    assert widths(ranged.program, ["0.weight", "2.weight"]) == [5, 5]
    same(program, ranged.program, x)


def test_bounds_hold(generator):
    model, _ = zoo.make("plain_cnn")
    program = capture(model, torch.randn(2, 3, 8, 8, generator=generator))
    program.propagate()
    x = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    low, high = intervals.bounds(program, (-1.0, 1.0))[program.output_node.all_input_nodes[0]]
    with torch.no_grad():
        found = program(x).double()
    assert bool(((low <= found) & (found <= high)).all())
    assert bool(low.isfinite().all())


@pytest.mark.parametrize(
    "activation",
    [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish()],
    ids=lambda activation: str(activation)[:20],
)
def test_no_activation_falls_below_its_bound(activation):
    x = torch.linspace(-4, 4, 80_001)[:, None]
    program = capture(nn.Sequential(activation), x[:2])
    program.propagate()
    (node,) = program.output_node.all_input_nodes
    low, high = (end.flatten()[0] for end in intervals.bounds(program, (-4.0, 4.0))[node])
    assert bool(((low <= activation(x)) & (activation(x) <= high)).all())


def test_a_constant_times_itself_is_one(generator):
    class Squared(nn.Module):
        def forward(self, x):
            return x * x + torch.add(x, x, alpha=0.5)

    first, second = nn.Linear(6, 4), nn.Linear(4, 3)
    model = zoo.shake(nn.Sequential(first, Squared(), second), 1)
    with torch.no_grad():
        first.weight[1] = 0.0
    x = torch.randn(8, 6, generator=generator)
    program = capture(model, x[:2])
    outcome = merge(program)
    assert outcome.figures["dead"] == {"0.out": 1}
    same(program, outcome.program, x)


# data -----------------------------------------------------------------------------------------


def test_units_dead_on_the_data_go_when_that_is_allowed(generator):
    model = zoo.shake(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), 1)
    with torch.no_grad():
        model[0].bias[1] = -100.0
    x = torch.randn(64, 4, generator=generator)
    program = capture(model, x[:2])
    assert widths(merge(program).program, ["0.weight"]) == [6]
    outcome = merge(program, data=[x], dead="data")
    assert widths(outcome.program, ["0.weight"]) == [5]
    same(program, outcome.program, x)
    few = merge(program, data=[x[:3]], dead="data")
    assert any("3 calibration samples for up to 6 channels" in note for note in few.notes)
    zeros = merge(program, data=[torch.zeros(64, 4)], dead="data")
    assert widths(zeros.program, ["0.weight"]) == [6]
    assert any("same constant" in note for note in zeros.notes)
    with pytest.raises(DataError):
        merge(program, dead="data")


def test_a_tolerance_merges_what_is_near_within_the_bound(generator):
    model = over_wide_mlp(generator)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight += 1e-3 * torch.randn(layer.weight.shape, generator=generator)
    x = torch.randn(256, 6, generator=generator)
    program = capture(model, x[:2])
    assert widths(merge(program).program, ["2.weight"]) == [13]
    merged = merge(program, "2.*", data=[x], tolerance=0.02)
    assert widths(merged.program, ["2.weight"])[0] <= 7
    hidden = torch.relu(model[0](x)).detach()
    reach = torch.cat([hidden, torch.ones(len(x), 1)], 1).norm(dim=1).max()
    with torch.no_grad():
        change = (merged.program(x) - program(x)).norm(dim=1).max()
    (bound,) = merged.figures["bound"].values()
    assert 0 < change <= bound * reach
    fitted = merge(program, "2.*", data=[x], tolerance=0.02, refit=True)
    with torch.no_grad():
        errors = [(m.program(x) - program(x)).square().mean() for m in (merged, fitted)]
    assert errors[1] <= errors[0]
    assert set(fitted.figures["refit_error"]) == {"4.weight"}


# what is refused ------------------------------------------------------------------------------


class Stream(nn.Module):
    """A residual stream that two layers write."""

    def __init__(self):
        super().__init__()
        self.enter, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.enter(x)
        return self.head(x + self.down(torch.relu(self.up(x))))


def test_a_residual_stream_needs_duplicates_in_all_that_write_it(generator):
    model = zoo.shake(Stream(), 1)
    with torch.no_grad():
        model.enter.weight[3], model.enter.bias[3] = model.enter.weight[1], model.enter.bias[1]
    x = torch.randn(16, 4, generator=generator)
    program = capture(model, x[:2])
    assert widths(merge(program).program, ["enter.weight"]) == [6]
    with torch.no_grad():
        model.down.weight[3], model.down.bias[3] = model.down.weight[1], model.down.bias[1]
    program = capture(model, x[:2])
    outcome = merge(program)
    assert widths(outcome.program, ["enter.weight", "down.weight"]) == [5, 5]
    same(program, outcome.program, x)


def test_a_layer_whose_channels_are_all_dead_keeps_one(generator):
    model = zoo.shake(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), 1)
    nn.init.zeros_(model[0].weight)
    program = capture(model, torch.randn(2, 4, generator=generator))
    outcome = merge(program)
    assert widths(outcome.program, ["0.weight"]) == [1]
    assert any("one is kept" in note for note in outcome.notes)
    same(program, outcome.program, torch.randn(8, 4, generator=generator))


def test_channels_behind_a_layer_norm_are_left_alone():
    layers = [nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)]
    outcome = merge(capture(zoo.shake(nn.Sequential(*layers), 1), torch.randn(2, 4)))
    assert any("mixes its channels" in note for note in outcome.notes)


def test_wrong_options_and_sites_are_refused():
    program = capture(mlp(), torch.randn(2, 6))
    with pytest.raises(RecipeError, match="refit needs a tolerance"):
        merge(program, refit=True)
    with pytest.raises(RecipeError, match="is empty"):
        merge(program, input_range=(1.0, -1.0))
    with pytest.raises(RecipeError, match=r"0\.out"):
        merge(program, "0.ouf")


# the zoo --------------------------------------------------------------------------------------


@torch.no_grad()
def planted(program):
    """Merging after channel 1 of every group was made a copy of channel 0, wherever it is stored.

    A copy of all that a group stores is the same function wherever channels are treated alike.
    """
    twin = program.clone()
    for group in groups(program):
        if group.size < 2 or any(list(axes.repeats(m.term)) for m in group.members):
            continue
        for member in group.members:
            if member.role == "consumer":
                continue
            index = group.index(member)
            tensor = twin.tensor(member.tensor).detach().clone()
            source, target = ((index == i).nonzero().flatten() for i in (0, 1))
            tensor.index_copy_(member.dim, target, tensor.index_select(member.dim, source))
            twin.set_tensor(member.tensor, tensor)
    context = Context(task=task(), original=twin)
    outcome = MergeNeurons().apply(twin, Sites(), context)
    for old, new in zip(
        twin.run_flat(*program.example), outcome.program.run_flat(*program.example), strict=True
    ):
        limit = 256 * EPS * max(1.0, float(old.float().abs().max()))
        assert (old.float() - new.float()).abs().max() <= limit
    return outcome, len(groups(program))


@pytest.mark.parametrize("name", zoo.names())
def test_the_zoo_keeps_its_function_with_copies_planted(name):
    model, inputs = zoo.make(name)
    outcome, found = planted(capture(model, inputs))
    assert len(outcome.figures["kept"]) <= found
    assert outcome.figures["kept"] or outcome.notes
