"""What `share.models` promises: every model comes back, what is equal is stored once, honest bytes."""

import copy
import dataclasses

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from laconic import storage
from laconic.core.errors import DataError, RecipeError, StorageError, SurgeryError
from laconic.core.task import classification
from laconic.engine.writeback import write_back
from laconic.methods.base import Context, method_of
from laconic.methods.share.models import Models
from laconic.program import members
from laconic.program.capture import capture
from laconic.program.cost import cost
from laconic.program.freezing import freeze
from laconic.program.groups import groups
from laconic.program.sites import Sites
from laconic.program.surgery import cut
from laconic.runtimes._export import lower_weights
from laconic.solvers.sharing import together
from laconic.solvers.weights import curvature
from laconic.testing import contracts
from laconic.testing.contracts import Case, own_outputs
from laconic.testing.masked import masked


class Net(nn.Module):
    def __init__(self, classes=4, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.mix = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.mix(x)) * self.scale
        return self.head(x.mean((2, 3)))


def moved(model, share, seed, classes=None):
    """A fine-tune: every tensor away by `share` of its norm, perhaps with another head."""
    torch.manual_seed(seed)
    made = copy.deepcopy(model)
    if classes is not None:
        made.head = nn.Linear(8, classes)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.randn_like(tensor)
                tensor.add_(noise * share * tensor.norm() / noise.norm())
                if share and tensor.ndim == 1:
                    tensor.abs_()
    return made.eval()


def setting(folder, shares=(0.1, 0.2), classes=None, norm=True):
    torch.manual_seed(0)
    first = Net(norm=norm).eval()
    x = torch.randn(4, 3, 6, 6)
    models = {"first": first}
    for number, share in enumerate(shares):
        models[f"tune{number}"] = moved(first, share, 1 + number, classes)
    programs = {name: capture(model, x) for name, model in models.items()}
    files = {}
    for name, program in list(programs.items())[1:]:
        files[name] = str(folder / f"{name}.laconic")
        storage.save(program, files[name])
    program = programs["first"]
    context = Context(task=own_outputs(program), original=program, seed=1)
    return models, programs, files, context, x


def run(program, x):
    with torch.no_grad():
        return program(x)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    _, programs, files, context, _ = setting(tmp_path_factory.mktemp("models"))
    program = programs["first"]
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    code, method = str(program.graph), Models(others=files, error=0.1, steps=2, evaluations=1)
    outcome = method.apply(program, Sites(), context)
    return Case(method, program, outcome, context, before, code)


@pytest.mark.parametrize("check", contracts.METHOD_CHECKS, ids=lambda check: check.__name__)
def test_contract_with_other_models(check, trained):
    """The suite binds the method without files; here it has some, and trains."""
    assert members.names(trained.outcome.program) == ("first", "tune0", "tune1")
    check(trained)


def test_a_fine_grid_gives_every_model_back(tmp_path):
    models, programs, files, context, x = setting(tmp_path)
    outcome = Models(others=files, error=1e-4).apply(programs["first"], Sites(), context)
    found = members.members(outcome.program)
    assert list(found) == list(models)
    for name, program in found.items():
        held = dict(program.tensors())
        original = dict(programs[name].tensors())
        original.pop("norm.num_batches_tracked")  # nothing reads it
        assert {n: t.shape for n, t in held.items() if n in original} == {
            n: t.shape for n, t in original.items()
        }
        for tensor_name, tensor in original.items():
            away = float((held[tensor_name] - tensor).detach().norm())
            # weights: 0.6 of a step of sqrt(12) * 1e-4 of all models' size, 1.2 times one's at most
            bound = 1e-4 * 12**0.5 * 0.6 * 1.2 if tensor.ndim > 1 else 0
            assert away <= bound * float(tensor.detach().norm()), tensor_name
        assert torch.allclose(run(program, x), run(models[name], x), rtol=1e-2, atol=1e-2)


def test_members_are_what_the_chosen_program_computes(tmp_path):
    _, programs, files, context, x = setting(tmp_path)
    made = Models(others=files, error=0.1).apply(programs["first"], Sites(), context).program
    frozen = freeze(made)
    storage.save(frozen, tmp_path / "all.laconic")
    loaded = storage.load(tmp_path / "all.laconic")
    for name in members.names(made):
        expected = run(members.choose(made, name), x)
        assert members.chosen(members.choose(made, name)) == name
        for program in (made, frozen, loaded):
            assert torch.equal(run(members.choose(program, name), x), expected)
            assert torch.equal(run(members.alone(program, name), x), expected)
        assert members.names(members.alone(made, name)) == ()
    assert members.chosen(made) == "first"
    assert members.members(programs["first"]) == {}
    assert members.alone(programs["first"]) is programs["first"]


def test_equal_models_cost_nothing_more(tmp_path):
    _, programs, files, context, _ = setting(tmp_path, shares=(0.0, 0.0))
    for options in ({}, {"steps": 1}):
        outcome = Models(others=files, **options).apply(programs["first"], Sites(), context)
        assert members.names(outcome.program) == ()
        assert outcome.figures["ratio"] == 1.0
        assert any("one that stands for all" in note for note in outcome.notes)


def test_steps_are_finer_where_errors_count_more(tmp_path):
    """By the root: an error that counts 16 times as much gets a quarter of the step."""
    _, programs, _, _, _ = setting(tmp_path)
    names = ["conv.weight", "mix.weight"]  # 216 elements, which sets the step, and 64
    ones = {name: torch.ones_like(programs["first"].tensor(name)).double() for name in names}
    plain = together.join(programs, names, 8, 0.1, ones)
    more = together.join(programs, names, 8, 0.1, {**ones, "mix.weight": 16 * ones["mix.weight"]})
    steps = [made.program.tensor("mix.weight_scale") for made in (plain, more)]
    assert torch.allclose(steps[0], 4 * steps[1])
    for name in programs:
        assert more.errors["conv.weight"][name] == plain.errors["conv.weight"][name]
        assert more.errors["mix.weight"][name] < 0.5 * plain.errors["mix.weight"][name]


def test_what_counts_is_asked_of_each_model_on_its_own_data(tmp_path):
    _, programs, files, _, x = setting(tmp_path)
    data = {name: (1 + number) * x for number, name in enumerate(programs)}
    labels = torch.zeros(4, dtype=torch.long)
    named = [{name: (own, labels)} for name, own in data.items()]
    context = Context(task=classification(train=named), original=programs["first"], seed=1)
    names = ["conv.weight", "mix.weight", "head.weight"]
    counts = {name: torch.zeros_like(programs["first"].tensor(name)).double() for name in names}
    for model, program in programs.items():
        for name, found in curvature.input_squares(program, names, [(data[model],)]).items():
            counts[name] += found
    wanted = together.join(programs, names, 8, 0.1, counts).program
    options = {"others": files, "error": 0.1, "weighted": "hessian"}
    made = Models(**options).apply(programs["first"], Sites(), context).program
    for name, tensor in wanted.tensors():
        assert torch.equal(made.tensor(name), tensor), name


def test_heads_of_other_widths(tmp_path):
    models, programs, files, context, x = setting(tmp_path, classes=7)
    outcome = Models(others=files, error=1e-3).apply(programs["first"], Sites(), context)
    assert any("head.weight" in note and "shape" in note for note in outcome.notes)
    assert run(outcome.program, x).shape == (4, 4)
    wide = members.members(outcome.program)["tune1"]
    assert run(wide, x).shape == (4, 7)
    # heads on a grid of 8 bits: at most half a step, 1 / 254 of the largest of a row
    head = models["tune1"].head.weight
    assert bool(((wide.tensor("head.weight") - head).abs() <= head.abs().amax() / 200).all())


def test_bytes_are_those_of_the_files(tmp_path):
    _, programs, files, context, _ = setting(tmp_path)
    figures, sizes = {}, {}
    for error in (0.02, 0.3):
        outcome = Models(others=files, error=error).apply(programs["first"], Sites(), context)
        sizes[error] = storage.save(freeze(outcome.program), tmp_path / "all.laconic")
        figures[error] = outcome.figures["bytes"]["together"]
        assert outcome.figures["ratio"] == sizes[error] / outcome.figures["bytes"]["one"]
    assert figures == sizes
    assert sizes[0.3] < sizes[0.02]


def test_size_is_kept_or_refused_with_what_is_possible(tmp_path):
    _, programs, files, context, _ = setting(tmp_path)
    outcome = Models(others=files, size=1.9).apply(programs["first"], Sites(), context)
    assert outcome.figures["ratio"] <= 1.9
    assert outcome.resolved["error"] < 2.0
    with pytest.raises(RecipeError, match="below what is possible"):
        Models(others=files, size=0.5).apply(programs["first"], Sites(), context)


def test_each_model_learns_from_its_own_data(tmp_path):
    """Batches of one model move what is its own, and nothing that is another's own."""
    models, programs, files, _, _ = setting(tmp_path, norm=False)
    x = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    own = [{"tune1": (part, torch.zeros(16, dtype=torch.long))} for part in x.split(16)]
    context = Context(task=classification(train=own), original=programs["first"], seed=1)
    options = {"others": files, "error": 0.5, "bits": 3}
    plain = Models(**options).apply(programs["first"], Sites(), context).program
    trained = Models(**options, steps=40, lr=0.05, optimizer="sgd", weight_decay=0.0).apply(
        programs["first"], Sites(), context
    )
    rows, before = (p.tensor("mix.bias") for p in (trained.program, plain))
    assert torch.equal(rows[:16], before[:16])
    assert not torch.equal(rows[16:], before[16:])

    def away(program):
        found = run(members.alone(program, "tune1"), x)
        return float((found - run(models["tune1"], x)).square().mean())

    assert away(trained.program) < away(plain)
    assert trained.figures["training"]["steps"] == 40


def test_training_wakes_no_difference_that_was_zero(tmp_path):
    _, programs, files, context, x = setting(tmp_path)
    train = {"steps": 30, "lr": 20.0, "optimizer": "sgd", "weight_decay": 0.0, "ema": 0.9}
    before, after = (
        Models(others=files, error=0.1, precision="fp32", **more)
        .apply(programs["first"], Sites(), context).program
        for more in ({}, train)
    )  # fmt: skip
    moved = False
    for name in ("conv.weight", "mix.weight"):
        zero, held = (codes_of(made, name) == 0 for made in (before, after))
        assert zero.any() and not zero.all(), name
        assert bool(held[zero].all()), name
        moved = moved or not torch.equal(codes_of(before, name), codes_of(after, name))
    assert moved, "training changed no code at all: the check above says nothing"


def codes_of(program, name):
    """The codes of a weight's differences, all models below each other."""
    assert f"{name}_shared" in dict(program.tensors())
    return (program.tensor(name).detach() / program.tensor(f"{name}_scale")).round()


def test_training_is_without_dropout_unless_it_is_wanted(tmp_path):
    def trained(dropout, share, **options):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 16), nn.Dropout(share), nn.Linear(16, 4)]
        program = capture(nn.Sequential(*layers).eval(), torch.randn(4, 6))
        other = program.clone()
        other.set_tensor("0.bias", other.tensor("0.bias") + 0.1)
        storage.save(other, tmp_path / "other.laconic")
        context = Context(task=own_outputs(program), original=program, **options)
        method = Models(others=[str(tmp_path / "other.laconic")], steps=3, dropout=dropout,
                        lr=0.1, precision="fp32")  # fmt: skip
        return method.apply(program, Sites(), context).program.tensor("2.weight")

    assert torch.equal(trained(False, 0.5), trained(False, 0.1))
    assert not torch.equal(trained(True, 0.5), trained(True, 0.1))


def test_steps_of_several_batches_for_some_models_only_are_refused(tmp_path):
    """Batch normalisation would take one model's moments for another's."""
    _, programs, files, context, x = setting(tmp_path)
    task = classification(train=[{"first": x}, {"tune0": x, "tune1": x}])
    mixed = dataclasses.replace(context, task=task)
    options = {"others": files, "steps": 1, "precision": "fp32"}
    Models(**options).apply(programs["first"], Sites(), mixed)
    with pytest.raises(DataError, match="training batch 0: a batch for .* only, and 2 batches"):
        Models(**options, accumulate=2).apply(programs["first"], Sites(), mixed)


def test_the_state_of_another_first_model_is_not_taken_up(tmp_path):
    _, programs, files, context, _ = setting(tmp_path)
    kept = dataclasses.replace(context, workdir=tmp_path / "state")
    options = {"others": files, "steps": 2, "precision": "fp32"}
    Models(**options).apply(programs["first"], Sites(), kept)
    other = programs["first"].clone()
    other.set_tensor("head.bias", other.tensor("head.bias") + 1)
    found, wanted = (Models(**options).apply(other, Sites(), c) for c in (kept, context))
    for name, tensor in wanted.program.tensors():
        assert torch.equal(found.program.tensor(name), tensor), name


def test_a_member_goes_on_alone(tmp_path):
    models, programs, files, context, x = setting(tmp_path)
    made = Models(others=files, error=0.05).apply(programs["first"], Sites(), context).program
    second = members.choose(made, "tune0")
    module = lower_weights(second)
    assert not any("laconic.member" in str(node.target) for node in module.graph.nodes)
    assert torch.equal(module(x)[0], run(second, x))
    write_back(second, models["first"])
    assert torch.allclose(models["first"](x), run(second, x), rtol=1e-4, atol=1e-5)
    assert cost(second).macs == cost(programs["first"]).macs
    assert all(group.frozen for group in groups(made))
    assert not any("several" in str(g.frozen) for g in groups(members.alone(made, "tune0")))


def test_channels_that_all_models_have_alike_can_still_be_cut(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    models = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval() for _ in range(2)]
    models[1][0].load_state_dict(models[0][0].state_dict())
    first, second = (capture(model, x) for model in models)
    storage.save(second, tmp_path / "second.laconic")
    context = Context(task=None, original=first)
    method = Models(others=[str(tmp_path / "second.laconic")], error=0.3)
    made = method.apply(first, Sites(("2.*",)), context).program
    (free,) = [group for group in groups(made) if not group.frozen]
    keep = {free.name: torch.tensor([0, 2, 3, 5, 6])}
    for name in members.names(made):
        chosen = members.choose(made, name)
        small, changes = cut(chosen, keep)
        expected = masked(chosen, changes, chosen.example)[0]
        found = small.run_flat(*chosen.example)[0]
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    _, programs, files, context, x = setting(tmp_path)
    program = programs["first"]
    other = str(tmp_path / "other.laconic")
    storage.save(capture(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).eval(), x), other)
    for options, words in (
        ({"others": [other]}, "'other' does not fit on 'first'"),
        ({"others": files, "called": "tune0"}, "two models are named"),
        ({"others": {"a,b": files["tune0"]}}, "cannot be a model's name"),
        ({"others": files, "hashes": {}}, "not the file that the step was resolved with"),
    ):
        with pytest.raises(RecipeError, match=words):
            Models(**options).apply(program, Sites(), context)
    with pytest.raises(RecipeError, match="match nothing"):
        Models(others=files).apply(program, Sites(("hed*",)), context)
    with pytest.raises(StorageError):
        Models(others=[str(tmp_path / "none.laconic")]).apply(program, Sites(), context)
    with pytest.raises(ValidationError, match="two files of one name"):
        Models(others=["a/x.laconic", "b/x.laconic"])
    made = Models(others=list(files.values())).apply(program, Sites(), context).program
    with pytest.raises(SurgeryError, match="tune0"):
        members.choose(made, "tune00")
    with pytest.raises(SurgeryError, match="several models"):
        members.choose(program, "tune0")


def test_without_files_nothing_happens(tmp_path):
    _, programs, _, context, x = setting(tmp_path)
    outcome = Models().apply(programs["first"], Sites(), context)
    assert any("others" in note for note in outcome.notes)
    assert torch.equal(run(outcome.program, x), run(programs["first"], x))


def test_replay_reads_the_same_files(tmp_path):
    _, programs, files, context, _ = setting(tmp_path)
    outcome = Models(others=files).apply(programs["first"], Sites(), context)
    assert set(outcome.resolved["hashes"]) == set(files)
    from laconic.core.recipe import Step  # noqa: PLC0415

    step = Step.from_plain({"method": "share.models", **outcome.resolved}, "replay")
    storage.save(programs["first"], files["tune0"])
    with pytest.raises(RecipeError, match="not the file"):
        method_of(step, "replay").apply(programs["first"], Sites(), context)
