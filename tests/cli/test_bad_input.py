"""Whatever is wrong: one clear message, a non-zero exit status, never a traceback."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from laconic.core.recipe import Recipe
from laconic.engine.result import Result
from laconic.program.capture import capture

from .conftest import said

FOLD = ("--step", "simplify.fold")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([("def model", "def modell")], r"task.py: defines no function model() (did you mean"),
        ([("def task", "def other")], "defines no function task()"),
        ([("    return net", "    net")], "model() returned NoneType"),
        (
            [("return net", "net[0].weight.data[0, 0] = float('nan'); return net")],
            "0.weight: 1 of 256 values are NaN or infinite",
        ),
        (
            [("nn.Linear(32, 3))", "nn.Linear(32, 3), Branch())"), ("def batches", "BRANCH")],
            "torch.export cannot follow this model",
        ),
        (
            [("validation=batches(12, 2)", "validation=[(torch.zeros(4, 9), torch.zeros(4))]")],
            "task.validation, batch 1: the model itself fails on inputs of shapes [(4, 9)]",
        ),
        (
            [("train=", "calibration=[torch.full((4, 8), float('nan'))], train=")],
            "NaN or infinite",
        ),
        ([("validation=batches(12, 2)", "validation=[]")], "task.validation: the loader is empty"),
        (
            [("test=", "metric=lambda o, t: 'good', test=")],
            "metric 'accuracy': returned str, expected a tensor",
        ),
        (
            [("test=", "metric=lambda o, t: (o.argmax(1) == t).float().mean(), test=")],
            "one score per sample",
        ),
        (
            [("test=", "metric=lambda o, t: o[:, 0] * float('nan'), test=")],
            "NaN or infinite scores",
        ),
    ],
)
def test_a_task_that_is_wrong(laconic, task_file, tmp_path, changes, says):
    branch = (
        "class Branch(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n\n"
        "def batches"
    )
    path = task_file(*[(old, branch if new == "BRANCH" else new) for old, new in changes])
    result = laconic("compress", path, *FOLD, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert says in said(result)


def test_debug_lets_the_traceback_through(laconic, task_file, tmp_path):
    path = task_file(("def model", "def modell"))
    result = laconic("compress", path, "--debug", "--out", tmp_path / "out")
    assert type(result.exception).__name__ == "TaskError"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-dorp", "1"], "--max-drop"),
        (["--runtime", "openvin"], "did you mean 'openvino'?"),
        (["--minimize", "macz"], "did you mean 'macs'?"),
        (["--max-drop", "-1"], "--max-drop: found -1.0"),
        (["--step", "simplify.fld"], "did you mean 'simplify.fold'?"),
        (["--step", "quantize.static bit=4"], "has no option 'bit' (did you mean 'bits'?)"),
        (["--step", "quantize.static bits=40"], "bits = 40: Input should be less than"),
        (["--device", "tpu9", *FOLD], "device 'tpu9': cannot be used"),
    ],
)
def test_an_option_that_is_wrong(laconic, task_file, tmp_path, arguments, says):
    result = laconic("compress", task_file(), "--out", tmp_path / "out", *arguments)
    assert result.exit_code != 0
    assert says in said(result)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- {metod: simplify.fold}", "write 'method' instead of 'metod'"),
        ("stepz: []", "unknown key 'stepz' (did you mean 'steps'?)"),
        ("- {method: simplify.fold, batchnorm: no}", "did you mean 'batch_norm'?"),
        ("- {method: quantize.static, sites: layr9.*}", "match nothing"),
        ("[", "is not YAML"),
        ("3", "found int, expected a list of steps"),
    ],
)
def test_a_recipe_that_is_wrong(laconic, task_file, tmp_path, text, says):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    result = laconic("compress", task_file(), "--recipe", path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert says in said(result)


def test_a_budget_nothing_can_meet(laconic, task_file, tmp_path, monkeypatch):
    monkeypatch.setattr("laconic.planning.candidates.REMOVED", ())
    path = task_file(("validation=batches(12, 2)", "validation=batches(1, 2)"))
    out = tmp_path / "out"
    result = laconic(
        "compress", path, "--minimize", "size", "--max-drop", "0.01", "--threads", 1, "--out", out
    )
    assert result.exit_code == 1
    text = said(result)
    assert "no recipe can be shown to lose at most 0.01 points; closest was 'int8'" in text
    assert "give at least 29958 validation samples, or raise --max-drop" in text
    assert f"laconic resume {out}" in text


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_file(laconic, task_file, tmp_path, damage):
    good = tmp_path / "model.laconic"
    assert laconic("export", task_file(), "--to", "onnx", "-o", tmp_path / "m.onnx").exit_code == 0
    from laconic.cli._load import program_of
    from laconic.storage import save

    save(program_of(task_file()), good)
    data = bytearray(good.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    else:
        data[-len(data) // 3] ^= 0x40
    good.write_bytes(data)
    for command in (["inspect", good], ["export", good, "--to", "onnx"], ["measure", good]):
        result = laconic(*command)
        assert result.exit_code == 1
        assert damage in said(result)


def test_verbs_name_what_they_miss(laconic, tmp_path):
    for command, says in (
        (["resume", tmp_path], "holds no job to resume"),
        (["report", tmp_path], "result.json: cannot be read"),
        (["run", tmp_path / "no.onnx", tmp_path / "no.npz"], "no.onnx: no such file"),
        (["measure", tmp_path / "no.onnx"], "no.onnx: no such file"),
        (["methods", "prune.chanels"], "did you mean 'prune.channels'?"),
        (["compres"], "compress"),
    ):
        result = laconic(*command)
        assert result.exit_code != 0
        assert says in said(result)


def test_a_full_disk_leaves_the_earlier_result_whole(laconic, tmp_path, full_disk):
    """Writing the report fails: it takes more than a megabyte."""
    out = tmp_path / "out"
    program = capture(nn.Linear(4, 3), torch.randn(2, 4))
    measurements = {"original": [], "compressed": []}
    Result(program=program, recipe=Recipe(), measurements=measurements).save(out)
    (out / "report.html").write_bytes(b"earlier")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with full_disk(1_000_000):
        done = laconic("report", out)
    assert done.exit_code == 1, said(done)
    assert f"File too large; what was saved in {out} earlier is untouched" in said(done)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_ctrl_c_keeps_the_state_and_resume_goes_on(laconic, task_file, tmp_path):
    out = tmp_path / "out"
    slow = task_file(
        ("import laconic\n", "import laconic, time, sys, os\n"),
        ("def task():", "def slow(o, t):\n"
         "    if os.path.exists(MARK): time.sleep(60)\n"
         "    return (o.argmax(1) == t).float()\n\ndef task():"),
        ("test=", "metric=slow, test="),
        ("W = ", f"MARK = {str(tmp_path / 'out/.laconic/go')!r}\nW = "),
    )  # fmt: skip
    command = [
        sys.executable, "-m", "laconic", "compress", str(slow), "--step", "simplify.fold",
        "--step", "quantize.static", "--minimize", "size", "--out", str(out),
    ]  # fmt: skip
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        # a suite that was started in the background would hand its ignored SIGINT on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert running.stdout is not None
    heard: list[str] = []
    for line in running.stdout:
        heard.append(line)
        if line.startswith("simplify.fold"):
            (out / ".laconic" / "go").touch()
            break
    else:
        raise AssertionError("".join(heard))
    for line in running.stdout:
        heard.append(line)
        if line.startswith("quantize.static"):
            break
    running.send_signal(signal.SIGINT)
    rest = running.communicate(timeout=60)[0]
    assert running.returncode == 130, rest
    assert f"`laconic resume {out}` goes on" in " ".join(rest.split())
    assert "Traceback" not in rest
    kept = {p.name for p in (out / ".laconic").glob("*.laconic")}
    assert len(kept) >= 1
    (out / ".laconic" / "go").unlink()
    result = laconic("resume", out)
    assert result.exit_code == 0, said(result)
    assert "simplify.fold: default options" not in result.output  # it was finished
    assert Path(out / "model.laconic").exists()
    assert not (out / ".laconic").exists()
    assert laconic("resume", out).exit_code == 1
