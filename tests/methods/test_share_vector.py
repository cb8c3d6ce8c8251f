"""What `share.vector` promises: exact where few runs differ, honest bytes, vectors that train."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from laconic import storage
from laconic.core.errors import DataError, RecipeError
from laconic.core.task import classification
from laconic.engine.writeback import write_back
from laconic.forms import build, vectors
from laconic.methods.base import Context
from laconic.methods.share.vector import Vector
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.freezing import form_of
from laconic.program.groups import groups
from laconic.program.program import VECTORS
from laconic.program.sites import Sites
from laconic.runtimes._export import lower_weights
from laconic.solvers.sharing import vector_kmeans
from laconic.testing.contracts import own_outputs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.fc = nn.Linear(8, 24)
        self.head = nn.Linear(24, 6)

    def forward(self, x):
        x = torch.relu(self.up(torch.relu(self.conv(x)))).mean((2, 3))
        return self.head(torch.relu(self.fc(x)))


def setting():
    torch.manual_seed(0)
    model = Net().eval()
    program = capture(model, torch.randn(2, 4, 5, 5))
    return model, program, Context(task=own_outputs(program), original=program, seed=1)


def outputs(program, like):
    with torch.no_grad():
        return program.run_flat(*like.example)[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_form_of_few_different_runs_is_exact(axis):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 3, generator=generator)
    shape = (4, 5, 3) if axis == 0 else (5, 4, 3)
    codes = torch.randint(7, (4, 5), generator=generator).to(torch.uint8)
    form = vectors.Vectors(codes, values, shape, axis)
    weight = form.decode()
    assert weight.shape == shape
    for row in range(4):
        for run in range(5):  # a run is what follows the first index on the axis and one more
            place = (row, run) if axis == 0 else (run, row)
            assert torch.equal(weight[place], values[int(codes[row, run])])
    runs = vectors.runs_of(weight, 3, axis).flatten(0, 1)
    assert torch.equal(vectors.nearest(runs, values).reshape(4, 5).to(torch.uint8), codes)
    again = build(form.kind, form.tensors(), form.meta())
    assert torch.equal(again.decode(), weight)
    assert form.nbytes() == (20 * 3 + 7) // 8 + 7 * 3 * 4


def test_the_gradient_is_that_of_indexing():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(7, (4, 5), generator=generator).to(torch.uint8)
    one = torch.randn(7, 3, generator=generator, requires_grad=True)
    two = one.detach().clone().requires_grad_(True)
    slope = torch.randn(5, 4, 3, generator=generator)
    (VECTORS(codes, one, [5, 4, 3], 1) * slope).sum().backward()
    (two[codes.long()].movedim(0, 1) * slope).sum().backward()
    assert torch.allclose(one.grad, two.grad, rtol=1e-6, atol=1e-6)


def test_enough_vectors_give_the_weight_back():
    model, program, context = setting()
    outcome = Vector(dim=4, codewords=4096, rounds=1).apply(program, Sites(("fc",)), context)
    assert not outcome.figures  # as many vectors as runs store no less, which a note says
    assert any("stays float" in note for note in outcome.notes)
    with torch.no_grad():
        program.tensor("fc.weight").copy_(program.tensor("fc.weight")[:2].repeat(12, 1))
    outcome = Vector(dim=4, codewords=4).apply(program, Sites(("fc",)), context)
    assert torch.equal(outputs(outcome.program, program), outputs(program, program))
    assert outcome.figures["fc.weight"]["error"] == 0
    assert isinstance(form_of(outcome.program, "fc.weight"), vectors.Vectors)
    write_back(outcome.program, model)
    assert torch.equal(model.fc.weight, program.tensor("fc.weight"))


def test_runs_are_the_largest_divisors_and_one_list_serves_them():
    _, program, context = setting()
    outcome = Vector(dim=9, codewords=8, per="length").apply(program, Sites(), context)
    shapes = {n: tuple(form_of(outcome.program, n).codes.shape) for n in outcome.figures}
    assert shapes == {"conv.weight": (16, 4), "up.weight": (8, 8), "fc.weight": (24, 1),
                      "head.weight": (6, 3)}  # fmt: skip
    lists = {name: figure["list"] for name, figure in outcome.figures.items()}
    assert lists["up.weight"] == lists["fc.weight"] == lists["head.weight"] == "up.weight_vectors"
    assert outcome.resolved["found"]["fc.weight"] == "up.weight"


def test_bytes_are_those_of_the_file(tmp_path):
    _, program, context = setting()
    sizes = {}
    for words in (4, 16):
        outcome = Vector(dim=4, codewords=words).apply(program, Sites(), context)
        sizes[words] = storage.save(outcome.program, tmp_path / "m.laconic")
        predicted = storage.predict(outcome.program)
        assert predicted.total == sizes[words]
        form = form_of(outcome.program, "conv.weight")
        coded = predicted.tensors["conv.weight"] + predicted.tensors["conv.weight_vectors"]
        assert coded <= form.nbytes() + 24  # the heads of two tensors' data
    assert sizes[4] < sizes[16] < storage.predict(program).total


def test_weights_decide_where_vectors_lie():
    """Elements that do not count are not looked at: clusters follow the others exactly."""
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]])[torch.arange(90) % 3]
    runs = true + torch.stack([torch.zeros(90), 5 * torch.randn(90, generator=generator)], 1)
    weights = torch.tensor([1.0, 0.0]).expand(90, 2)
    found = vector_kmeans.centroids(runs, 3, weights, generator)
    # a least weight of 1e-4 is kept, so that 25 of spread count as 0.0025 beside distances of 2
    assert sorted(found[:, 0].tolist()) == pytest.approx([-1.0, 1.0, 3.0], abs=1e-4)
    with pytest.raises(DataError, match="NaN"):
        vector_kmeans.centroids(torch.full((3, 2), torch.nan), 2, None, generator)


def test_more_rounds_never_err_more():
    generator = torch.Generator().manual_seed(0)
    runs = torch.randn(400, 4, generator=generator)
    errors = []
    for rounds in (1, 3, 30):
        found = vector_kmeans.centroids(runs, 16, None, torch.Generator().manual_seed(3), rounds)
        errors.append(float((runs - found[vectors.nearest(runs, found)]).square().sum()))
    assert errors[0] >= errors[1] >= errors[2]
    # the mean alone errs by the variance; 16 vectors in 4 dimensions by less than two thirds of it
    assert errors[2] < 0.67 * float((runs - runs.mean(0)).square().sum())


def test_vectors_train_and_export():
    _, program, context = setting()
    made = Vector(dim=4, codewords=8).apply(program, Sites(), context).program.train()
    x = torch.randn(8, 4, 5, 5)
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.05)
    before = made.tensor("conv.weight_vectors").detach().clone()
    losses = []
    for _ in range(5):
        loss = made(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not torch.equal(made.tensor("conv.weight_vectors"), before)
    made.eval()
    module = lower_weights(made)
    assert torch.equal(module(*program.example)[0], outputs(made, program))
    assert not any("laconic" in str(node.target) for node in module.graph.nodes)
    assert cost(made).macs == cost(program).macs
    assert all(group.frozen for group in groups(made) if "conv" in group.name)


def test_what_the_data_never_excite_still_gets_the_closest_vector():
    """Half of the inputs are always 0: no reason to store nonsense for their weights."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 64).eval()
    program = capture(layer, torch.randn(4, 32))
    batch = torch.cat([torch.randn(64, 16), torch.zeros(64, 16)], 1)
    context = Context(task=classification(calibration=[batch]), original=program)
    outcome = Vector(dim=4, codewords=16, weighted="hessian").apply(program, Sites(), context)
    away = form_of(outcome.program, "weight").decode() - layer.weight
    assert away[:, 16:].norm() < layer.weight[:, 16:].norm()  # 0.5 of it; any vector: sqrt(2)


def test_what_it_cannot_do_it_says():
    _, program, context = setting()
    with pytest.raises(RecipeError, match="match nothing"):
        Vector(dim={"fcc*": 4}).apply(program, Sites(), context)
    with pytest.raises(RecipeError, match="runs of 0"):
        Vector(dim=0).apply(program, Sites(), context)
    for options in ({"codewords": 1}, {"rounds": 0}, {"per": "row"}):
        with pytest.raises(ValidationError):
            Vector(**options)
    outcome = Vector(dim={"fc": 4}, codewords=4).apply(program, Sites(), context)
    assert any("head.weight" in n and "no pattern" in n for n in outcome.notes)
    program.sparse = frozenset({"fc.weight"})
    outcome = Vector(codewords=4).apply(program, Sites(("fc",)), context)
    assert any("zeros" in note for note in outcome.notes)
    other = {"found": {"fc.weight": [[0.0, 1.0, 2.0]]}, "dim": 4}
    program.sparse = frozenset()
    with pytest.raises(RecipeError, match="very program"):
        Vector(**other).apply(program, Sites(), context)
    with torch.no_grad():
        program.tensor("fc.weight")[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"fc\.weight"):
        Vector(dim=4, codewords=4).apply(program, Sites(("fc",)), context)
