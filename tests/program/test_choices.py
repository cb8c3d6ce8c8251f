"""`laconic.choose`: a row's choice, in a graph that trains, is stored, is cut and is exported."""

import pytest
import torch
from torch import nn

from laconic import runtimes, storage
from laconic.program import surgery
from laconic.program.capture import capture
from laconic.program.choices import CHOOSE, choices, choose
from laconic.program.cost import cost
from laconic.program.groups import groups


class Exits(nn.Module):
    """A convolution, an exit behind it, and a second one for the rows that are unsure."""

    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.early = nn.Linear(width, 4)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.late = nn.Linear(width, 4)
        self.register_buffer("threshold", torch.tensor(0.3))

    def forward(self, x):
        x = self.first(x).relu()
        early = self.early(x.mean((2, 3)))
        unsure = early.softmax(-1).amax(-1) < self.threshold
        y = torch.ops.laconic.choose(unsure, x + self.second(x), x)
        return torch.ops.laconic.choose(unsure, self.late(y.mean((2, 3))), early)


@pytest.fixture
def program():
    torch.manual_seed(0)
    made = capture(Exits().eval(), (torch.randn(4, 3, 8, 8),))
    made.set_tensor("threshold", _confidences(made).median())
    return made


def _confidences(program):
    early = next(node for node in program.graph.nodes if node.name == "amax")
    graph = program.clone()
    node = next(n for n in graph.graph.nodes if n.name == early.name)
    graph.output_node.args = ((node,),)
    graph.recompile()
    with torch.no_grad():
        return graph.run_flat(*program.example)[0]


def test_each_row_takes_its_side_and_gives_it_the_gradient():
    rows = torch.tensor([True, False, True])
    there, otherwise = torch.randn(2, 3, 2, 2).requires_grad_().unbind()
    there.retain_grad()
    otherwise.retain_grad()
    made = torch.ops.laconic.choose(rows, there, otherwise)
    assert all(torch.equal(made[i], (there if rows[i] else otherwise)[i]) for i in range(3))
    made.sum().backward()
    assert torch.equal(there.grad.sum((1, 2)), 4.0 * rows)
    assert torch.equal(there.grad + otherwise.grad, torch.ones_like(there))


def test_capture_keeps_it_and_the_graph_is_what_the_module_is(program):
    assert len(choices(program)) == 2
    torch.manual_seed(0)
    module = Exits().eval()
    module.threshold.copy_(program.tensor("threshold"))
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(program(x), module(x))
    taken = _confidences(program) < program.tensor("threshold")
    assert 0 < int(taken.sum()) < len(taken)  # the tests below see both sides


def test_stored_and_loaded_it_gives_the_same(program, tmp_path):
    storage.save(program, tmp_path / "model.laconic")
    loaded = storage.load(tmp_path / "model.laconic")
    assert len(choices(loaded)) == 2
    assert torch.equal(loaded(program.example[0]), program(program.example[0]))


def test_channels_are_cut_through_it(program):
    found = groups(program)
    (group,) = [g for g in found if g.size == 6 and g.frozen is None]
    kept = torch.tensor([0, 2, 3, 5])
    small, _ = surgery.cut(program, {group.name: kept})
    assert small.tensor("second.weight").shape[:2] == (4, 4)
    zeroed = program.clone()
    mask = torch.zeros(6).index_fill(0, kept, 1.0)
    for name in ("first.weight", "first.bias", "second.weight", "second.bias"):
        tensor = zeroed.tensor(name).detach()
        zeroed.set_tensor(name, tensor * mask.reshape(-1, *[1] * (tensor.ndim - 1)))
    with torch.no_grad():
        torch.testing.assert_close(small(*program.example), zeroed(*program.example))


def test_it_costs_nothing_and_everybody_knows_it(program):
    held = cost(program)
    assert not held.unknown
    assert held.macs == 64 * 9 * (3 * 6 + 6 * 6) + 2 * 6 * 4


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_compute_it(program, tmp_path, runtime):
    engine = runtimes.get(runtime)
    path = engine.write(program, tmp_path / f"model{engine.suffix}")
    (found,) = engine.load(path, threads=1).run([program.example[0].numpy()])
    with torch.no_grad():
        wanted = program(*program.example)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected bool"):
        choose(torch.ones(2), torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="two alike"):
        choose(torch.ones(2, dtype=torch.bool), torch.ones(2, 3), torch.ones(2, 1))
    assert torch.ops.laconic.choose.default is CHOOSE
