"""Chains as files: whatever runtime and batch, they give what the static Program gives."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from laconic import runtimes
from laconic.core.errors import ExportError
from laconic.engine.artifact import declared_inputs, every_way, open_artifact, shipped_bytes
from laconic.engine.files import write_chain, write_models
from laconic.program.capture import capture
from laconic.runtimes import _chain, openvino

CHOOSE = torch.ops.laconic.choose


class Exits(nn.Module):
    """Three stages, two exits."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4, 4, 3) for i in range(3)])
        self.heads = nn.ModuleList([nn.Linear(4, 5) for _ in range(3)])
        self.register_buffer("limits", torch.zeros(2))

    def forward(self, x):
        logits = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x).relu()
            logits.append(head(x.mean((2, 3))))
        unsure = [each.softmax(-1).amax(-1) < self.limits[i] for i, each in enumerate(logits[:2])]
        return CHOOSE(unsure[0], CHOOSE(unsure[1], logits[2], logits[1]), logits[0])


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(1)
    model = Exits().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        x = torch.randn(64, 3, 9, 9)
        for place in range(2):
            sure = model.heads[place](_features(model, x, place)).softmax(-1).amax(-1)
            model.limits[place] = sure.median()
    return capture(model, (x[:4],))


def _features(model, x, place):
    for stage in model.stages[: place + 1]:
        x = stage(x).relu()
    return x.mean((2, 3))


def _wanted(program, x):
    with torch.no_grad():
        return program.run_flat(torch.from_numpy(x))[0].numpy()


def _images(size):
    return np.random.default_rng(size).standard_normal((size, 3, 9, 9)).astype(np.float32)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def written(request, program, tmp_path_factory):
    """A chain's file, for either runtime."""
    engine = runtimes.get(request.param)
    target = tmp_path_factory.mktemp(request.param) / f"net{engine.suffix}"
    return write_chain(program, target, engine, "fp32")


@pytest.mark.parametrize("sizes", [None, (), (1, 2, 4)])
def test_files_give_what_the_static_program_gives(program, written, sizes):
    name, path = written.name.split(".")[1], written
    engine = runtimes.get(name)
    assert path.name == f"net.{name}.chain"
    shapes = {"x": (8, 3, 9, 9)} if sizes is None else None
    runner = _chain.load(path, engine, 1, shapes, sizes)
    assert runner.inputs == ("x",)
    assert runner.conditions["pieces"] == 3
    for size in (1, 3, 8, 21):
        x = _images(size)
        (found,) = runner.run([x])
        np.testing.assert_allclose(found, _wanted(program, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_one_graph_that_branches_gives_the_same(program, tmp_path, name):
    engine = runtimes.get(name)
    path = engine.write(program, tmp_path / f"net{engine.suffix}", branches=True)
    runner = engine.load(path, "fp32", 1)
    for size in (1, 1, 1, 9):
        x = _images(size)
        np.testing.assert_allclose(runner.run([x])[0], _wanted(program, x), rtol=1e-4, atol=1e-5)
    model = openvino.core().read_model(str(path))
    assert sum(op.get_type_name() == "If" for op in model.get_ops()) == 1  # the other is inside
    plain = capture(nn.Linear(3, 2).eval(), (torch.randn(2, 3),))
    with pytest.raises(ExportError, match="nothing to branch on"):
        engine.write(plain, tmp_path / f"plain{engine.suffix}", branches=True)


def test_the_door_for_all_files_opens_a_chain(program, written):
    path, name = written, written.name.split(".")[1]
    assert len(_chain.files(path)) == {"openvino": 7, "onnxruntime": 4}[name]
    assert shipped_bytes(path) == sum(file.stat().st_size for file in _chain.files(path))
    given = declared_inputs(path, 5)
    assert given["x"].shape == (5, 3, 9, 9)
    ((label, held),) = every_way(path, given, None, None, 1)
    assert label == f"{path} {name} fp32"
    assert held.conditions.get("batch sizes", [1, 2, 4, 5]) == [1, 2, 4, 5]
    (found,) = held.run([given["x"]])
    np.testing.assert_allclose(found, _wanted(program, given["x"]), rtol=1e-4, atol=1e-5)
    assert open_artifact(path, threads=1).inputs == ("x",)


def test_a_saved_result_has_the_chain_beside_its_files(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            small = self.small(x)
            return CHOOSE(small[:, 0] < 0.5, self.large(x), small)

    program = capture(Pair().eval(), (torch.randn(2, 3),))
    assert not write_models(program, tmp_path, ("openvino", "fp32"))
    names = {file.name for file in tmp_path.iterdir()}
    assert {"model.xml", "model.openvino.chain", "model.onnx", "model.onnxruntime.chain"} <= names


def test_without_choices_no_chain_is_written(tmp_path):
    engine = runtimes.get("onnxruntime")
    plain = capture(nn.Linear(3, 2).eval(), (torch.randn(2, 3),))
    assert write_chain(plain, tmp_path / "net.onnx", engine, "fp32") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:50],
        lambda text: text.replace("laconic chain 1", "laconic chain 9"),
        lambda text: text.replace('"net.onnxruntime.0.onnx"', '"../net.onnx"'),
        lambda text: json.dumps({**json.loads(text), "plan": {"steps": [{"run": 7}]}}),
        lambda text: "[]",
    ],
)
def test_a_damaged_chain_is_refused(written, tmp_path, damage):
    path = tmp_path / written.name
    name = "net.openvino.0.xml" if "openvino" in written.name else "net.onnxruntime.0.onnx"
    path.write_text(damage(written.read_text().replace(name, "net.onnxruntime.0.onnx")))
    with pytest.raises(ExportError, match=r"net\..*\.chain"):
        open_artifact(path)


def test_a_missing_piece_is_named(written, tmp_path):
    path = tmp_path / written.name
    path.write_text(written.read_text())
    with pytest.raises(ExportError, match=r"net\..*\.0\."):
        open_artifact(path)


def test_padded_rows_never_show():
    sizes = []

    class Squares:
        def run(self, arrays):
            sizes.append(len(arrays[0]))
            return [arrays[0] ** 2 + arrays[1]]

    made = _chain.Padded(lambda _: Squares(), (1, 4, 8), (True, False))
    for count in (1, 3, 4, 5, 19):
        x = np.arange(count, dtype=np.float64)
        (found,) = made([x, np.float64(1)])
        np.testing.assert_array_equal(found, x**2 + 1)
    assert sizes == [1, 4, 4, 8, 8, 8, 4]
