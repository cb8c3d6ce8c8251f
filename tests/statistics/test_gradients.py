import torch
from torch import nn

from laconic.core.task import Task, classification
from laconic.program.capture import capture
from laconic.statistics.gradients import sampled_loss, sensitivities
from laconic.statistics.layers import layers


class Branches(nn.Module):
    """The same value is read by a layer and by a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = torch.tanh(self.a(x))
        return y + self.b(y)


def test_input_gradient_is_the_part_through_this_node():
    model = Branches()
    program = capture(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    first, second = layers(program)
    (seen,) = sensitivities(
        program,
        [(x,)],
        [first.node, second.node],
        lambda out: out.pow(3).sum(),
        lambda b: len(b[0]),
    )
    y = torch.tanh(model.a(x)).detach()
    inner = y.clone().requires_grad_()
    (y + model.b(inner)).pow(3).sum().backward()
    value, gradient = seen.inputs[second.node]
    assert seen.samples == 3
    assert torch.allclose(value, y, atol=1e-6)
    assert torch.allclose(gradient, inner.grad, atol=1e-4)
    assert all(p.grad is None and p.requires_grad for p in program.parameters())


def test_sampled_labels_give_the_fisher_information():
    """E[g g^T] of sampled labels is diag(p) - p p^T for the gradient at the logits."""
    logits = torch.tensor([2.0, 0.0, -1.0])
    loss = sampled_loss(classification(), torch.Generator().manual_seed(0))
    rows = logits.repeat(20000, 1).requires_grad_()
    loss(rows).backward()
    chances = logits.softmax(0)
    fisher = chances.diag() - torch.outer(chances, chances)
    found = rows.grad.T @ rows.grad / len(rows)
    assert torch.allclose(found, fisher, atol=0.02)  # 3 standard errors of 20,000 draws


def test_temperature_flattens_and_other_outputs_get_unit_gaussians():
    cold = sampled_loss(classification(), torch.Generator().manual_seed(0), 1.0)
    warm = sampled_loss(classification(), torch.Generator().manual_seed(0), 10.0)
    sure = torch.tensor([[30.0, 0.0]]).repeat(1000, 1)
    assert float(cold(sure)) < 1e-3 < float(warm(sure)) / 1000
    task = Task(loss=lambda o, t: o.sum(), metric=lambda o, t: o)
    out = (torch.ones(5000, 2) * 3).requires_grad_()
    sampled_loss(task, torch.Generator().manual_seed(0))(out).backward()
    second = out.grad.T @ out.grad / len(out)
    assert torch.allclose(second * 9, torch.eye(2), atol=0.08)
