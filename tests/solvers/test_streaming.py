"""Second-order methods stream: the moments alive at once do not grow with the number of layers."""

import weakref

import pytest
import torch
from torch import nn

from laconic.methods.base import Context, method_class
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.program.sites import Sites
from laconic.solvers.importance import obs
from laconic.solvers.importance.base import Scene
from laconic.solvers.weights import obs_layers
from laconic.statistics.gram import Gram
from laconic.testing.contracts import own_outputs

WIDTH = 6
ONE = 8 * WIDTH**2  # bytes of one layer's second moments of inputs


def deep(layers, apart=1):
    """Layers of one width, each reading the one before: `layers - 1` groups of channels."""
    torch.manual_seed(0)
    parts = []
    for _ in range(layers):
        parts += [nn.Conv2d(WIDTH * apart, WIDTH * apart, 1, groups=apart), nn.ReLU()]
    return capture(nn.Sequential(*parts).eval(), torch.randn(2, WIDTH * apart, 2, 2))


@pytest.fixture
def alive(monkeypatch):
    """The most bytes of second moments that were held at once, and whose."""
    held, most = weakref.WeakSet(), {"bytes": 0}
    plain_start, plain_merge = Gram.__init__, Gram.merge

    def start(gram):
        plain_start(gram)
        held.add(gram)

    def merge(gram, other):
        plain_merge(gram, other)
        storages = {g.scatter.data_ptr(): g.scatter.nbytes for g in held}
        most["bytes"] = max(most["bytes"], sum(storages.values()))

    monkeypatch.setattr(Gram, "__init__", start)
    monkeypatch.setattr(Gram, "merge", merge)
    return most


def peak(alive, method, layers, apart=1, **options):
    program = deep(layers, apart)
    context = Context(task=own_outputs(program), original=program)
    alive["bytes"] = 0
    made = method_class(method)(**options).apply(program, Sites(), context)
    assert made.figures
    return alive["bytes"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prune.obs", {"ratio": 0.5}),
        ("prune.nm", {"n": 1, "m": 2}),
        ("factorize.svd", {"ratio": 0.3}),
        (
            "prune.channels",
            {"ratio": 0.5, "of": "channels", "scope": "layer", "importance": "l1", "block": 1},
        ),
    ],
)
def test_refits_hold_the_moments_of_one_layer_at_a_time(alive, method, options):
    first = peak(alive, method, 4, **options)
    assert 0 < first <= 5 * ONE  # two halves, their sum, and what an update brings
    assert peak(alive, method, 12, **options) == first


def test_elimination_takes_as_many_groups_at_a_time_as_fit(alive, monkeypatch):
    options = {"ratio": 0.3, "block": 1, "compensate": False}
    room = 2 * 2 * ONE  # two layers' moments of inputs and of gradients
    monkeypatch.setattr(obs, "MOMENTS", room)
    assert peak(alive, "prune.channels", 5, **options) == peak(
        alive, "prune.channels", 13, **options
    )
    monkeypatch.setattr(obs, "MOMENTS", 2**30)
    whole = [peak(alive, "prune.channels", layers, **options) for layers in (5, 13)]
    assert whole[1] > 2 * whole[0]  # what it would be without portions


def test_grouped_layers_are_pruned_in_portions(alive, monkeypatch):
    monkeypatch.setattr(obs_layers, "MOMENTS", 2 * 3 * ONE)  # two layers of three groups
    short, long = (peak(alive, "prune.obs", layers, apart=3) for layers in (4, 12))
    assert long == short


def test_portions_change_no_score(monkeypatch):
    """With a loss that draws nothing, how much fits into memory does not matter."""
    program = deep(5)
    free = [group for group in groups(program) if group.frozen is None]
    batches = [(torch.randn(3, WIDTH, 2, 2),), (torch.randn(2, WIDTH, 2, 2),)]
    scene = Scene(program, free, batches, lambda outputs: outputs.pow(2).sum())
    whole = obs.Obs().removals(scene)
    monkeypatch.setattr(obs, "MOMENTS", 1)
    parts = obs.Obs().removals(scene)
    assert len(whole) == 4
    for name, removal in whole.items():
        assert torch.equal(removal.order, parts[name].order)
        assert torch.equal(removal.harm, parts[name].harm)
