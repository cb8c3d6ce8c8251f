"""The Program itself: tensors by name, copies, shapes, and errors that name their node."""

import copy

import pytest
import torch
from torch import fx, nn

from laconic.core.errors import SurgeryError
from laconic.program.capture import capture
from laconic.testing import zoo


@pytest.fixture
def program():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = nn.Parameter(torch.eye(4))
    return capture(model, torch.ones(2, 6))


def test_set_tensor_keeps_parameters_parameters(program):
    program.set_tensor("0.weight", torch.zeros(4, 6))
    assert isinstance(program.tensor("0.weight"), nn.Parameter)
    program.set_tensor("0.weight", torch.zeros(4, 6, dtype=torch.int8))
    assert not isinstance(program.tensor("0.weight"), nn.Parameter)
    assert "0.weight" in dict(program.named_buffers())


def test_add_tensor_never_overwrites(program):
    assert program.add_tensor("0.scale", torch.ones(1)) == "0.scale"
    assert program.add_tensor("0.scale", torch.zeros(1)) == "0.scale_2"
    assert program.tensor("0.scale").item() == 1
    assert set(program.drop_unused()) == {"0.scale", "0.scale_2"}


def test_unknown_tensors_are_named(program):
    with pytest.raises(SurgeryError, match=r"9\.weight: the program has no such tensor"):
        program.tensor("9.weight")


def test_propagate_writes_concrete_shapes(program):
    program.propagate()
    shapes = {n.name: n.meta["shape"] for n in program.graph.nodes if n.op != "output"}
    assert shapes["linear_2"] == (2, 2)
    program.propagate((torch.ones(7, 6),))
    assert next(n for n in program.graph.nodes if n.name == "linear_2").meta["shape"] == (7, 2)


class Compared(fx.Interpreter):
    """A real run; every tensor has the shape and dtype that stand at its node."""

    def run_node(self, n):
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            assert (n.meta["shape"], n.meta["dtype"]) == (tuple(value.shape), value.dtype), n
        return value


@pytest.mark.parametrize("name", ["resnet", "fused_split", "tied_language_model"])
def test_propagated_shapes_are_those_of_a_run(name):
    program = zoo.captured(name)
    for held, tensor in list(program.tensors()):
        if tensor.ndim == 2:  # strides of its own
            program.set_tensor(held, tensor.detach().t().contiguous().t())
    program.propagate()
    with torch.no_grad():
        Compared(program, graph=program.graph).run(*program.example)


def test_propagate_names_the_node_that_does_not_fit(program):
    program.set_tensor("2.weight", torch.zeros(4, 5))
    with pytest.raises(SurgeryError, match=r"linear_1 \(2\)"):
        program.propagate()


def test_deepcopy_is_independent(program):
    twin = copy.deepcopy(program)
    with torch.no_grad():
        twin.tensor("0.weight").zero_()
    assert program.tensor("0.weight").abs().sum() > 0
    x = torch.ones(3, 6)
    assert not torch.equal(program(x), twin(x))


def test_load_state_dict_does_not_reach_a_clone(program):
    x = torch.ones(3, 6)
    expected = program(x)
    twin = program.clone()
    twin.load_state_dict({k: torch.zeros_like(v) for k, v in twin.state_dict().items()})
    assert torch.equal(program(x), expected)
    assert twin(x).abs().sum() == 0


def test_moving_rewrites_devices_inside_the_graph():
    class Ramp(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight + torch.arange(3, device=x.device)

    program = capture(Ramp(), torch.ones(2, 3))
    moved = program.clone().to("meta")
    devices = {n.kwargs["device"].type for n in moved.graph.nodes if "device" in n.kwargs}
    assert devices == {"meta"}
    assert moved(torch.ones(2, 3, device="meta")).device.type == "meta"
    assert program(torch.ones(2, 3)).device.type == "cpu"


def test_compiles_and_exports_again(program):
    x = torch.ones(5, 6)
    again = torch.export.export(program.as_graph_module(), (x,)).module()
    assert torch.equal(again(x)[0], program(x))


def test_a_user_s_optimizer_stays_valid_after_train(program):
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
    before = program.tensor("0.weight").detach().clone()
    program.train()
    program(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert not torch.equal(program.tensor("0.weight"), before)
