"""Shapes of a graph that came from a file, by fake execution that a forged graph cannot stretch.

Fake execution touches no data, but an operator that cuts a huge tensor into single elements makes
as many Python objects, and powers of integers grow without end; both are bounded here.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from laconic.core.errors import LaconicError, StorageError, first_line
from laconic.program.program import Program
from laconic.program.shapes import Shapes

_PIECES = 50_000
_LARGEST = 1 << 63
_LARGEST_EXPONENT = 64


def propagate(program: Program) -> None:
    """Set `meta["shape"]` and `meta["dtype"]` of every node, as `Program.propagate` does.

    Raises:
        StorageError: an operator refuses its inputs, or asks for too much; names the node.
    """
    _Bounded.write(program, program.example)


class _Bounded(Shapes):
    def __init__(self, program: Program, mode: FakeTensorMode) -> None:
        super().__init__(program, mode)
        self._pieces = _PIECES

    def refusal(self, n: fx.Node, error: Exception) -> LaconicError:
        reason = first_line(error)[:200]
        return StorageError(f"{n.target} does not fit its inputs: {reason}", where=n.name)

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except StorageError as error:
            raise StorageError(error.message, where=n.name) from error

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            self._pieces -= _pieces(target, args, kwargs)
            if self._pieces < 0:
                raise StorageError(f"{target} cuts tensors into more than {_PIECES} pieces")
        elif target is not operator.getitem:
            _check_numbers(target, args)
        value = super().call_function(target, args, kwargs)
        if isinstance(value, int) and abs(value) >= _LARGEST:
            raise StorageError(f"{target} gives an integer beyond 64 bits")
        return value


def _pieces(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many tensors an operator that returns a list can give, where its inputs do not tell."""
    if not any(isinstance(r.type, torch.ListType) for r in target._schema.returns):
        return 0
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    source, dim = given.get("self"), given.get("dim", 0)
    size = source.shape[dim] if isinstance(source, Tensor) and source.ndim else 0
    if isinstance(given.get("split_size"), int):
        return size // max(1, given["split_size"]) + 1
    counts = [n for n in (given.get("sections"), given.get("chunks")) if isinstance(n, int)]
    return max(counts) if counts else size if "unbind" in str(target) else 0


def _check_numbers(target: Any, args: Sequence[Any]) -> None:
    """Python's own operators are there for sizes; text and lists have no business in them."""
    summed = target is torch.sym_sum and len(args) == 1 and isinstance(args[0], (list, tuple))
    numbers: Sequence[Any] = args[0] if summed else args
    if not all(isinstance(value, (bool, int, float)) for value in numbers):
        raise StorageError(f"{target} on something else than numbers")
    if target is operator.pow and abs(numbers[1]) > _LARGEST_EXPONENT:
        raise StorageError(f"an exponent of {numbers[1]}")
