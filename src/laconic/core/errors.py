"""Every error Laconic raises on purpose.

A message says where it happened, what was found, what was expected and what to do about it. The
command line prints these without a traceback; anything else is a defect.
"""


class LaconicError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what was found and what was expected.
        where: the place: a parameter path, a node, a file, a recipe step.
        hint: the way out.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        way_out = f" ({self.hint})" if self.hint else ""
        notes = "".join(f"\n  {note}" for note in getattr(self, "__notes__", ()))
        return f"{place}{self.message}{way_out}{notes}"


class CaptureError(LaconicError):
    """A model could not be turned into a Program."""


class TaskError(LaconicError):
    """A task file or a Task is not what it has to be."""


class DataError(LaconicError):
    """Data whose shape, type or values do not fit (wrong shape, NaN, an empty loader)."""


class RecipeError(LaconicError):
    """A recipe names an unknown method, option or site, or a value out of range."""


class BudgetError(LaconicError):
    """A budget that cannot be met, or makes no sense."""


class SurgeryError(LaconicError):
    """A graph could not be changed as asked; the input Program is untouched."""


class StorageError(LaconicError):
    """A file is truncated, altered, too large, of an unknown version, or could not be written."""


class ExportError(LaconicError):
    """A runtime cannot express or run a Program."""


class TrainingError(LaconicError):
    """Training diverged or cannot start; the last good state is kept."""


class MissingExtra(LaconicError):
    """An optional dependency is not installed."""


def first_line(error: Exception) -> str:
    """The first line of what an error says, or the error itself where it says nothing."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
