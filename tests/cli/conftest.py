"""Task files small enough to be compressed within a test, and the command run in process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from laconic.cli import app

TASK = """
import torch
from torch import nn
import laconic

W = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

def batches(count, seed, size=64):
    draw = torch.Generator().manual_seed(seed)
    xs = [torch.randn(size, 8, generator=draw) for _ in range(count)]
    return [(x, (x @ W).argmax(1)) for x in xs]

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(3):
        for x, y in batches(30, 1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net

def task():
    return laconic.classification(
        train=batches(4, 1), validation=batches(12, 2), test=batches(4, 3)
    )
"""


@pytest.fixture
def task_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task file; pairs of strings are replaced in it."""

    def write(*changes: tuple[str, str], name: str = "task.py") -> Path:
        text = TASK
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def laconic(short_turns: None) -> Callable[..., Result]:
    """Runs the command in process; latencies are taken, but briefly."""

    def run(*args: object) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})

    return run


def said(result: Result) -> str:
    """Everything that was printed, on one line; no traceback may be among it."""
    text = " ".join((result.output + result.stderr).split())
    assert "Traceback" not in text
    return text
