"""quantize.train with two-sided ternary weights: three values, gradients as published, codebooks."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from laconic import storage
from laconic.forms.codebook import Codebook
from laconic.methods.base import Context
from laconic.methods.quantize.train import QuantizeTrain
from laconic.program.capture import capture
from laconic.program.freezing import form_of
from laconic.program.sites import Sites
from laconic.solvers.quantization import ternary_layers
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.testing.contracts import own_outputs

SHORT = {"steps": 6, "evaluations": 2, "precision": "fp32", "teacher": "torch", "bits": 2,
         "ternary": "two-sided", "lr": 0.02, "samples": 8}  # fmt: skip


class Net(nn.Module):
    """[batch, 3, 6, 6] -> [batch, 4], one factor of the batch norm is negative."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.inner, self.bn = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.bn.weight[2] *= -1
            self.head.weight[1, 1] *= 0

    def forward(self, x):
        x = torch.relu(self.bn(self.inner(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Net().eval(), torch.randn(4, 3, 6, 6))


def train(program, **options):
    context = Context(task=own_outputs(program), original=program, seed=3)
    return QuantizeTrain(**{**SHORT, **options}).apply(program, Sites(), context)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_a_weight_ends_as_three_values_and_replays(program, tmp_path, per_channel, fold):
    outcome = train(program, per_channel=per_channel, fold=fold)
    made, inner = outcome.program, form_of(outcome.program, "inner.weight")
    assert isinstance(inner, Codebook)
    assert inner.zero and inner.low == -1 and set(inner.codes.unique().tolist()) <= {-1, 0, 1}
    assert inner.axis == (0 if per_channel or fold else None)
    assert not isinstance(form_of(made, "stem.weight"), Codebook)  # the first keeps 8 bits
    again = QuantizeTrain(**outcome.resolved).apply(
        program, Sites(), Context(task=own_outputs(program), original=program, seed=3)
    )
    storage.save(made, tmp_path / "ternary.laconic")
    for other in (again.program, storage.load(tmp_path / "ternary.laconic")):
        assert torch.equal(other(program.example[0]), made(program.example[0]))
    assert inner.nbytes() == -(-inner.codes.numel() // 4) + 4 * inner.values.numel()


def test_both_values_of_a_layer_move_apart(program):
    made = train(program, per_channel=False, fold=False, steps=20).program
    low, _, high = form_of(made, "inner.weight").values.tolist()
    assert low < 0 < high and low != -high


def test_gradients_are_those_of_trained_ternary_quantization():
    torch.manual_seed(0)
    program = capture(nn.Linear(7, 5, bias=False).eval(), torch.randn(3, 7)).train()
    (site,), _ = weight_sites(program)
    held = ternary_layers.insert_weight(program, site, None, 0.3)
    program.recompile()
    x = torch.randn(3, 7)
    out = program(x)
    weight, pair = program.tensor("weight"), program.tensor(held.scale)
    limit = 0.3 * weight.abs().max()
    above, below = weight > limit, weight < -limit
    three = torch.where(above, pair[1], torch.where(below, -pair[0], 0.0))
    torch.testing.assert_close(out, x @ three.T)
    aim = torch.randn_like(out)
    (out * aim).sum().backward()
    grad = aim.T @ x  # of the three-valued weight
    wanted = grad * torch.where(above, pair[1], torch.where(below, pair[0], 1.0))
    torch.testing.assert_close(weight.grad, wanted.detach())
    torch.testing.assert_close(pair.grad, torch.stack([-grad[below].sum(), grad[above].sum()]))


def test_first_values_are_the_means_beyond_the_threshold():
    weight = torch.tensor([[-2.0, 0.1, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    found = ternary_layers.first_values(weight, 0, 0.3)
    torch.testing.assert_close(found, torch.tensor([[2.0, 2.0], [0.9, 0.9]]))  # 3 * 0.3 = 0.9


def test_zeros_stay_zero(program):
    made = train(program, first_last=None).program
    assert float(form_of(made, "head.weight").decode()[1, 1]) == 0.0


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValidationError, match="lowering"):
        QuantizeTrain(bits=2, ternary="two-sided", lowering=(4,))
    with pytest.raises(ValidationError, match="bits: 2"):
        QuantizeTrain(bits=4, ternary="two-sided")
