"""Ranges by the error of layers' outputs: no rule gives less of it than this one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.core.task import Task
from laconic.methods.base import Context
from laconic.methods.quantize.static import QuantizeStatic
from laconic.methods.quantize.weights import QuantizeWeights
from laconic.program.capture import capture
from laconic.program.sites import Sites
from laconic.solvers.quantization import output_ranges, ranges
from laconic.testing.contracts import own_outputs


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_error(off, rows):
    return float((rows @ off.flatten(1).T.double()).square().sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 6])
def test_no_other_rule_gives_less_error_of_the_outputs(group, symmetric):
    weight = drawn(8, 24)
    rows = drawn(200, 24, seed=1).double() * torch.logspace(1, -1, 24).double()
    moments = rows.T @ rows / len(rows)
    if group:  # of a group only its own columns count
        keep = torch.block_diag(*torch.ones(4, 6, 6)).double()
        rows = torch.linalg.cholesky(moments * keep).T
    found = {}
    for rule in ("minmax", "mse", "output"):
        grid = ranges.weight_grid(
            weight, 0, rule, 3, group=group, symmetric=symmetric, moments=moments
        )
        found[rule] = output_error(ranges.on_grid(weight, 0, grid) - weight, rows)
    assert found["output"] <= found["minmax"] * (1 + 1e-5)  # tried in float32
    assert found["output"] < found["mse"]


def test_moments_that_count_all_alike_are_the_least_squared_error():
    weight, eye = drawn(5, 3, 2, 2), torch.eye(12).double()
    plain = ranges.weight_grid(weight, 0, "mse", 4)
    told = ranges.weight_grid(weight, 0, "output", 4, moments=eye)
    assert torch.equal(plain.scale, told.scale)
    assert torch.equal(plain.scale, ranges.weight_grid(weight, 0, "output", 4).scale)


class Net(nn.Module):
    """A convolution and a linear layer; inputs have a far tail that the convolution hardly sees."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        with torch.no_grad():
            self.conv.weight[:, 2] *= 1e-3

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def tailed():
    torch.manual_seed(0)
    program = capture(Net().eval(), drawn(2, 3, 6, 6))
    data = [(drawn(8, 3, 6, 6, seed=i) * torch.tensor([1.0, 1.0, 40.0])[:, None, None],)
            for i in range(3)]  # fmt: skip
    task = Task(loss=min, metric=min, calibration=data, split=lambda batch: (batch, None))
    return program, Context(task=task, original=program)


def test_moments_are_those_of_the_columns(tailed):
    program, context = tailed
    batches = [tuple(batch) for batch in context.task.calibration]
    names = ["conv.weight", "head.weight"]
    found = output_ranges.moments(program, names, batches, context.progress)
    rows = torch.cat([F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1) for (x,) in batches])
    wanted = (rows.T.double() @ rows.double()) / len(rows)
    # centred in float32, in parts: as far as its squares are exact
    torch.testing.assert_close(found["conv.weight"], wanted, rtol=1e-4, atol=1e-3)
    assert found["head.weight"].shape == (6, 6)


def test_a_tail_that_nobody_reads_is_clipped(tailed):
    program, context = tailed
    high = {}
    for rule in ("mse", "output"):
        options = QuantizeStatic(range=rule, skip_above=None, symmetric=True)
        outcome = options.apply(program, Sites(("conv*",)), context)
        high[rule] = outcome.resolved["ranges"]["x"][1]
    assert high["output"] < 0.7 * high["mse"]


def test_methods_take_the_rule_and_replay():
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), drawn(4, 8))
    context = Context(task=own_outputs(program), original=program)
    for method in (
        QuantizeStatic(weight_range="output", range="output", bits=4, samples=16),
        QuantizeWeights(weight_range="output", bits=3, group=4, first_last=None),
    ):
        made = method.apply(program, Sites(), context)
        again = type(method)(**made.resolved).apply(program, Sites(), context)
        for name, tensor in made.program.state_dict().items():
            assert torch.equal(tensor, again.program.state_dict()[name])
