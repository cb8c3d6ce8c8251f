"""Zeros of a sparse tensor are exact, last through training, copies, storage and freezing."""

import copy

import pytest
import torch
from torch import nn

from laconic import storage
from laconic.core.errors import StorageError
from laconic.program.capture import capture
from laconic.program.freezing import freeze, thaw


@pytest.fixture
def program():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    made = capture(model, torch.randn(4, 6))
    weight = made.tensor("0.weight").detach().clone()
    weight[::2, 1::2] = 0.0
    made.set_tensor("0.weight", weight)
    made.sparse |= {"0.weight"}
    return made


def pattern(program):
    return program.tensor("0.weight").detach() == 0


def step(program, optimizer):
    for _ in range(4):
        optimizer.zero_grad()
        program(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    ],
)
def test_any_optimizer_keeps_them(program, make):
    before, zeros = program.tensor("0.weight").detach().clone(), pattern(program)
    student = program.clone().train()
    step(student, make(student.parameters()))
    assert torch.equal(pattern(student), zeros)
    assert torch.equal(program.tensor("0.weight"), before)
    moved = student.tensor("0.weight").detach()
    assert bool((moved != before)[~zeros].all())


def test_eval_mode_and_switching_gradients_off_and_on_keep_them(program):
    student = program.clone().train().eval()
    for tensor in student.parameters():
        tensor.requires_grad_(False)
        tensor.requires_grad_(True)
    step(student, torch.optim.SGD(student.parameters(), lr=0.01))
    assert torch.equal(pattern(student), pattern(program))


def test_a_tensor_that_is_replaced_in_training_is_guarded_too(program):
    student = program.clone().train()
    weight = student.tensor("0.weight").detach().clone()
    weight[1, 0] = 0.0
    student.set_tensor("0.weight", weight)
    zeros = pattern(student)
    step(student, torch.optim.SGD(student.parameters(), lr=0.01))
    assert torch.equal(pattern(student), zeros)


def test_the_gradient_elsewhere_is_untouched(program):
    free = program.clone()
    free.sparse = frozenset()
    x, zeros = torch.randn(8, 6), pattern(program)
    grads = []
    for made in (program.clone().train(), free.train(), program.clone().train().train()):
        made(x).square().sum().backward()
        grads.append(made.tensor("0.weight").grad)
    assert bool((grads[0][zeros] == 0).all()) and bool((grads[1][zeros] != 0).any())
    assert torch.equal(grads[0][~zeros], grads[1][~zeros])
    assert torch.equal(grads[0], grads[2])


def test_copies_and_files_carry_the_names(program, tmp_path):
    storage.save(program, tmp_path / "a.laconic")
    for made in (program.clone(), copy.deepcopy(program), storage.load(tmp_path / "a.laconic")):
        assert made.sparse == {"0.weight"}
    program.graph.erase_node(next(n for n in program.graph.nodes if n.op == "output"))
    program.graph.output((program.placeholders[0],))
    program.graph.eliminate_dead_code()
    program.drop_unused()
    assert program.sparse == frozenset()


def test_a_file_without_pruning_says_nothing_of_it(program, tmp_path):
    program.sparse = frozenset()
    storage.save(program, tmp_path / "a.laconic")
    assert "sparse" not in storage.read_header(tmp_path / "a.laconic")


def test_a_file_that_names_a_tensor_it_does_not_hold_is_refused(program, tmp_path):
    program.sparse = frozenset({"0.weights"})
    storage.save(program, tmp_path / "a.laconic")
    with pytest.raises(StorageError, match=r"0\.weights"):
        storage.load(tmp_path / "a.laconic")


def test_freezing_and_thawing_keep_them(program):
    again = thaw(freeze(program)).train()
    step(again, torch.optim.SGD(again.parameters(), lr=0.01))
    assert torch.equal(pattern(again), pattern(program))
