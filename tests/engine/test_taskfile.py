from pathlib import Path

import pytest

from laconic.core.errors import TaskError
from laconic.engine.taskfile import read_task_file

GOOD = """
import torch
from laconic.core.task import classification
from sibling import width

def model():
    return torch.nn.Linear(4, width)

def task():
    return classification(validation=[(torch.zeros(2, 4), torch.zeros(2).long())])
"""


def write(folder: Path, text: str) -> Path:
    (folder / "sibling.py").write_text("width = 3")
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_a_task_file_is_run_with_its_folder_at_hand(tmp_path, monkeypatch):
    found = read_task_file(write(tmp_path, GOOD))
    assert found.model.out_features == 3
    assert found.task.metric_name == "accuracy"
    assert found.example_inputs is None
    assert len(found.sha256) == 64


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("def model", "def modell"), r"defines no function model\(\).*'modell'"),
        (GOOD.replace("def task", "def other"), r"defines no function task\(\)"),
        (GOOD.replace("return torch", "torch"), r"model\(\) returned NoneType.*return"),
        (GOOD.replace("def model():", "def model(:"), r"mine.py:6: .*SyntaxError"),
        (GOOD.replace("Linear(4, width)", "Linear(4, 1 // 0)"), r"mine.py:7: .*ZeroDivisionError"),
        (GOOD.replace("from sibling", "from brother"), r"mine.py:4: .*ModuleNotFoundError"),
        (GOOD + "\ndef example_inputs():\n    raise KeyError('x')\n", "example_inputs.*KeyError"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, says):
    with pytest.raises(TaskError, match=says):
        read_task_file(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TaskError, match="nothing.py: cannot be read"):
        read_task_file(tmp_path / "nothing.py")
