"""A task file: plain Python that defines `model()`, `task()` and, if needed, `example_inputs()`.

import torch
from laconic import classification
from mine import Net, loaders

def model():
    net = Net()
    net.load_state_dict(torch.load("net.pt", weights_only=True))
    return net

def task():
    train, validation, test = loaders()
    return classification(train=train, validation=validation, test=test)
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from laconic.core.errors import TaskError
from laconic.core.suggest import nearest
from laconic.core.task import Task

_HINT = "a task file defines model() -> nn.Module and task() -> laconic.Task"


@dataclass(frozen=True)
class TaskFile:
    """A task file that was run: its model, its task, its example inputs (None if it has none)."""

    path: Path
    sha256: str
    model: nn.Module
    task: Task
    example_inputs: Any


def read_task_file(path: str | Path) -> TaskFile:
    """Run a task file and take what it defines.

    Raises:
        TaskError: no such file, an error inside it (with file and line), a function is missing
            (names the nearest one found), or one returns something else.
    """
    path = Path(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise TaskError(f"cannot be read: {error.strerror}", where=str(path), hint=_HINT) from error
    module = _run(path)
    make_model = _function(module, "model", path)
    make_task = _function(module, "task", path)
    model = _call(make_model, path, nn.Module)
    task = _call(make_task, path, Task)
    example = None
    if "example_inputs" in vars(module):
        example = _call(_function(module, "example_inputs", path), path, object)
    return TaskFile(path, hashlib.sha256(source).hexdigest(), model, task, example)


def _run(path: Path) -> ModuleType:
    """Import the file under a name of its own; its folder can be imported from meanwhile."""
    name = f"laconic_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError("is not a Python file", where=str(path), hint=_HINT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _failed(error, path, "running the file") from error
    finally:
        sys.path.pop(0)
    return module


def _function(module: ModuleType, name: str, path: Path) -> Callable[[], Any]:
    found = vars(module).get(name)
    if callable(found):
        return found
    own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
    near = nearest(name, own) if own else _HINT
    raise TaskError(
        f"defines no function {name}()",
        where=str(path),
        hint=near if near.startswith("did") else _HINT,
    )


def _call(function: Callable[[], Any], path: Path, kind: type) -> Any:
    name = function.__name__
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        value = function()
    except Exception as error:
        raise _failed(error, path, f"{name}()") from error
    finally:
        sys.path.pop(0)
    if not isinstance(value, kind):
        raise TaskError(
            f"{name}() returned {type(value).__name__}, expected {kind.__name__}",
            where=str(path),
            hint="forgot the return statement?" if value is None else _HINT,
        )
    return value


def _failed(error: Exception, path: Path, what: str) -> TaskError:
    """The user's own error, with the line of the user's file it came from."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).name == path.name and frame.lineno
    ]
    if isinstance(error, SyntaxError) and error.lineno:
        lines = [error.lineno]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    text = str(error).strip().splitlines()
    first = text[0] if text else "no message"
    return TaskError(
        f"{what} failed with {type(error).__name__}: {first}",
        where=place,
        hint="--debug shows the whole traceback",
    )
