"""A Program saved and loaded is itself: outputs bit for bit, names, ties, modes."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from laconic import storage
from laconic.core.errors import StorageError
from laconic.program.capture import capture
from laconic.program.signature import Record
from laconic.testing import zoo


def round_trip(program, tmp_path, **options):
    path = tmp_path / "model.laconic"
    size = storage.save(program, path, **options)
    assert path.stat().st_size == size == storage.predict(program, **options).total
    assert [p.name for p in tmp_path.iterdir()] == ["model.laconic"]
    return storage.load(path)


def assert_same(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, x), (other, y) in zip(a.tensors(), b.tensors(), strict=True):
        assert name == other and x.dtype == y.dtype and x.shape == y.shape, name
        assert isinstance(x, nn.Parameter) == isinstance(y, nn.Parameter), name
        assert x.requires_grad == y.requires_grad and x.stride() == y.stride(), name
        assert torch.equal(x.detach(), y.detach()), name
    for x, y in zip(a.graph.nodes, b.graph.nodes, strict=True):
        assert (x.op, x.name, str(x.target)) == (y.op, y.name, str(y.target))
        assert (x.meta.get("origin") or "") == (y.meta.get("origin") or "")
        assert x.meta.get("grid") == y.meta.get("grid")
        assert x.meta.get("shape") == y.meta.get("shape")
        assert x.meta.get("dtype") == y.meta.get("dtype")
    assert (a.dynamic, a.aliases, a.lost) == (b.dynamic, b.aliases, b.lost)
    assert [(t.shape, t.dtype) for t in a.example] == [(t.shape, t.dtype) for t in b.example]


@pytest.mark.parametrize("name", zoo.names())
def test_the_whole_zoo(name, tmp_path):
    program = zoo.captured(name)
    loaded = round_trip(program, tmp_path)
    assert_same(program, loaded)
    for x, y in zip(
        program.run_flat(*program.example), loaded.run_flat(*program.example), strict=True
    ):
        assert torch.equal(x, y)


def test_structured_outputs_and_infinities(net, tmp_path):
    loaded = round_trip(net, tmp_path)
    assert_same(net, loaded)
    x = torch.randn(5, 3, 8, 8)
    ours, theirs = loaded(x), net(x)
    assert list(ours) == ["logits", "features"] and isinstance(ours["features"], tuple)
    assert torch.equal(ours["logits"], theirs["logits"])
    assert torch.equal(ours["features"][1], theirs["features"][1])


def test_integer_codes(frozen, tmp_path):
    loaded = round_trip(frozen, tmp_path)
    assert_same(frozen, loaded)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x)["logits"], frozen(x)["logits"])
    rows = {row[0]: row for row in storage.read_header(tmp_path / "model.laconic")["tensors"]}
    assert rows["body.weight"][2] == "int8" and rows["body.weight"][5] == "affine.codes"
    assert rows["body.weight_scale"][5] == "affine.scale"


def test_ties_stay_ties(tied, tmp_path):
    loaded = round_trip(tied, tmp_path)
    assert_same(tied, loaded)
    names = list(loaded.aliases.items())
    assert names and all(loaded.tensor(a) is loaded.tensor(n) for a, n in names)
    ids = torch.randint(0, 20, (3, 9))
    assert torch.equal(loaded(ids), tied(ids)), "sequence and batch stay dynamic"


def test_it_trains_on(net, tmp_path):
    loaded = round_trip(net, tmp_path).train()
    before = loaded.tensor("stem.1.running_mean").clone()
    loss = loaded(torch.randn(4, 3, 8, 8))["logits"].square().mean()
    loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert not torch.equal(before, loaded.tensor("stem.1.running_mean"))


def test_a_program_in_training_is_stored_in_eval_mode(net, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)["logits"]
    net.train()
    loaded = round_trip(net, tmp_path)
    assert not loaded.training and net.training
    assert torch.equal(loaded(x)["logits"], expected)


def test_memory_format_frozen_parameters_and_float64(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).double()
    model = model.to(memory_format=torch.channels_last)
    model[1].weight.requires_grad_(False)
    program = capture(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert_same(program, round_trip(program, tmp_path))


def test_a_record_comes_back_by_name(tmp_path):
    @dataclass
    class Answer:
        logits: torch.Tensor
        extra: object = None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return Answer(self.fc(x))

    torch.export.register_dataclass(Answer)
    program = capture(Model(), torch.randn(2, 4))
    answer = round_trip(program, tmp_path)(torch.ones(3, 4))
    assert isinstance(answer, Record) and answer.logits.shape == (3, 2) and answer.extra is None


def test_extra_comes_back(net, tmp_path):
    extra = {"recipe": [{"method": "prune.channels"}], "note": "äöü ✓", "x": [1.5, None, True]}
    round_trip(net, tmp_path, extra=extra)
    assert storage.read_header(tmp_path / "model.laconic")["extra"] == extra
    with pytest.raises(StorageError, match="JSON"):
        storage.save(net, tmp_path / "x.laconic", extra={"bad": {1, 2}})
    with pytest.raises(StorageError, match="JSON"):
        storage.save(net, tmp_path / "x.laconic", extra={"bad": float("nan")})


def test_the_same_program_gives_the_same_bytes(frozen, tmp_path):
    storage.save(frozen, tmp_path / "a")
    storage.save(frozen.clone(), tmp_path / "b")
    storage.save(storage.load(tmp_path / "a"), tmp_path / "c")
    raw = (tmp_path / "a").read_bytes()
    assert raw == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_size_report_adds_up(frozen):
    report = storage.predict(frozen)
    assert report.total == report.header + sum(report.tensors.values())
    assert set(report.tensors) == {name for name, _ in frozen.tensors()}
    assert report.header < 1200, "a small network is not dominated by its header"


def test_it_loads_in_a_process_that_knows_nothing(net, tmp_path):
    """No source code, no pickle: only laconic and torch."""
    x = torch.ones(2, 3, 8, 8)
    round_trip(net, tmp_path)
    code = (
        "import sys, torch\n"
        "from laconic import storage\n"
        "def refuse(event, _):\n"
        "    if event == 'pickle.find_class': raise SystemExit('pickle was used')\n"
        "sys.addaudithook(refuse)\n"
        "program = storage.load(sys.argv[1])\n"
        "print(program(torch.ones(2, 3, 8, 8))['logits'].sum().item().hex())\n"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "model.laconic"],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert abs(float.fromhex(found.stdout.strip()) - net(x)["logits"].sum().item()) < 1e-4


class FullDisk:
    """A file that takes some bytes and then says that the disk is full."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        if len(data) > self._room:
            self._file.write(data[: self._room])
            raise self.error()
        self._room -= len(data)
        return self._file.write(data)

    @staticmethod
    def error():
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("room", [0, 40, 2000])
def test_a_full_disk_leaves_the_earlier_file_whole(net, tmp_path, monkeypatch, room):
    path = tmp_path / "model.laconic"
    storage.save(net, path)
    before = path.read_bytes()
    plain = Path.open

    def tight(self, mode="r", *rest, **options):
        file = plain(self, mode, *rest, **options)
        return FullDisk(file, room) if "x" in mode else file

    monkeypatch.setattr(Path, "open", tight)
    with pytest.raises(StorageError, match=r"No space left.*untouched"):
        storage.save(net, path, extra={"more": 1})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    storage.load(path)


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_an_interruption_leaves_the_earlier_file_whole(net, tmp_path, monkeypatch, moment):
    path = tmp_path / "model.laconic"
    storage.save(net, path)
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    if moment == "write":
        monkeypatch.setattr(os, "fsync", interrupted)
    else:
        monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.save(net, path, extra={"more": 1})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written_or_read(net, tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        storage.save(net, tmp_path / "missing" / "model.laconic")
    with pytest.raises(StorageError, match="No such file"):
        storage.load(tmp_path / "nothing.laconic")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError):
        storage.save(net, tmp_path / "folder")
    with pytest.raises(StorageError):
        storage.load(tmp_path / "folder")


def test_an_operator_off_the_list_is_refused_by_name(net, tmp_path):
    node = net.output_node
    with net.graph.inserting_before(node):
        made = net.graph.call_function(torch.ops.aten.from_file.default, ("/etc/passwd",))
    with pytest.raises(StorageError, match="from_file") as caught:
        storage.save(net, tmp_path / "model.laconic")
    assert made.name in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_operator_that_writes_is_refused(net, tmp_path):
    relu = next(n for n in net.graph.nodes if n.target is torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.relu_.default
    with pytest.raises(StorageError, match="relu_"):
        storage.save(net, tmp_path / "model.laconic")
