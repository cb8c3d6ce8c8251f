"""Captured = eager, trained = eager trained, and the caller's model is left alone."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from laconic.core.errors import CaptureError, DataError
from laconic.program.capture import capture


@dataclass
class Answer:
    scores: torch.Tensor
    extra: dict


class Net(nn.Module):
    """In-place operators, tied weights, dropout, batch norm, nested outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8 * 4 * 4, 5)
        self.again = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.again.weight

    def forward(self, x, scale=None):
        y = self.act(self.bn(self.conv(x)))
        y = y * 2
        y += 1
        y = self.drop(nn.functional.max_pool2d(y, 2).flatten(1))
        y = self.tied(self.again(self.fc(y)))
        return {"scores": y, "nothing": None, "pair": (y * 2, [y, 3])}


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Net()
        made(torch.randn(16, 3, 8, 8))  # running statistics that are not the initial ones
    return made.eval()


@pytest.fixture
def images(generator):
    return torch.randn(5, 3, 8, 8, generator=generator)


def test_captured_is_eager(net, images):
    program = capture(net, images[:1])
    for batch in (images, images[:1]):
        mine, theirs = program(batch), net(batch)
        assert torch.equal(mine["scores"], theirs["scores"])
        assert mine["nothing"] is None
        assert isinstance(mine["pair"], tuple)
        assert torch.equal(mine["pair"][0], theirs["pair"][0])
        assert mine["pair"][1][1] == 3
    assert torch.equal(program(x=images)["scores"], net(images)["scores"])


def test_names_and_ties_are_kept(net, images):
    program = capture(net, images)
    assert set(program.state_dict()) == set(net.state_dict())
    assert program.tensor("tied.weight") is program.tensor("again.weight")
    assert len(list(program.parameters())) == len(list(net.parameters()))
    program.set_tensor("tied.weight", torch.zeros(5, 5))
    assert program.tensor("again.weight").abs().sum() == 0


def test_trains_like_the_original_and_leaves_it_alone(net, images):
    program = capture(net, images)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    twin = Net()
    twin.load_state_dict(net.state_dict())
    for model in (program, twin):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for _ in range(3):
                optimizer.zero_grad()
                model(images)["scores"].square().mean().backward()
                optimizer.step()
        model.eval()
    assert torch.equal(program(images)["scores"], twin(images)["scores"])
    mine, theirs = program.state_dict(), twin.state_dict()
    for name in theirs:
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(mine[name], theirs[name]), name
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), f"capture let training reach {name}"


def test_clones_share_until_one_side_trains(net, images):
    program = capture(net, images)
    copy = program.clone()
    assert copy.tensor("fc.weight").data_ptr() == program.tensor("fc.weight").data_ptr()
    expected = program(images)["scores"]
    copy.train()
    assert copy.tensor("fc.weight").data_ptr() != program.tensor("fc.weight").data_ptr()
    copy(images)
    assert torch.equal(program(images)["scores"], expected)
    optimizer_sees = list(copy.parameters())
    copy.eval().train()
    assert all(a is b for a, b in zip(copy.parameters(), optimizer_sees, strict=True))


def test_batch_of_one_is_doubled_and_stays_dynamic(net, images):
    program = capture(net, (images[:1],))
    assert program.dynamic == {"x": {0: "batch"}}
    assert program.batch_size() == 2
    assert program(images)["scores"].shape == (5, 5)


def test_keyword_inputs_dynamic_sequence_and_records(generator):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, ids, mask=None):
            hidden = self.embed(ids) * mask[..., None]
            return Answer(self.out(hidden), {"hidden": hidden})

    model = Reader().eval()
    ids = torch.randint(0, 20, (2, 7), generator=generator)
    program = capture(model, {"mask": torch.ones(2, 7), "ids": ids}, dynamic=("batch", "sequence"))
    longer = torch.randint(0, 20, (3, 11), generator=generator)
    made = program(longer, mask=torch.ones(3, 11))
    assert type(made) is Answer
    expected = model(longer, torch.ones(3, 11))
    assert torch.equal(made.scores, expected.scores)
    assert torch.equal(made.extra["hidden"], expected.extra["hidden"])


class CatchAll(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, **kwargs):
        return self.linear(x) + kwargs["y"]


def test_catch_all_keywords_get_dimensions_too():
    model = CatchAll().eval()
    program = capture(model, {"x": torch.ones(2, 3), "y": torch.ones(2, 3)})
    assert "forward" not in vars(model)
    x, y = torch.ones(5, 3), torch.full((5, 3), 2.0)
    assert torch.equal(program(x, y=y), model(x, y=y))


def test_what_eval_loses_is_said():
    class DropPath(nn.Module):
        p = 0.2

        def forward(self, x):
            return x

    program = capture(nn.Sequential(nn.Linear(3, 3), DropPath()), torch.ones(2, 3))
    assert any("1: DropPath(0.2)" in line for line in program.lost)


def test_fixed_batch_is_reported_and_not_doubled():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(1, 12) * 2 if x.shape[0] == 1 else x.reshape(2, 12)

    program = capture(Fixed(), torch.ones(1, 3, 4))
    assert program.dynamic == {}
    assert program(torch.ones(1, 3, 4)).shape == (1, 12)
    assert any("fixed" in line for line in program.lost)


def test_a_program_captures_again(net, images):
    program = capture(net, images)
    again = capture(program, images)
    assert torch.equal(again(images)["scores"], net(images)["scores"])


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x):
        self.count += 1
        return x + self.count


@pytest.mark.parametrize(
    ("model", "inputs", "error", "says"),
    [
        (Branches(), torch.ones(2, 3), CaptureError, "torch.export cannot follow"),
        (Writes(), torch.ones(2, 3), CaptureError, "writes into"),
        (nn.Linear(3, 3), torch.ones(2, 4), DataError, "shapes [(2, 4)]"),
        (nn.Linear(3, 3), 5, DataError, "expected a tensor, a tuple or a dict"),
    ],
)
def test_errors(model, inputs, error, says):
    with pytest.raises(error) as caught:
        capture(model, inputs)
    assert says in str(caught.value)


def test_nan_weights_are_named():
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        model[0].bias[1] = float("nan")
    with pytest.raises(CaptureError, match=r"0\.bias: 1 of 3 values are NaN"):
        capture(model, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((), {}, "missing argument 'x'"),
        ((torch.ones(1),), {"y": torch.ones(1)}, "unknown argument 'y'"),
        ((3,), {}, "expected a tensor"),
    ],
)
def test_calls_are_checked(net, images, args, kwargs, says):
    program = capture(net, images)
    with pytest.raises(DataError, match=says):
        program(*args, **kwargs)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_arguments_keep_their_order(count):
    class Weighted(nn.Module):
        def forward(self, *xs):
            return sum((i + 1) * x for i, x in enumerate(xs))

    model, given = Weighted(), tuple(torch.randn(count, 2, 3).unbind(0))
    program = capture(model, given)
    assert torch.equal(program(*given), model(*given))
