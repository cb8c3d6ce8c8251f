"""Make trained PyTorch models smaller and faster: measured, verified, ready to deploy.

    import laconic

    task = laconic.classification(train=..., validation=..., test=...)
    result = laconic.compress(model, task, budget=laconic.Budget(max_drop=0.5))
    result.save("artifacts")

Names are imported on first use, so `import laconic` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from laconic.api import capture as capture
    from laconic.api import compress as compress
    from laconic.api import load as load
    from laconic.api import members as members
    from laconic.api import save as save
    from laconic.api import specialize as specialize
    from laconic.core.budget import Budget as Budget
    from laconic.core.errors import LaconicError as LaconicError
    from laconic.core.measurement import Measurement as Measurement
    from laconic.core.progress import Progress as Progress
    from laconic.core.recipe import Recipe as Recipe
    from laconic.core.recipe import Step as Step
    from laconic.core.task import Task as Task
    from laconic.core.task import classification as classification
    from laconic.core.task import embedding as embedding
    from laconic.core.task import language_modelling as language_modelling
    from laconic.core.task import regression as regression
    from laconic.engine.result import Result as Result
    from laconic.engine.writeback import write_back as write_back
    from laconic.program.program import Program as Program

_HOME = {
    "capture": "api",
    "compress": "api",
    "load": "api",
    "members": "api",
    "save": "api",
    "specialize": "api",
    "Budget": "core.budget",
    "LaconicError": "core.errors",
    "Measurement": "core.measurement",
    "Progress": "core.progress",
    "Recipe": "core.recipe",
    "Step": "core.recipe",
    "Task": "core.task",
    "classification": "core.task",
    "embedding": "core.task",
    "language_modelling": "core.task",
    "regression": "core.task",
    "Result": "engine.result",
    "write_back": "engine.writeback",
    "Program": "program.program",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("laconic")
    if name not in _HOME:
        raise AttributeError(f"module 'laconic' has no attribute {name!r}")
    value = getattr(import_module(f"laconic.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
