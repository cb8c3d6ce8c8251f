"""A layer seen as rows times a matrix gives what the layer gives."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.program.capture import capture
from laconic.statistics.gram import Gram, InputGram
from laconic.statistics.layers import layers, pick


class Addmm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Matmul(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return x @ self.weight


CASES = {
    "linear": (nn.Linear(6, 4), (3, 5, 6)),
    "addmm": (Addmm(), (3, 6)),
    "matmul": (Matmul(), (3, 5, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (2, 3, 8, 7),
    ),
    "same": (nn.Conv2d(3, 4, (3, 5), padding="same"), (2, 3, 8, 7)),
    "valid": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 8, 7)),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_times_matrix_is_the_layer(name):
    module, shape = CASES[name]
    x = torch.randn(shape)
    program = capture(module, (x,))
    (layer,) = layers(program)
    weight = program.tensor(layer.weight).detach()
    rows = layer.rows_in(x, None)
    out = rows @ layer.matrix(weight).T
    if layer.bias is not None:
        out = out + program.tensor(layer.bias).detach()
    expected = layer.rows_out(module(x).detach(), None)
    assert torch.allclose(out, expected, atol=1e-5)
    assert layer.input_positions(x) == len(rows) == layer.positions(module(x))
    chosen = torch.tensor([0, 2, len(rows) - 1])
    assert torch.equal(layer.rows_in(x, chosen), rows[chosen])
    assert torch.equal(layer.weight_from(layer.matrix(weight).double(), weight), weight)


@pytest.mark.parametrize("scale", [{"alpha": 2.0}, {"beta": 0.5}])
def test_a_scaled_product_is_no_layer(scale):
    """Its stored tensors are not the map: whoever multiplies by them would be wrong."""

    class Scaled(Addmm):
        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight, **scale)

    assert layers(capture(Scaled(), torch.randn(2, 6))) == []


def test_layers_with_one_bias_are_marked():
    """Whoever writes the bias of one would change the other."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.bias = self.a.bias

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    found = layers(capture(Shared(), torch.randn(2, 4)))
    assert [layer.shared for layer in found] == [True, True, False]


def test_shared_and_grouped_layers_are_marked():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Conv2d(4, 4, 1, groups=2)

        def forward(self, x):
            return self.b(F.relu(self.a(self.a(x)))[:, :, None, None])

    found = layers(capture(Shared(), torch.randn(2, 4)))
    assert [layer.shared for layer in found] == [True, True, False]
    assert found[-1].groups == 2


def test_gram_is_the_second_moments(generator):
    rows = torch.randn(50, 4, generator=generator) + 30
    targets = torch.randn(50, 3, generator=generator) - 5
    one, two, whole = Gram(), Gram(), Gram()
    one.update(rows[:20], targets[:20])
    two.update(rows[20:], targets[20:])
    whole.update(rows, targets)
    one.merge(two)
    x, t = rows.double(), targets.double()
    assert torch.allclose(one.covariance, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-5)
    assert torch.allclose(one.scatter, whole.scatter, rtol=1e-4, atol=1e-3)
    raw = one.raw()
    assert torch.allclose(raw.scatter, x.T @ x, rtol=1e-6)
    assert torch.allclose(raw.cross, t.T @ x, rtol=1e-6)
    assert torch.allclose(raw.target_scatter, t.square().sum(0), rtol=1e-6)


def test_halves_of_the_data_merge_even_when_rows_are_picked(monkeypatch):
    monkeypatch.setattr("laconic.statistics.layers.ROWS", 40)
    module, x = nn.Conv2d(3, 4, 3), torch.randn(4, 3, 8, 8)
    (layer,) = layers(capture(module, (x,)))
    whole, left, right = (InputGram(layer, 2, seed=3) for _ in range(3))
    whole.update(x[:2])
    whole.update(x[2:])
    left.update(x[:2])
    right.update(x[2:])
    left.merge(right)
    assert whole.gram.count == left.gram.count < 4 * 36
    assert torch.equal(whole.gram.scatter, left.gram.scatter)


def test_pick_is_ascending_and_seeded():
    chosen = pick(10**6, 100, 4, seed=1)
    assert chosen is not None
    assert bool((chosen.diff() > 0).all())
    assert torch.equal(chosen, pick(10**6, 100, 4, seed=1))
    assert not torch.equal(chosen, pick(10**6, 100, 4, seed=2))
    assert pick(10, 100, 4, seed=1) is None
