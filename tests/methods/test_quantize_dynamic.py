"""Activations that find their range at run time: the same in the Program and in every runtime."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from laconic import storage
from laconic.core.errors import DataError
from laconic.core.registry import load
from laconic.methods.base import Context, method_class
from laconic.program.capture import capture
from laconic.program.freezing import form_of, freeze
from laconic.program.program import DYNAMIC_QUANTIZE
from laconic.program.sites import Sites
from laconic.runtimes.base import Runtime
from laconic.runtimes.inductor import _exported


class Net(nn.Module):
    """Convolutions (one grouped), linear layers on sequences with and without bias, and on rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, groups=2)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.conv(x)))).flatten(2).transpose(1, 2)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Net().eval(), torch.randn(2, 3, 12, 12))


def apply(program, runtime="onnxruntime", **options):
    context = Context(task=None, original=program, runtime=runtime)
    return method_class("quantize.dynamic")(**options).apply(program, Sites(), context)


OPTIONS = [
    {},
    {"convolutions": True},
    {"convolutions": True, "per_channel": False},
    {"per_token": True},
    {"activation_bits": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_computes_what_the_program_does(program, runtime, options, tmp_path):
    made = freeze(apply(program, **options).program)
    backend = load("laconic.runtimes", runtime, Runtime)()
    path = backend.write(made, tmp_path / f"m{backend.suffix}")
    found = backend.load(path).run([value.numpy() for value in made.example])
    for one, other in zip(made.run_flat(*made.example), found, strict=True):
        # integer sums are exact; what differs is the order of the float32 sums around them
        assert np.allclose(one.detach().numpy(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS[1:4], ids=str)
def test_what_inductor_compiles_computes_the_same(program, options):
    made = freeze(apply(program, **options).program)
    lowered = _exported(made, "fp32", None, 1).module()
    for one, other in zip(made.run_flat(*made.example), lowered(*made.example), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_products_are_integer_operators_in_the_file(program, tmp_path):
    backend = load("laconic.runtimes", "onnxruntime", Runtime)()

    def kinds(**options):
        path = backend.write(apply(program, **options).program, tmp_path / "m.onnx")
        held = onnx.load(str(path)).graph
        found = {i.name for i in held.initializer if i.data_type == onnx.TensorProto.INT8}
        return Counter(node.op_type for node in held.node), found

    plain, codes = kinds()
    assert plain["MatMulInteger"] == 3 and plain["Conv"] == 2 and len(codes) == 3  # nothing twice
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(plain)
    every, codes = kinds(convolutions=True)
    assert every["MatMulInteger"] == 3 and every["ConvInteger"] == 2 and len(codes) == 5
    floats, _ = kinds(per_token=True)
    assert "MatMulInteger" not in floats


def test_what_has_no_kernel_is_said(program):
    assert any("each token" in note for note in apply(program, per_token=True).notes)
    assert any("4 bits" in note for note in apply(program, activation_bits=4).notes)
    assert any("in floats" in note for note in apply(program, runtime="openvino").notes)
    notes = apply(program).notes
    assert len(notes) == 2 and all("convolution" in note for note in notes)


def test_a_token_does_not_see_the_others(program):
    made = apply(program, per_token=True).program
    places = [node for node in made.graph.nodes if node.target is DYNAMIC_QUANTIZE]
    assert len(places) == 3 and all(node.args[1:] == (8, True) for node in places)
    x = program.example[0]
    one = made.run_flat(torch.cat([x[:1], 100 * x[1:]]))[0][0]
    assert torch.allclose(one, made.run_flat(x)[0][0], rtol=1e-5, atol=1e-6)


def test_it_trains_on_and_survives_storage(program, tmp_path):
    made = apply(program, convolutions=True).program
    made.run_flat(*made.example)[0].square().sum().backward()
    grads = [made.tensor(n).grad for n in ("conv.weight", "up.weight", "head.weight")]
    assert all(grad is not None and bool(grad.any()) for grad in grads)
    frozen = freeze(made)
    storage.save(frozen, tmp_path / "m.laconic")
    read = storage.load(tmp_path / "m.laconic")
    for one, other in zip(
        frozen.run_flat(*made.example), read.run_flat(*made.example), strict=True
    ):
        assert torch.equal(one, other)
    assert form_of(read, "up.weight").codes.dtype == torch.int8


def test_weights_that_are_not_finite_are_refused_by_name(program):
    broken = program.clone()
    broken.set_tensor("up.weight", torch.full((12, 8), float("nan")))
    with pytest.raises(DataError, match="up.weight"):
        apply(broken)
