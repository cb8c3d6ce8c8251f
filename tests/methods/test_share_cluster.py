"""What `share.cluster` promises: nearest values, zeros that stay, values that train, small files."""

import functools

import pytest
import torch
from pydantic import ValidationError

from laconic import storage
from laconic.core.errors import DataError, RecipeError
from laconic.engine.writeback import write_back
from laconic.methods.base import Context, method_class
from laconic.methods.share.cluster import Cluster
from laconic.program.freezing import form_of
from laconic.program.groups import groups
from laconic.program.program import LOOKUP
from laconic.program.sites import Sites
from laconic.program.surgery import cut
from laconic.runtimes._export import lower_weights
from laconic.solvers.sharing import kmeans
from laconic.testing import zoo
from laconic.testing.contracts import own_outputs
from laconic.testing.masked import masked


@functools.cache
def captured(model):
    """Captured once: methods leave their input alone, and so does whoever clones it."""
    return zoo.captured(model)


def setting(model="plain_cnn"):
    program = captured(model).clone()
    return program, Context(task=own_outputs(program), original=program, seed=1)


def run(model="plain_cnn", sites="*", **options):
    program, context = setting(model)
    return program, Cluster(**options).apply(program, Sites.of(sites), context)


def clustered(program):
    """Weight → its codebook."""
    names = [str(n.args[0].target) for n in program.graph.nodes if n.target is LOOKUP]
    return {name: form_of(program, name) for name in names}


def outputs(program, like=None):
    with torch.no_grad():
        return program.run_flat(*(like or program).example)


def sparse_setting(part=0.8):
    """A program with `part` of each weight at zero."""
    program, context = setting()
    names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    for name, tensor in list(program.tensors()):
        if tensor.ndim > 1 and name in names:
            least = tensor.detach().abs().flatten().quantile(part)
            program.set_tensor(name, tensor.detach().masked_fill(tensor.abs() < least, 0.0))
    return program, context


@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
def test_it_computes_with_the_nearest_of_at_most_two_to_the_bits_values(per):
    program, outcome = run(bits=2, per=per, group=4)
    found = clustered(outcome.program)
    assert found
    dense = program.clone()
    for name, form in found.items():
        weight, decoded = program.tensor(name).detach(), form.decode()
        axis = 0 if form.axis is None else form.axis
        step = weight.shape[axis] if form.axis is None else form.group
        for one, other in zip(weight.split(step, axis), decoded.split(step, axis), strict=True):
            values = other.unique()
            assert len(values) <= 4
            least = (one[..., None] - values).abs().amin(-1)
            assert torch.equal((one - other).abs(), least)
        dense.set_tensor(name, decoded)
    dense.recompile()
    for one, two in zip(outputs(outcome.program), outputs(dense), strict=True):
        assert torch.equal(one, two)


def test_as_many_values_as_there_are_change_nothing():
    program, context = setting()
    coarse = program.clone()
    for name, tensor in program.tensors():
        if tensor.ndim > 1:
            coarse.set_tensor(name, (tensor.detach() * 8).round() / 8)
    outcome = Cluster(bits=8).apply(coarse, Sites(), context)
    assert clustered(outcome.program)
    for one, two in zip(outputs(outcome.program), outputs(coarse), strict=True):
        assert torch.equal(one, two)


def test_zeros_of_a_pruned_tensor_are_their_own_value_and_stay():
    program, context = sparse_setting()
    outcome = Cluster(bits=3).apply(program, Sites(), context)
    work = outcome.program.clone().train()
    optimizer = torch.optim.SGD(work.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        sum(o.square().mean() for o in work.run_flat(*program.example)).backward()
        optimizer.step()
    before, after = clustered(outcome.program), clustered(work)
    for name, form in after.items():
        zeros = program.tensor(name) == 0
        assert torch.equal(form.decode() == 0, zeros) and torch.equal(form.codes == 0, zeros)
        assert torch.equal(form.codes, before[name].codes)
        assert not torch.equal(form.values, before[name].values)


def test_a_value_of_the_codebook_gets_the_gradient_of_its_members():
    program, outcome = run(bits=3)
    dense, work = program.clone(), outcome.program.clone()
    for name, form in clustered(outcome.program).items():
        dense.set_tensor(name, form.decode())
    for each in (dense, work):
        each.train()
        sum(o.square().mean() for o in each.run_flat(*program.example)).backward()
    for name, form in clustered(outcome.program).items():
        grad = dense.tensor(name).grad
        expected = torch.stack([
            grad[form.codes == form.low + place].sum() for place in range(form.values.shape[-1])
        ])  # fmt: skip
        found = work.tensor(f"{name}_codebook").grad
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(grad.abs().sum()))


def test_distillation_moves_the_values_and_keeps_the_codes():
    program, context = setting()
    outcome = Cluster(bits=2).apply(program, Sites(), context)
    distil = method_class("distill.logits")
    options = {"loss": "mse", "optimizer": "adamw", "lr": 1e-3, "precision": "fp32"}
    trained = distil(steps=20, teacher="torch", **options).apply(outcome.program, Sites(), context)
    before, after = clustered(outcome.program), clustered(trained.program)
    assert set(before) == set(after)
    for name, form in after.items():
        assert torch.equal(form.codes, before[name].codes)
    assert any(not torch.equal(after[name].values, before[name].values) for name in after)


@pytest.mark.parametrize("weighted", ["hessian", "fisher"])
def test_weighting_lowers_the_weighted_error(weighted):
    """The search is exact here, so what it minimises cannot be larger than by any other way."""
    program, context = setting()
    plain = Cluster(bits=2).apply(program, Sites(), context)
    method = Cluster(bits=2, weighted=weighted, samples=8)
    weighed = method.apply(program, Sites(), context)
    from laconic.solvers.weights import curvature
    from laconic.statistics.batches import Batches
    from laconic.statistics.gradients import sampled_loss

    names = list(clustered(plain.program))
    batches = Batches(program, context.task, 8, size=32)
    if weighted == "hessian":
        counts = curvature.input_squares(program, names, batches)
    else:
        loss = sampled_loss(context.task, context.generator(), 4.0)
        counts = curvature.fisher(program, names, batches, loss)
    moved = 0
    for name in names:
        weight, count = program.tensor(name).detach(), counts[name]
        errors = [
            kmeans.error(weight, clustered(made.program)[name].values.sort().values, count)
            for made in (weighed, plain)
        ]
        assert weight.numel() > 1024 or errors[0] <= errors[1] * (1 + 1e-3)
        moved += errors[0] < errors[1] * (1 - 1e-6)
    assert moved


def test_the_file_holds_codes_and_falls_with_sparsity(tmp_path):
    program, context = setting()
    pruned, _ = sparse_setting()
    sizes = []
    for each in (program, pruned):
        outcome = Cluster(bits=4).apply(each, Sites(), context)
        storage.save(outcome.program, tmp_path / "m.laconic")
        header = storage.read_header(tmp_path / "m.laconic")
        roles = {row[0]: row[5] for row in header["tensors"] if len(row) > 5}
        found = clustered(outcome.program)
        assert roles == {name: "codebook.codes" for name in found} | {
            f"{name}_codebook": "codebook.values" for name in found
        }
        predicted = storage.predict(outcome.program).tensors
        sizes.append(sum(predicted[name] for name in found))
        dense = sum(storage.predict(each).tensors[name] for name in found)
        assert sizes[-1] < dense / 3
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize(
    ("per", "group"), [("tensor", 1), ("channel", 1), ("group", 2), ("group", 3)]
)
def test_channels_of_clustered_weights_can_be_cut(per, group):
    """The cut program is the clustered one with the cut slices masked."""
    program, outcome = run(bits=3, per=per, group=group)
    made, found = outcome.program, groups(outcome.program)
    keep = {g.name: torch.arange(0, g.size, 2) for g in found if g.size > 2}
    assert keep or group == 3
    small, changes = cut(made, keep, found)
    expected = masked(made, changes, program.example)
    for one, two in zip(outputs(small, like=made), expected, strict=True):
        assert torch.allclose(one, two, atol=1e-5 * max(1.0, float(two.abs().max())))
    if group == 3:
        assert any("fewer slices" in str(g.frozen) for g in found.frozen)


def test_runtimes_get_the_tensor_itself():
    program, outcome = run(bits=3)
    lowered = lower_weights(outcome.program)
    assert not any("laconic" in str(node.target) for node in lowered.graph.nodes)
    with torch.no_grad():
        found = lowered(*program.example)
    for one, two in zip(found, outputs(outcome.program), strict=True):
        assert torch.equal(one, two)
    assert any("runtimes" in note for note in outcome.notes)


def test_it_is_written_back_into_the_model():
    model, _ = zoo.make("plain_cnn")
    program, context = setting()
    outcome = Cluster(bits=3).apply(program, Sites(), context)
    assert write_back(outcome.program, model) == []
    for name, form in clustered(outcome.program).items():
        assert torch.equal(model.state_dict()[name], form.decode())


def test_bits_by_pattern_and_sites():
    program, outcome = run("plain_cnn", sites="!*head*", bits={"body*": 3, "*": 1})
    everything = set(clustered(run("plain_cnn")[1].program))
    found = clustered(outcome.program)
    for name, form in found.items():
        assert form.values.numel() == (8 if "body" in name else 2)
    assert set(found) == {name for name in everything if "head" not in name}
    first = sorted(everything)[0]
    _, only = run("plain_cnn", bits={first: 2})
    assert set(clustered(only.program)) == {first}
    assert any("no pattern of bits" in note for note in only.notes)


def test_a_weight_that_two_operators_read_is_stored_and_decoded_once():
    _, outcome = run("tied_autoencoder", bits=3)
    made = outcome.program
    assert clustered(made)
    readers = [str(n.target) for n in made.graph.nodes if n.op == "get_attr"]
    for name in clustered(made):
        assert readers.count(name) == 1


def test_what_would_grow_stays_float():
    """24 weights of an output channel have 24 values."""
    _, outcome = run(sites="head.weight", per="channel", bits=8)
    assert not clustered(outcome.program)
    assert any("stays float" in note for note in outcome.notes)


@pytest.mark.parametrize(
    "options", [{"bits": 0}, {"bits": {"*": 9}}, {"bits": 3, "clusters": 5}, {"clusters": 1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError):
        Cluster(**options)


def test_bad_input_is_named():
    with pytest.raises(RecipeError, match="no.such"):
        run(bits={"no.such": 3})
    program, context = setting()
    name = next(iter(clustered(run(bits=3)[1].program)))
    with pytest.raises(RecipeError, match="codebooks"):
        Cluster(codebooks={name: [[0.0], [1.0]]}).apply(program, Sites(), context)
    program.set_tensor(name, program.tensor(name).detach() * float("nan"))
    with pytest.raises(DataError, match=name):
        Cluster(zeros=False).apply(program, Sites(), context)
