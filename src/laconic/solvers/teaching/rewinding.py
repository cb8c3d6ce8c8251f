"""Early states of a training: remembered while it runs, read from a file, and gone back to."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from laconic import storage
from laconic.core.errors import RecipeError, StorageError
from laconic.core.suggest import nearest
from laconic.program.program import Program
from laconic.training.attendant import Attendant
from laconic.training.plan import Plan

Values = dict[str, Tensor]


def levels(first: float, last: float, each: float) -> list[float]:
    """Sparsity after each round, when `each` of what is left goes and the last one is `last`.

    >>> [round(level, 3) for level in levels(0.0, 0.5, 0.2)]
    [0.2, 0.36, 0.488, 0.5]
    """
    found: list[float] = []
    left = 1.0 - first
    while 1.0 - left < last:
        left *= 1.0 - each
        if 1.0 - left > last - 1e-9:
            return [*found, last]
        found.append(1.0 - left)
    return found


class Snapshot(Attendant):
    """Remembers all tensors of a Program as they are after `step` steps.

    Attributes:
        values: tensor → value; those of the beginning until the step has come.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._program: Program | None = None
        self.values: Values = {}

    def begin(self, program: Program, plan: Plan) -> None:
        """Remember the beginning."""
        del plan
        self._program = program
        self.values = values_of(program)

    def after(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Remember the state, if the step has come."""
        del optimizer
        if step == self._step and self._program is not None:
            self.values = values_of(self._program)

    def tensors(self) -> Mapping[str, Tensor]:
        """What is remembered."""
        return self.values

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, value in self.values.items():
            value.copy_(tensors[name])


def values_of(program: Program) -> Values:
    """Copies of all tensors, rows first."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in program.tensors()
    }


def put(program: Program, values: Mapping[str, Tensor]) -> None:
    """Give a Program copies of `values`, in its own types."""
    for name, value in values.items():
        program.set_tensor(name, value.to(program.tensor(name), copy=True))


def early_state(path: str, program: Program) -> Values:
    """The tensors of `program` from a file: `.safetensors` with a state dict, or `.laconic`.

    Raises:
        StorageError: there is no such file, or it is damaged.
        RecipeError: it lacks a tensor of the program, or holds one of another shape.
    """
    held = _read(Path(path))
    found: Values = {}
    for name, tensor in program.tensors():
        others = [alias for alias, kept in program.aliases.items() if kept == name]
        known = next((each for each in (name, *others) if each in held), None)
        if known is None:
            raise RecipeError(
                f"{path} has no tensor {name!r}",
                where="initial",
                hint=f"{nearest(name, held)}; an early state has the tensors of the program that "
                "is pruned: rewind before folding, cutting or quantising",
            )
        if held[known].shape != tensor.shape:
            raise RecipeError(
                f"{known} of {path} has shape {list(held[known].shape)}, "
                f"the program's {list(tensor.shape)}",
                where="initial",
                hint="an early state has the shapes of the program that is pruned",
            )
        found[name] = held[known]
    return found


def digest_of(path: str, expected: str | None) -> str:
    """SHA-256 of a file.

    Raises:
        StorageError: it cannot be read.
        RecipeError: it is not the `expected` one.
    """
    try:
        with Path(path).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=path) from error
    if expected not in (None, found):
        raise RecipeError(
            f"{path} is not the file that the step was resolved with",
            where="initial",
            hint="leave 'initial_hash' out to take the file as it is now",
        )
    return found


def _read(path: Path) -> Values:
    if path.suffix != ".safetensors":
        return {name: tensor.detach() for name, tensor in storage.load(path).state_dict().items()}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"cannot be read: {error}",
            where=str(path),
            hint="initial takes a .safetensors file of a state dict, or a .laconic file",
        ) from error
