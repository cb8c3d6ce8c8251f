"""What `share.hash` promises: buckets alone are stored, fitted by least squares, and train."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from laconic import storage
from laconic.core.errors import DataError, RecipeError
from laconic.engine.writeback import write_back
from laconic.forms import build, hashed
from laconic.methods.base import Context
from laconic.methods.share.hash import Hash
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.freezing import form_of
from laconic.program.program import HASHED
from laconic.program.sites import Sites
from laconic.runtimes._export import lower_weights
from laconic.testing.contracts import own_outputs


def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)).eval()
    program = capture(model, torch.randn(2, 3, 5, 5))
    return model, program, Context(task=own_outputs(program), original=program, seed=1)


def matrix(count, buckets, seed):
    """Positions by buckets: the sign where a position falls into a bucket."""
    where, negative = hashed.places(count, buckets, seed)
    made = torch.zeros(count, buckets, dtype=torch.float64)
    made[torch.arange(count), where] = torch.where(negative, -1.0, 1.0).double()
    return made


def test_the_hash_is_the_one_that_the_page_states():
    """Plain Python's integers, 32 bits, as in docs/format.md."""

    def mixed(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    for seed in (0, 7, 2**32 - 1):
        where, negative = hashed.places(50, 13, seed)
        for i in range(50):
            drawn = mixed(mixed((i + 0x9E3779B9 * (seed + 1)) % 2**32) ^ seed)
            assert int(where[i]) == drawn * 13 >> 32
            assert bool(negative[i]) == bool(mixed(drawn ^ 0x9E3779B9) & 1)


def test_buckets_are_filled_evenly_and_signs_are_fair():
    count, buckets = 100_000, 50
    where, negative = hashed.places(count, buckets, 3)
    filled = torch.bincount(where, minlength=buckets).double()
    expected = count / buckets
    # chi-square with 49 degrees of freedom is beyond 95 with a chance below 1e-4
    assert float(((filled - expected) ** 2 / expected).sum()) < 95
    assert abs(float(negative.double().mean()) - 0.5) < 4 * 0.5 / count**0.5
    other, _ = hashed.places(count, buckets, 4)
    assert abs(float((other == where).double().mean()) - 1 / buckets) < 0.005


@pytest.mark.parametrize("weighted", [False, True])
def test_the_fit_is_least_squares(weighted):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    weights = torch.rand(6, 7, generator=generator, dtype=torch.float64) + 0.1
    design = matrix(42, 11, 5)
    roots = weights.flatten().sqrt()[:, None] if weighted else torch.ones(42, 1).double()
    solved = torch.linalg.lstsq(
        design * roots, x.flatten()[:, None] * roots, driver="gelsd"
    ).solution[:, 0]  # an empty bucket is a zero column: not every driver bears it
    found = hashed.fitted(x, 11, 5, weights if weighted else None)
    assert torch.allclose(found, solved, rtol=1e-9, atol=1e-9)
    form = hashed.Hashed(found, (6, 7), 5)
    assert torch.allclose(form.decode().flatten(), design @ found)
    assert torch.equal(build("hashed", form.tensors(), form.meta()).decode(), form.decode())


def test_the_gradient_is_the_signed_sum():
    values = torch.randn(11, requires_grad=True)
    slope = torch.randn(6, 7)
    (HASHED(values, [6, 7], 5) * slope).sum().backward()
    expected = matrix(42, 11, 5).T @ slope.double().flatten()
    assert torch.allclose(values.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_only_buckets_are_stored(tmp_path):
    model, program, context = setting()
    outcome = Hash(ratio=0.25).apply(program, Sites(), context)
    made = outcome.program
    assert tuple(made.tensor("3.weight").shape) == (180,)
    assert outcome.figures["3.weight"]["bytes"] == [2880, 720]
    size = storage.save(made, tmp_path / "m.laconic")
    assert storage.predict(made).total == size
    # a byte of each float at most is saved by its coder, which it costs one byte to say
    assert storage.predict(made).tensors["3.weight"] <= 721
    loaded = storage.load(tmp_path / "m.laconic")
    with torch.no_grad():
        expected = made.run_flat(*program.example)[0]
        assert torch.equal(loaded.run_flat(*program.example)[0], expected)
        module = lower_weights(loaded)
        assert torch.equal(module(*program.example)[0], expected)
        write_back(made, model)
        assert torch.allclose(model(program.example[0]), expected, rtol=1e-5, atol=1e-6)
    assert cost(made).macs == cost(program).macs
    assert cost(made).params == 180 + 54 + 18
    assert isinstance(form_of(made, "0.weight"), hashed.Hashed)


def test_a_hashed_weight_is_found_again():
    _, program, context = setting()
    first = Hash(ratio=0.25, seed=9).apply(program, Sites(), context).program
    dense = capture(nn.Sequential(nn.Linear(72, 10)), torch.randn(2, 72))
    form = form_of(first, "3.weight")
    values = hashed.fitted(form.decode(), 180, form.seed)
    assert torch.allclose(values, form.values, rtol=1e-6, atol=1e-6)
    assert dense.tensor("0.weight").shape == form.decode().shape


def test_buckets_train():
    _, program, context = setting()
    made = Hash(ratio=0.2).apply(program, Sites(), context).program.train()
    with torch.no_grad():
        wanted = program(program.example[0])
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = (made(program.example[0]) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert tuple(made.tensor("3.weight").shape) == (144,)


def test_what_it_cannot_do_it_says():
    _, program, context = setting()
    for ratio in (0.0, 1.0, -0.5, {"3*": 2.0}):
        with pytest.raises(RecipeError, match="between 0 and 1"):
            Hash(ratio=ratio).apply(program, Sites(), context)
    with pytest.raises(RecipeError, match="match nothing"):
        Hash(ratio={"fc*": 0.5}).apply(program, Sites(), context)
    with pytest.raises(ValidationError):
        Hash(seed=-1)
    outcome = Hash(ratio={"3*": 0.5}).apply(program, Sites(), context)
    assert any("0.weight" in note for note in outcome.notes)
    program.sparse = frozenset({"3.weight"})
    outcome = Hash().apply(program, Sites(("3*",)), context)
    assert any("zeros" in note for note in outcome.notes)
    assert not outcome.figures
    program.sparse = frozenset()
    with torch.no_grad():
        program.tensor("3.weight")[0, 0] = torch.inf
    with pytest.raises(DataError, match=r"3\.weight"):
        Hash().apply(program, Sites(), context)
