"""Diagonals of the curvature against autograd."""

import torch
from torch import nn

from laconic.program.capture import capture
from laconic.solvers.weights import curvature


class Net(nn.Module):
    """A strided, padded and a grouped convolution, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.two = nn.Conv2d(4, 6, (2, 3), groups=2)
        self.head = nn.Linear(6 * 3 * 2, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.relu(self.one(x)))).flatten(1))


NAMES = ["one.weight", "two.weight", "head.weight"]


def made():
    torch.manual_seed(0)
    model = Net().eval()
    return (
        model,
        capture(model, torch.randn(2, 3, 8, 8)),
        [(torch.randn(3, 3, 8, 8),) for _ in range(2)],
    )


def test_input_squares_are_the_gradient_of_a_linear_map_of_squares():
    """d/dw of the sum of conv(x^2, w) is the sum of x^2 under w."""
    model, program, batches = made()
    found = curvature.input_squares(program, NAMES, batches)
    x = torch.cat([batch for (batch,) in batches])
    inputs = {}
    for name, module in (("one", model.one), ("two", model.two), ("head", model.head)):
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    model(x)
    for name, module in (("one", model.one), ("two", model.two), ("head", model.head)):
        out = module(inputs[name].detach().square())
        (grad,) = torch.autograd.grad(out.sum(), module.weight)
        positions = out.numel() // (out.shape[1])
        expected = grad.double() / positions
        assert torch.allclose(found[f"{name}.weight"], expected, rtol=1e-4, atol=1e-6)


def test_fisher_is_the_mean_of_squared_gradients_of_single_samples():
    model, program, batches = made()
    found = curvature.fisher(program, NAMES, batches, lambda out: out.square().sum())
    expected = {name: 0.0 for name in NAMES}
    samples = [sample for (batch,) in batches for sample in batch.split(1)]
    for sample in samples:
        model.zero_grad()
        model(sample).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in expected:
                expected[name] += parameter.grad.double().square() / len(samples)
    for name in NAMES:
        scale = float(expected[name].abs().max())
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-5 * scale)


def test_what_no_linear_map_reads_is_left_out():
    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)

        def forward(self, ids):
            return self.table(ids)

    program = capture(Embed(), torch.randint(0, 7, (2, 3)))
    assert curvature.input_squares(program, ["table.weight"], [program.example]) == {}
