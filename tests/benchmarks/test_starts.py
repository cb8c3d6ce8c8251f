"""The network that knows nothing is the same network, drawn anew."""

import torch
from benchmarks.starts import fresh, transferred

from laconic.core.recipe import Step
from laconic.methods.base import method_of
from laconic.testing import zoo


def test_a_fresh_network_has_nothing_of_the_old_one():
    program = zoo.captured("resnet")
    one, again, other = fresh(program, 0), fresh(program, 0), fresh(program, 1)
    assert str(one.graph) == str(program.graph)
    for name, tensor in program.tensors():
        assert one.tensor(name).shape == tensor.shape
        assert torch.equal(one.tensor(name), again.tensor(name))
        if tensor.ndim > 1:
            assert not torch.equal(one.tensor(name), tensor)
            assert not torch.equal(one.tensor(name), other.tensor(name))
    norms = [name for name, _ in program.tensors() if name.endswith("running_var")]
    assert norms
    for name in norms:
        assert torch.equal(one.tensor(name), torch.ones_like(one.tensor(name)))
        weight = one.tensor(name.replace("running_var", "weight"))
        assert torch.equal(weight, torch.ones_like(weight))
    kept = fresh(program, 0, keep=["*.weight"])
    assert torch.equal(kept.tensor("head.weight"), program.tensor("head.weight"))


def test_the_step_is_one_of_a_recipe():
    step = Step.from_plain(transferred(width=0.5, select="ranked"), "here")
    assert method_of(step, "here").name() == "transfer.weights"
