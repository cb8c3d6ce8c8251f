"""Frozen and trainable quantised weights are the same numbers."""

import pytest
import torch
from torch import nn

from laconic.forms.affine import Affine
from laconic.forms.dense import Dense
from laconic.program.capture import capture
from laconic.program.freezing import form_of, freeze, is_frozen, thaw
from laconic.program.program import DEQUANTIZE, FAKE_QUANTIZE
from laconic.solvers.quantization import insertion, ranges
from laconic.solvers.quantization.weight_sites import weight_sites
from laconic.testing import zoo


def quantised(captured, bits=8):
    """The captured model with all its weights behind fake quantisation."""
    program = captured.clone()
    program.propagate()
    for site in weight_sites(program)[0]:
        weight = program.tensor(site.name)
        grid = ranges.weight_grid(weight, site.axis, "minmax", bits)
        insertion.quantize_weight(program, site, site.axis, grid)
    program.recompile()
    return program


class Tied(nn.Module):
    """One table looks tokens up and scores them."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.relu(self.embed(ids)))


TIED = (Tied().eval(), torch.arange(8).reshape(2, 4))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["plain_cnn", "resnet", "tied_autoencoder", "fused_split"])
def test_freezing_and_thawing_change_no_bit(name, bits):
    program = quantised(zoo.captured(name), bits)
    frozen = freeze(program)
    again = thaw(frozen)
    assert is_frozen(frozen) and not is_frozen(program) and not is_frozen(again)
    wanted = program.run_flat(*program.example)
    for other in (frozen, again, freeze(again)):
        for one, two in zip(wanted, other.run_flat(*program.example), strict=True):
            assert torch.equal(one, two)
    codes = [n for n, t in frozen.tensors() if t.dtype == torch.int8]
    assert codes
    for weight in codes:
        assert int(frozen.tensor(weight).abs().max()) <= 2 ** (bits - 1) - 1
        assert isinstance(again.tensor(weight), nn.Parameter)
    targets = [(n.target, n.args[3:]) for n in program.graph.nodes if n.target is FAKE_QUANTIZE]
    back = [(n.target, n.args[3:]) for n in again.graph.nodes if n.target is FAKE_QUANTIZE]
    assert targets == back


def test_the_input_is_left_as_it_was():
    program = quantised(zoo.captured("plain_cnn"))
    before = {n: t.clone() for n, t in program.tensors()}
    code = str(program.graph)
    freeze(program)
    assert str(program.graph) == code
    assert all(torch.equal(t, before[n]) for n, t in program.tensors())


def test_a_tied_weight_is_frozen_once_under_both_names():
    program = quantised(capture(*TIED))
    frozen = freeze(program)
    assert frozen.state_dict()["embed.weight"].dtype == torch.int8
    assert frozen.state_dict()["head.weight"].data_ptr() == (
        frozen.state_dict()["embed.weight"].data_ptr()
    )
    assert torch.equal(frozen(TIED[1]), program(TIED[1]))
    assert sum(n.target is DEQUANTIZE for n in frozen.graph.nodes) == 1


def test_a_thawed_program_trains():
    program = thaw(freeze(quantised(zoo.captured("plain_cnn")))).train()
    loss = sum(out.square().sum() for out in program.run_flat(*program.example))
    loss.backward()
    grads = {n: p.grad for n, p in program.named_parameters() if p.ndim > 1}
    assert grads and all(g is not None and bool(g.abs().sum() > 0) for g in grads.values())


def test_a_weight_that_is_also_read_as_it_is_stays_float():
    program = quantised(zoo.captured("plain_cnn"))
    node = next(n for n in program.graph.nodes if n.target is FAKE_QUANTIZE)
    weight = node.args[0]
    with program.graph.inserting_after(node):
        total = program.graph.call_function(torch.ops.aten.sum.default, (weight,))
    program.output_node.args = ((*program.output_node.args[0], total),)
    program.recompile()
    frozen = freeze(program)
    assert frozen.tensor(weight.target).is_floating_point()
    assert isinstance(form_of(program, weight.target), Dense)


@pytest.mark.parametrize("state", [lambda p: p, freeze], ids=["training", "frozen"])
def test_form_of_reads_both_states(state):
    program = quantised(zoo.captured("resnet"), 4)
    made = state(program)
    name = weight_sites(quantised(zoo.captured("resnet")))[0]
    assert name == []  # every weight is behind a node already, so none is left to quantise
    quantised_names = [n.args[0].target for n in program.graph.nodes if n.target is FAKE_QUANTIZE]
    for weight in quantised_names:
        form = form_of(made, weight)
        assert isinstance(form, Affine)
        assert (form.qmin, form.qmax) == (-7, 7)
        grid = ranges.on_grid(
            program.tensor(weight),
            form.axis,
            ranges.Grid(form.scale, form.zero_point, form.qmin, form.qmax),
        )
        assert torch.equal(form.decode(), grid)
        assert form.nbytes() == (form.codes.numel() + 1) // 2 + 4 * form.scale.numel()


def test_form_of_a_plain_tensor_and_of_a_tied_name():
    program = quantised(capture(*TIED))
    form = form_of(program, "head.weight")
    assert isinstance(form, Affine) and form.codes.shape == (11, 6)
    name = next(name for name, _ in program.tensors() if name.endswith("_scale"))
    dense = form_of(program, name)
    assert isinstance(dense, Dense) and dense.nbytes() == 44


def test_a_frozen_weight_without_a_noted_grid_takes_the_smallest_that_holds_its_codes():
    program = freeze(quantised(zoo.captured("plain_cnn"), 4))
    for node in program.graph.nodes:
        node.meta.pop("grid", None)
    weight = next(n.args[0].target for n in program.graph.nodes if n.target is DEQUANTIZE)
    form = form_of(program, weight)
    assert (form.qmin, form.qmax) == (-7, 7)
    thawed = thaw(program)
    for one, two in zip(
        program.run_flat(*program.example), thawed.run_flat(*program.example), strict=True
    ):
        assert torch.equal(one, two)
