"""distill.logits: identities, what it compares, what it refuses."""

import pytest
import torch
from torch import nn

from laconic.core.errors import DataError, RecipeError, TrainingError
from laconic.core.task import Task, classification, embedding, language_modelling, regression
from laconic.methods.base import Context, method_of
from laconic.methods.distill.logits import Logits
from laconic.program.capture import capture
from laconic.program.freezing import freeze, is_frozen
from laconic.program.program import FAKE_QUANTIZE, Program
from laconic.program.sites import Sites

ALL = Sites()
SHORT = {"steps": 6, "precision": "fp32", "evaluations": 2, "teacher": "torch"}


class Net(nn.Module):
    """[batch, 3, 8, 8] -> [batch, 4]."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, width, 3, padding=1)
        self.outer = nn.Conv2d(width, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


def captured(net, *example):
    return capture(net.eval(), example)


@pytest.fixture
def original():
    net = Net()
    with torch.no_grad():  # outputs that differ from image to image
        net.head.weight.mul_(30)
    return captured(net, torch.randn(2, 3, 8, 8))


@pytest.fixture
def narrow(original):
    """Half the inner channels of the original."""
    net = Net(width=4)
    state = {name: tensor.detach().clone() for name, tensor in original.tensors()}
    state["inner.weight"], state["inner.bias"] = state["inner.weight"][:4], state["inner.bias"][:4]
    state["outer.weight"] = state["outer.weight"][:, :4]
    net.load_state_dict(state, strict=False)
    return captured(net, torch.randn(2, 3, 8, 8))


def images(count=6, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


def labelled(original, batches):
    with torch.no_grad():
        return [(x, original(x).argmax(1)) for x in batches]


def context(original, task, **options):
    return Context(task=task, original=original, **options)


def apply(options, program, original, task, **more):
    return Logits(**{**SHORT, **options}).apply(program, ALL, context(original, task, **more))


def tensors(program):
    return {name: tensor.detach().clone() for name, tensor in program.tensors()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_learning_from_oneself_is_no_change(original):
    """The gradient is exactly zero; only batch statistics would move, so there is no batch norm."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 4))
    program = captured(net, torch.randn(2, 3, 8, 8))
    task = classification(train=images())
    for options in ({}, {"features": 1.0}, {"loss": "mse"}):
        options = {"weight_decay": 0, "optimizer": "sgd", **options}
        made = apply(options, program, program, task)
        for name, tensor in made.program.tensors():
            # p - q is zero up to the rounding of two softmaxes: steps of lr * 1e-7 or less
            torch.testing.assert_close(tensor, program.tensor(name), rtol=0, atol=1e-5)


def test_it_recovers_on_unlabelled_data(original, narrow):
    task = classification(train=images(12), validation=labelled(original, images(4, seed=1)))
    before = tensors(narrow)
    made = apply({"steps": 120, "lr": 0.05}, narrow, original, task)
    history = made.figures["history"]
    assert history[-1]["loss"] < 0.2 * history[1]["loss"]
    assert made.figures["score"] > history[0]["score"]
    assert same(tensors(narrow), before)
    assert not made.program.training
    assert made.program(images(1)[0]).shape == (16, 4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.5},
        {"alpha": 0.0, "hard": "teacher"},
        {"features": 0.5},
        {"ema": 0.5},
        {"steps": None, "minutes": 0.02},
        {"steps": None, "epochs": 1.5, "precision": "auto", "optimizer": "adamw"},
    ],
)
def test_the_resolved_step_replays_the_run(original, narrow, options):
    batches = labelled(original, images())
    task = classification(train=batches, validation=labelled(original, images(2, seed=1)))
    made = apply(options, narrow, original, task)
    resolved = dict(made.resolved)
    assert resolved["minutes"] is None
    assert resolved["steps"]
    assert "auto" not in resolved.values()
    step = Logits(**resolved).step()
    again = method_of(step, "step 1").apply(narrow, ALL, context(original, task))
    assert same(tensors(again.program), tensors(made.program))
    assert again.resolved == made.resolved


def test_features_compare_equal_shapes_only(original, narrow):
    task = classification(train=images())
    made = apply({"features": 1.0}, narrow, original, task)
    assert list(made.resolved["nodes"]) == ["add"]
    every = apply({"features": 1.0, "nodes": ["*"]}, narrow, original, task).resolved["nodes"]
    names = {node.name: node for node in narrow.graph.nodes}
    inner = [n for n in names if n in ("conv2d_1", "relu_1")]
    assert inner
    assert not set(inner) & set(every)
    assert {"relu", "add", "conv2d"} <= set(every)
    graph = [node.name for node in made.program.graph.nodes]
    assert graph == [node.name for node in narrow.graph.nodes]
    assert len(made.program.output_node.args[0]) == 1


def test_features_alone_bring_inner_values_close(original, narrow):
    task = classification(train=images())
    options = {"features": 1.0, "alpha": 0.0, "hard": "teacher", "nodes": {"add": "add"}}
    made = apply({**options, "steps": 100, "lr": 0.02}, narrow, original, task)
    history = made.figures["history"]
    assert history[-1]["loss"] < history[0 if history[0]["loss"] else 1]["loss"] + 1e-9


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"conv2d_1": "conv2d_1"}, r"has shape \[2, 4, 8, 8\] and conv2d_1 of the original \[2, 8"),
        ({"relux": "relu"}, "no float node 'relux'"),
        ({"relu": "nothing"}, "the original has no float node"),
        (["block*"], "match nothing"),
    ],
)
def test_impossible_pairs_are_refused(original, narrow, nodes, message):
    with pytest.raises(RecipeError, match=message):
        apply({"features": 1.0, "nodes": nodes}, narrow, original, classification(train=images()))


def test_sites_choose_what_is_trained(original, narrow):
    task = classification(train=images())
    method = Logits(**SHORT)
    made = method.apply(narrow, Sites.of(["head", "!*.bias"]), context(original, task))
    changed = {
        n for n, t in made.program.named_parameters() if not torch.equal(t, narrow.tensor(n))
    }
    assert changed == {"head.weight"}
    assert all(p.requires_grad for p in made.program.parameters())


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 6)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).float()
        hidden = self.layer(self.table(input_ids))
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(mean, dim=1)


def texts(count, seed=0, tokens=5, padding=3):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 11, (4, tokens), generator=generator)
        mask = (torch.arange(tokens) < padding).long().expand(4, tokens)
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def text_task(batches, **options):
    return embedding(train=batches, split=lambda batch: (batch, None), **options)


def test_embeddings_take_the_cosine_and_ignore_padding():
    example = texts(1)[0]
    teacher = capture(Embedding().eval(), example)
    student = teacher.clone()
    student.set_tensor("layer.weight", teacher.tensor("layer.weight") + 0.1 * torch.randn(6, 8))
    batches = texts(8)
    options = {"steps": 60, "lr": 0.01, "features": 1.0, "nodes": ["linear"]}
    made = apply(options, student, teacher, text_task(batches))
    assert made.resolved["loss"] == "cosine"
    assert made.resolved["optimizer"] == "adamw"
    history = made.figures["history"]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    spoilt = [{**b, "input_ids": b["input_ids"].where(b["attention_mask"] > 0, 7)} for b in batches]
    other = apply(options, student, teacher, text_task(spoilt))
    for name, tensor in made.program.tensors():
        # padded positions get a gradient of exactly zero; AdamW moves nothing for it
        torch.testing.assert_close(other.program.tensor(name), tensor, rtol=0, atol=1e-6)


def test_language_models():
    net = nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 13))
    teacher = captured(net, torch.zeros(2, 6, dtype=torch.long))
    student = teacher.clone()
    student.set_tensor("1.weight", teacher.tensor("1.weight") + 0.2 * torch.randn(13, 8))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 13, (4, 6), generator=generator) for _ in range(5)]
    task = language_modelling(
        train=[(i, i.roll(-1, 1)) for i in ids], validation=[(ids[0], ids[1])]
    )
    made = apply({"steps": 40, "lr": 0.01, "alpha": 0.9}, student, teacher, task)
    assert made.resolved["loss"] == "kl"
    assert made.figures["history"][-1]["loss"] < made.figures["history"][1]["loss"]
    assert made.figures["history"][0]["score"] > 0  # nats, lower is better, in their own direction


def test_regression_takes_the_relative_error():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    teacher = captured(net, torch.randn(2, 4))
    student = teacher.clone()
    student.set_tensor("0.weight", teacher.tensor("0.weight") * 0.8)
    x = torch.randn(16, 4)
    made = apply({"steps": 50, "lr": 0.01}, student, teacher, regression(train=[x]))
    assert made.resolved["loss"] == "mse"
    assert made.figures["history"][-1]["loss"] < 0.5 * made.figures["history"][0]["loss"]


def test_validation_without_labels_is_judged_by_the_loss(original, narrow):
    task = classification(train=images(), validation=images(2, seed=1))
    made = apply({"steps": 100, "lr": 0.005}, narrow, original, task)
    history = made.figures["history"]
    assert made.figures["score"] == min(entry["score"] for entry in history)
    assert 0 < made.figures["score"] < history[0]["score"]


def quantised(original) -> Program:
    """The original with its first convolution's weight on an int4 grid and its input on int8."""
    program = original.clone()
    conv = next(n for n in program.graph.nodes if n.name == "conv2d")
    weight = program.tensor("stem.weight")
    scale = weight.detach().abs().amax((1, 2, 3)) / 7
    sides = {
        "stem.weight_scale": scale,
        "stem.weight_zero_point": torch.zeros(8, dtype=torch.int32),
        "activations.x_scale": torch.tensor(0.05),
        "activations.x_zero_point": torch.tensor(0, dtype=torch.int32),
    }
    for name, tensor in sides.items():
        program.add_tensor(name, tensor)
    for position, (side, axis, low, high) in enumerate(
        [("activations.x", None, -128, 127), ("stem.weight", 0, -7, 7)]
    ):
        with program.graph.inserting_before(conv):
            scale_node = program.graph.get_attr(f"{side}_scale")
            zero_node = program.graph.get_attr(f"{side}_zero_point")
            node = program.graph.call_function(
                FAKE_QUANTIZE, (conv.args[position], scale_node, zero_node, axis, low, high)
            )
        conv.update_arg(position, node)
    program.recompile()
    return program


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", [False, True])
def test_quantised_programs_train_straight_through(original, precision, stored):
    program = quantised(original)
    program = freeze(program) if stored else program
    before = program.tensor("stem.weight").clone()
    task = classification(train=images())
    made = apply({"steps": 40, "lr": 0.05, "precision": precision}, program, original, task)
    assert is_frozen(made.program) == stored
    assert made.program.tensor("stem.weight").dtype == before.dtype
    assert not torch.equal(made.program.tensor("stem.weight"), before)
    assert torch.equal(
        made.program.tensor("stem.weight_scale"), program.tensor("stem.weight_scale")
    )
    assert made.figures["history"][-1]["loss"] < made.figures["history"][0]["loss"]
    assert torch.equal(freeze(made.program)(images(1)[0]), made.program(images(1)[0]))


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("options", [{}, {"features": 1.0, "nodes": ["relu", "add", "linear"]}])
def test_a_runtime_as_the_teacher(original, narrow, runtime, options):
    task = classification(train=images())
    made = apply({"teacher": runtime, **options}, narrow, original, task)
    torch_made = apply(options, narrow, original, task)
    assert made.resolved["teacher"] == runtime
    for name, tensor in made.program.tensors():
        # values agree to 1e-5 in float32; six steps of lr 0.02 carry that on, not more
        torch.testing.assert_close(tensor, torch_made.program.tensor(name), rtol=1e-3, atol=1e-4)


def bad(**kinds):
    return classification(**kinds)


@pytest.mark.parametrize(
    ("task", "options", "error", "message"),
    [
        (bad(), {}, DataError, "no train or calibration data"),
        (bad(train=[]), {}, DataError, "gives no batches"),
        (bad(train=images()), {"alpha": 0.5}, DataError, "batch 0: the batch has no targets"),
        (bad(train=[images(1)[0] * float("nan")]), {}, DataError, "batch 0: .*NaN"),
        (bad(train=[torch.randn(4, 3, 8, 9)]), {}, DataError, r"batch 0: .*\[4, 3, 8, 9\]"),
        (bad(train=images()), {"lr": 1e30, "clip": None}, TrainingError, "loss became"),
    ],
)
def test_bad_input(original, narrow, task, options, error, message):
    before = tensors(narrow)
    with pytest.raises(error, match=message):
        apply(options, narrow, original, task)
    assert same(tensors(narrow), before)


def test_outputs_of_another_shape_are_refused(original):
    other = captured(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.randn(2, 3, 8, 8))
    with pytest.raises(TrainingError, match=r"\[16, 5\], its teacher \[16, 4\]"):
        apply({}, other, original, classification(train=images()))


def test_a_program_without_parameters_says_so():
    program = captured(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 3))
    task: Task = classification(train=[torch.randn(2, 3)])
    made = apply({}, program, program, task)
    assert "no float parameter" in made.notes[0]


def test_a_state_that_was_learned_from_another_teacher_is_not_taken(original, narrow, tmp_path):
    task = classification(train=images())
    other = original.clone()
    for name, tensor in original.tensors():
        if tensor.is_floating_point():
            other.set_tensor(name, tensor.detach() * 1.5)
    fresh = apply({}, narrow, original, task)
    apply({}, narrow, other, task, workdir=tmp_path)
    made = apply({}, narrow, original, task, workdir=tmp_path)
    assert same(tensors(made.program), tensors(fresh.program))


def test_resumes_from_its_folder(original, narrow, tmp_path):
    task = classification(train=images(), validation=labelled(original, images(2, seed=1)))
    options = {"save_every": 0}
    whole = apply(options, narrow, original, task)

    calls = []

    def failing(batch):
        calls.append(0)
        if len(calls) == 12:
            raise RuntimeError("power cut")
        return (batch[0],), batch[1]

    cut = classification(
        train=labelled(original, task.train), validation=task.validation, split=failing
    )
    task = classification(train=cut.train, validation=task.validation)
    whole = apply(options, narrow, original, task)
    with pytest.raises(RuntimeError, match="power cut"):
        apply(options, narrow, original, cut, workdir=tmp_path)
    assert list(tmp_path.iterdir())
    resumed = apply(options, narrow, original, task, workdir=tmp_path)
    assert same(tensors(resumed.program), tensors(whole.program))
    assert resumed.figures["history"] == whole.figures["history"]
