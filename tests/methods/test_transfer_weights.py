"""transfer.weights: what is taken over is what surgery would leave, in every tensor alike."""

import pytest
import torch
from torch import nn

from laconic import storage
from laconic.core.errors import RecipeError, StorageError
from laconic.core.task import Task
from laconic.methods.base import Context
from laconic.methods.transfer.weights import TransferWeights
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.program.sites import Sites
from laconic.program.surgery import cut
from laconic.solvers.layers import depth
from laconic.testing import zoo

EPS = torch.finfo(torch.float32).eps


class Block(nn.Module):
    """A perceptron that is added to what it is given; then a norm, a rectifier, or nothing."""

    def __init__(self, width=6, hidden=12, behind="nothing"):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.behind = {"norm": lambda: nn.LayerNorm(width), "relu": nn.ReLU}.get(
            behind, nn.Identity
        )()

    def forward(self, x):
        return self.behind(x + self.down(torch.relu(self.up(x))))


class Deep(nn.Module):
    """A stem, `count` blocks, a head."""

    def __init__(self, count=6, behind="nothing", hidden=12, width=6, last=False):
        super().__init__()
        stem = {"norm": lambda: nn.LayerNorm(width), "relu": nn.ReLU}.get(behind, nn.Identity)()
        self.stem = nn.Sequential(nn.Linear(4, width), stem)
        self.body = nn.Sequential(*[Block(width, hidden, behind) for _ in range(count)])
        self.last = nn.LayerNorm(width) if last else nn.Identity()
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.last(self.body(self.stem(x))))


def made(model, seed=1):
    return capture(zoo.shake(model, seed), (torch.randn(2, 4),))


def start(program, sites="*", data=None, **options):
    task = Task(
        loss=lambda outputs, targets: (outputs - targets).square().mean(),
        metric=lambda outputs, targets: -(outputs - targets).square().mean(1),
        train=None if data is None else [(data, None)],
    )
    context = Context(task=task, original=program)
    return TransferWeights(**options).apply(program, Sites.of(sites), context)


def same(one, two, scale=100):
    """Equal but for the order in which a matrix product is summed."""
    with torch.no_grad():
        x = torch.randn(8, 4)
        wanted = two(x)
        assert torch.allclose(one(x), wanted, rtol=0, atol=scale * EPS * float(wanted.abs().max()))


def test_leading_slices_are_what_surgery_leaves():
    program = made(Deep())
    outcome = start(program, width=0.5, select="leading")
    keep = {group.name: torch.arange(group.size // 2) for group in groups(program)}
    wanted = cut(program, keep)[0]
    for name, tensor in wanted.tensors():
        assert torch.equal(outcome.program.tensor(name), tensor), name
    assert all(before == 2 * after for before, after in outcome.figures["kept"].values())


def test_ranked_slices_leave_out_what_is_worth_nothing():
    model = zoo.shake(Deep(count=1), 1)
    with torch.no_grad():  # hidden units 3 and 7 neither read nor write
        for unit in (3, 7):
            model.body[0].up.weight[unit] = 0
            model.body[0].up.bias[unit] = 0
            model.body[0].down.weight[:, unit] = 0
    program = capture(model, (torch.randn(2, 4),))
    outcome = start(program, "body.0.up*", width=10 / 12, select="ranked")
    (kept,) = outcome.resolved["keep"].values()
    assert kept == [unit for unit in range(12) if unit not in (3, 7)]
    same(outcome.program, program)


def test_fitted_makes_up_for_a_twin():
    """Two hidden units that always agree: one can go, and its reader's column takes both."""
    model = zoo.shake(Deep(count=1, hidden=2), 1)
    with torch.no_grad():
        model.body[0].up.weight[1] = model.body[0].up.weight[0]
        model.body[0].up.bias[1] = model.body[0].up.bias[0]
    program = capture(model, (torch.randn(2, 4),))
    x = torch.randn(256, 4)
    with torch.no_grad():
        wanted = program(x)
        errors = [
            float((start(program, "body*", x, width=0.5, select=way).program(x) - wanted).norm())
            for way in ("ranked", "fitted")
        ]
    # The ridge is 1e-5 of the variance at least, and the column moves by its own length.
    assert errors[1] < 1e-3 * errors[0]


@pytest.mark.parametrize(
    ("way", "places"),
    [("even", [0, 2, 5]), ("alternate", [0, 2, 4]), ("first", [0, 1, 2]), ("last", [3, 4, 5])],
)
@pytest.mark.parametrize("behind", ["nothing", "norm", "relu"])
def test_what_stays_is_the_network_of_those_blocks(behind, way, places):
    model = Deep(behind=behind, last=True)
    program = made(model)
    outcome = start(program, layers=0.5, spread=way, select="leading")
    assert outcome.figures["layers"] == [f"body.{place}" for place in places]
    small = Deep(behind=behind, last=True).eval()
    small.load_state_dict(model.state_dict())
    small.body = nn.Sequential(*[model.body[place] for place in places])
    with torch.no_grad():
        x = torch.randn(8, 4)
        assert torch.equal(outcome.program(x), small(x))
    kept = len(list(small.parameters()))
    assert len(list(outcome.program.parameters())) == kept  # norms leave with their layers


def test_layers_by_name_by_position_and_by_glob():
    program = made(Deep())
    names = [f"body.{place}" for place in range(6)]
    by_name = start(program, layers=["body.1", "body.4"], select="leading")
    assert by_name.figures["layers"] == ["body.1", "body.4"]
    assert start(program, layers=[0, -1], select="leading").figures["layers"] == [
        names[0], names[-1],
    ]  # fmt: skip
    globbed = start(program, layers={"body.[0-2]": 1, "body.[3-5]": 2}, select="leading")
    assert globbed.figures["layers"] == ["body.0", "body.3", "body.5"]
    sited = start(program, "body.[45]", layers=1, select="leading")
    assert sited.figures["layers"] == names[:5]


def test_attention_and_perceptron_are_one_layer():
    layers = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 4,
        enable_nested_tensor=False,
    )  # fmt: skip
    program = capture(zoo.shake(layers, 1), (torch.randn(2, 5, 8),))
    program.propagate()
    (chain,) = depth.chains(program)
    assert [layer.name for layer in chain] == [f"layers.{place}" for place in range(4)]
    assert all(len(layer.branches) == 2 for layer in chain)
    outcome = start(program, layers=[0, 3], select="leading")
    layers.layers = nn.ModuleList([layers.layers[0], layers.layers[3]])
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        wanted, found = layers(x), outcome.program(x)
    assert torch.allclose(found, wanted, rtol=0, atol=100 * EPS * float(wanted.abs().max()))


def test_a_layer_that_stays_takes_over_a_constant():
    """A layer that adds the same to everything can go, if the one before it is refitted."""
    model = zoo.shake(Deep(count=2), 1)
    with torch.no_grad():
        model.body[1].down.weight.zero_()
    program = capture(model, (torch.randn(2, 4),))
    x = torch.randn(256, 4)
    outcome = start(program, data=x, layers=["body.0"], select="fitted")
    same(outcome.program, program, scale=1e4)  # sums of products of 256 rows in float32
    assert float((start(program, layers=["body.0"], select="leading").program(x)
                  - program(x)).detach().abs().max()) > 0.01  # fmt: skip


def test_what_gives_the_stream_takes_over_a_constant():
    """Where no layer of a chain stays, the map before it is refitted."""
    model = zoo.shake(Deep(count=2, behind="relu"), 1)
    with torch.no_grad():
        for block in model.body:
            block.down.weight.zero_()
            block.down.bias.abs_()
        model.stem[0].bias += 10  # the rectifiers pass everything
    program = capture(model, (torch.randn(2, 4),))
    x = torch.randn(256, 4)
    outcome = start(program, data=x, layers=0, select="fitted")
    assert outcome.figures["layers"] == []
    same(outcome.program, program, scale=1e4)


def test_each_layer_stands_in_for_those_behind_it():
    program = made(Deep())
    program.propagate()
    chains = depth.chains(program)
    sums = [layer.total.name for layer in chains[0]]
    found = depth.goals(chains, ["body.0", "body.1", "body.4"])
    assert found == {sums[1]: sums[3], sums[4]: sums[5]}
    stem = chains[0][0].branches[0].stream.name
    assert depth.goals(chains, ["body.2"]) == {stem: sums[1], sums[2]: sums[5]}
    assert depth.goals(chains, []) == {stem: sums[5]}
    assert depth.goals(chains, [f"body.{place}" for place in range(6)]) == {}


def student(tmp_path, model):
    path = tmp_path / "student.laconic"
    storage.save(made(model, 2), path)
    return str(path)


def test_a_narrower_student_is_the_cut_network(tmp_path):
    program = made(Deep())
    path = student(tmp_path, Deep(hidden=5, width=3))
    outcome = start(program, student=path, select="leading")
    wanted = start(program, width={"body*": 5 / 12, "stem*": 0.5}, select="leading")
    for name, tensor in wanted.program.tensors():
        assert torch.equal(outcome.program.tensor(name), tensor), name
    assert outcome.figures["own"] == outcome.figures["cropped"] == []


def test_a_shallower_student_under_other_names(tmp_path):
    """Its layers stand for those that the spread chooses; ranks are the same in every tensor."""
    program = made(Deep())

    class Other(Deep):
        def __init__(self):
            super().__init__(count=3, hidden=6)
            self.trunk, self.body = self.body, nn.Identity()

        def forward(self, x):
            return self.head(self.trunk(self.stem(x)))

    path = student(tmp_path, Other())
    outcome = start(program, student=path, match={"trunk.*": "body.*"}, select="ranked")
    wanted = start(program, width={"body*": 0.5}, layers=3, select="ranked")
    assert outcome.figures["layers"] == ["body.0", "body.2", "body.5"]
    same(outcome.program, wanted.program)
    again = start(program, **outcome.resolved)
    for name, tensor in outcome.program.tensors():
        assert torch.equal(again.program.tensor(name), tensor), name


def test_what_has_no_counterpart_keeps_its_values_and_is_told(tmp_path):
    program = made(Deep())
    larger = Deep(hidden=16)
    path = student(tmp_path, larger)
    outcome = start(program, student=path, select="leading")
    before = dict(storage.load(path).tensors())
    assert set(outcome.figures["own"]) == {
        f"body.{place}.{leaf}" for place in range(6)
        for leaf in ("up.weight", "up.bias", "down.weight")
    }  # fmt: skip
    for name in outcome.figures["own"]:
        assert torch.equal(outcome.program.tensor(name), before[name])
    assert torch.equal(outcome.program.tensor("head.weight"), program.tensor("head.weight"))
    assert any("keep their own values" in note for note in outcome.notes)


def test_a_smaller_kernel_is_the_middle_of_the_larger():
    def net(size):
        return nn.Sequential(
            nn.Conv2d(2, 4, size, padding=size // 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )

    program = capture(zoo.shake(net(5), 1), (torch.randn(2, 2, 4, 4),))
    tensor = program.tensor("0.weight")
    from laconic.solvers.channels.slices import cropped  # noqa: PLC0415

    assert torch.equal(cropped(tensor, (4, 2, 3, 3)), tensor[:, :, 1:4, 1:4])
    assert cropped(tensor, (5, 2, 3, 3)) is None


def test_a_student_that_does_not_fit_is_refused(tmp_path):
    program = made(Deep())
    with pytest.raises(RecipeError, match=r"gives .*\[2, 3\]"):
        wide = Deep()
        wide.head = nn.Linear(6, 4)
        start(program, student=student(tmp_path, wide))
    with pytest.raises(RecipeError, match="none of the student's"):
        plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        start(program, student=student(tmp_path, plain))
    with pytest.raises(RecipeError, match="inputs"):
        path = tmp_path / "wide.laconic"
        storage.save(capture(nn.Linear(7, 3), (torch.randn(2, 7),)), path)
        start(program, student=str(path))
    with pytest.raises(StorageError, match="nowhere"):
        start(program, student=str(tmp_path / "nowhere.laconic"))


def test_what_cannot_be_asked_is_refused():
    program = made(Deep())
    with pytest.raises(RecipeError, match=r"7 layers are to stay.*has 6"):
        start(program, layers=7)
    with pytest.raises(RecipeError, match=r"body\.5"):
        start(program, layers=["body.6"])
    for options in ({"width": 0.0}, {"width": 1.5}, {"layers": 1.5}, {"layers": -1},
                    {"importance": "magic"}, {"match": {"a": "b"}},
                    {"student": "x.laconic", "width": 0.5}):  # fmt: skip
        with pytest.raises(ValueError, match=r"width|layers|magic|student"):
            TransferWeights(**options)


def test_nothing_asked_and_nothing_to_leave_out_are_told():
    program = made(Deep())
    assert "nothing was asked for" in start(program).notes[0]
    plain = capture(zoo.shake(nn.Linear(4, 3), 1), (torch.randn(2, 4),))
    assert any("no residual branch" in note for note in start(plain, layers=0.5).notes)
