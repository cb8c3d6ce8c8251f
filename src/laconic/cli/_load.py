"""What several verbs do with the file they are given."""

from pathlib import Path

from laconic import storage
from laconic.core.errors import StorageError
from laconic.engine.check import capture_for
from laconic.engine.taskfile import TaskFile, read_task_file
from laconic.program import members
from laconic.program.program import Program


def captured(found: TaskFile) -> Program:
    """The model of a task file as a Program."""
    return capture_for(found.model, found.task, found.example_inputs)


def program_of(path: Path) -> Program:
    """The Program in a `.laconic` file, or the captured model of a task file.

    Raises:
        StorageError: the file is neither, is missing or damaged.
    """
    if path.suffix == ".py":
        return captured(read_task_file(path))
    if path.is_dir():
        path = path / "model.laconic"
    if path.exists() and path.suffix != ".laconic":
        raise StorageError(
            f"is a {path.suffix or 'nameless'} file, expected .laconic or a task file (.py)",
            where=str(path),
        )
    return storage.load(path)


def member_of(program: Program, name: str | None) -> Program:
    """`program`, computing its model `name`; the one it computes anyway if none is named.

    Raises:
        SurgeryError: it holds no such model; says the nearest names.
    """
    return program if name is None else members.choose(program, name)
