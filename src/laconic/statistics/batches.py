"""A task's calibration data as the flat inputs of a Program, checked and cut to a sample count."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.core.task import Inputs, Task
from laconic.program.program import Program

Flat = tuple[Tensor, ...]


@dataclass(frozen=True)
class Batches:
    """A re-iterable of a Program's flat inputs, the same ones every time it is gone through.

    Attributes:
        program: whose inputs they are.
        task: where the data come from: `calibration`, else `train`.
        samples: stop after so many; the last batch is cut. None takes all.
        device: where the tensors go.
        size: give at most so many samples at once; larger batches are split. None leaves them.
    """

    program: Program
    task: Task
    samples: int | None = None
    device: torch.device | None = None
    size: int | None = None

    def __iter__(self) -> Iterator[Flat]:
        """Flat inputs, one batch after the other.

        Raises:
            DataError: no data, NaN or infinite values, or shapes that do not fit the program.
        """
        left, number = self.samples, -1
        for number, batch in enumerate(self.task.batches("calibration", "train")):
            where = f"calibration batch {number}"
            flat = flat_inputs(self.program, self.task.split(batch)[0], where)
            check_inputs(self.program, flat, where)
            for part in self._pieces(flat, left):
                yield tuple(t.to(self.device) for t in part) if self.device else part
                left = None if left is None else left - count(self.program, part)
            if left is not None and left <= 0:
                return
        if number < 0:
            raise DataError(
                "the calibration data are empty",
                where=self.task.name,
                hint="a loader has to give batches every time it is gone through, "
                "so give a list or a DataLoader, not a generator",
            )

    def _pieces(self, flat: Flat, left: int | None) -> Iterator[Flat]:
        size, start = count(self.program, flat), 0
        end = size if left is None else min(size, left)
        step = self.size or end
        if not _sliceable(self.program):
            end, step = size, size
        while start < end:
            yield cut(self.program, flat, start, min(start + step, end))
            start += step


def flat_inputs(program: Program, inputs: Inputs, where: str) -> Flat:
    """The graph's inputs from a task's inputs (a tuple, or a dict of keyword arguments).

    Raises:
        DataError: they nest differently from the example inputs.
    """
    args: Sequence[Any] = () if isinstance(inputs, Mapping) else inputs
    kwargs: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}
    try:
        return tuple(program.signature.flatten(args, kwargs))
    except DataError as error:
        raise DataError(error.message, where=f"{where}, {error.where}", hint=error.hint) from None


def check_inputs(program: Program, flat: Flat, where: str) -> None:
    """Refuse inputs that the program cannot take, or that are not finite.

    Raises:
        DataError: names the batch and the input.
    """
    for node, tensor, example in zip(program.placeholders, flat, program.example, strict=True):
        free = program.dynamic.get(node.name, {})
        fits = tensor.ndim == example.ndim and all(
            dim in free or size == wanted
            for dim, (size, wanted) in enumerate(zip(tensor.shape, example.shape, strict=True))
        )
        if not fits:
            wanted = [free.get(dim, size) for dim, size in enumerate(example.shape)]
            raise DataError(
                f"input {node.name} has shape {list(tensor.shape)}, expected {wanted}",
                where=where,
                hint="sizes without a name were fixed by the example inputs of capture(...)",
            )
        if tensor.is_floating_point() != example.is_floating_point():
            raise DataError(
                f"input {node.name} is {tensor.dtype}, expected {example.dtype}", where=where
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise DataError(
                f"input {node.name}: {bad} of {tensor.numel()} values are NaN or infinite",
                where=where,
                hint="clean the data before compressing",
            )


def count(program: Program, flat: Flat) -> int:
    """How many samples a batch holds."""
    for node, tensor in zip(program.placeholders, flat, strict=True):
        for dim, name in program.dynamic.get(node.name, {}).items():
            if name == "batch":
                return tensor.shape[dim]
    return flat[0].shape[0] if flat and flat[0].ndim else 1


def cut(program: Program, flat: Flat, start: int, end: int) -> Flat:
    """Samples `start` to `end` of a batch; inputs without a batch dimension stay whole."""
    parts: list[Tensor] = []
    for node, tensor in zip(program.placeholders, flat, strict=True):
        for dim, name in program.dynamic.get(node.name, {}).items():
            if name == "batch":
                tensor = tensor.narrow(dim, start, end - start)
        parts.append(tensor)
    return tuple(parts)


def padding_mask(program: Program, flat: Sequence[Tensor]) -> Tensor | None:
    """`[batch, tokens]`, true where a token is real: the one input of zeros and ones called a mask.

    None where there is no such input, or more than one, as an encoder and a decoder have them.
    """
    named = zip(program.placeholders, flat, strict=True)
    masks = [tensor for node, tensor in named if "mask" in node.name and tensor.ndim == 2]
    if len(masks) != 1:
        return None
    real = masks[0] == 1
    return real if bool((real | (masks[0] == 0)).all()) else None


def told_nothing(batches: Iterable[Flat]) -> list[str]:
    """A sentence for the outcome if all samples are constants, else none."""
    if not all(_constant(batch) for batch in batches):
        return []
    return ["every calibration sample is the same constant: scores and refits mean nothing"]


def _constant(batch: Flat) -> bool:
    return all(bool((t == t.flatten()[:1]).all()) for t in batch if t.numel())


def _sliceable(program: Program) -> bool:
    return any("batch" in dims.values() for dims in program.dynamic.values())
