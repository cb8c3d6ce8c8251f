"""What a runtime has to offer: say what it cannot express, write a file, load it, run it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from laconic.core.errors import ExportError
from laconic.program.program import Program
from laconic.program.signature import Signature

Array = NDArray[Any]
Precision = Literal["fp32", "bf16", "int8"]
Shapes = Mapping[str, Sequence[int]]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")


class Runner(ABC):
    """A loaded file, ready to run. Inputs and outputs are flat, in the Program's order.

    Attributes:
        inputs: names of the inputs, the Program's placeholders.
        conditions: what a measurement has to state: runtime, version, precision, threads.
    """

    inputs: tuple[str, ...]
    conditions: Mapping[str, Any]

    @abstractmethod
    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Outputs for one batch; arrays of the captured dtypes.

        Raises:
            ExportError: the runtime refuses the inputs.
        """

    def as_model(self, signature: Signature) -> "Model":
        """A callable with the original model's arguments and outputs (tensors)."""
        return Model(self, signature)


class Model:
    """A Runner that is called as the original model was."""

    def __init__(self, runner: Runner, signature: Signature) -> None:
        self.runner = runner
        self.signature = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs nested as the model's, as tensors on the CPU."""
        flat = self.signature.flatten(args, kwargs)
        outputs = self.runner.run([tensor.detach().cpu().numpy() for tensor in flat])
        return self.signature.arrange([torch.from_numpy(output) for output in outputs])


class Runtime(ABC):
    """One way of running a Program on this machine; a file of this folder defines one.

    Attributes:
        name: its file's name.
        suffix: what its files end in.
        precisions: what it can be asked for; `int8` means: integer kernels where the Program
            carries quantisation nodes, the fastest sound float precision elsewhere.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    precisions: ClassVar[tuple[Precision, ...]]

    @abstractmethod
    def check(self, program: Program, precision: Precision = "fp32") -> list[str]:
        """What stands in the way of running `program` so, in words; empty if nothing does."""

    @abstractmethod
    def write(self, program: Program, path: Path, precision: Precision = "fp32") -> Path:
        """Write `program` to `path`; an existing file is replaced only by a complete one.

        Raises:
            ExportError: the runtime cannot express it (see `check`), or the file cannot be written.
        """

    @abstractmethod
    def load(
        self,
        path: Path,
        precision: Precision = "fp32",
        threads: int | None = None,
        shapes: Shapes | None = None,
    ) -> Runner:
        """Open a file.

        Args:
            path: what `write` gave.
            precision: what the float operators compute in (see `precisions`).
            threads: intra-op threads; None means all cores.
            shapes: fixed input shapes by name; runtimes that compile per shape are faster with
                them. Without, dynamic dimensions stay dynamic.

        Raises:
            ExportError: the file is not one of this runtime's, or is damaged.
        """

    def files(self, path: Path) -> list[Path]:
        """Every file that has to ship for `path` to work."""
        return [path]

    def demand(self, program: Program, precision: Precision) -> None:
        """Raise what `check` found.

        Raises:
            ExportError: with every obstacle named.
        """
        obstacles = self.check(program, precision)
        if obstacles:
            raise ExportError("; ".join(obstacles), where=f"{self.name} {precision}")


def quantized(program: Program) -> bool:
    """Whether the Program carries quantisation nodes."""
    targets = (torch.ops.laconic.fake_quantize.default, torch.ops.laconic.dequantize.default)
    return any(node.target in targets for node in program.graph.nodes)


def check_precision(runtime: Runtime, program: Program, precision: Precision) -> list[str]:
    """The obstacles every runtime shares."""
    if precision not in runtime.precisions:
        return [f"has no {precision}; it has {', '.join(runtime.precisions)}"]
    if precision == "int8" and not quantized(program):
        return ["the program carries no quantisation nodes: apply quantize.static first"]
    return []


def fixed_shapes(program: Program, batch: int) -> dict[str, tuple[int, ...]]:
    """The example's input shapes with the batch dimension set to `batch`, for `Runtime.load`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for node, tensor in zip(program.placeholders, program.example, strict=True):
        names = program.dynamic.get(node.name, {})
        shapes[node.name] = tuple(
            batch if names.get(dim) == "batch" else size for dim, size in enumerate(tensor.shape)
        )
    return shapes


def batch_of(program: Program, batch: int) -> list[Array]:
    """The example inputs repeated (or cut) to a batch, flat, for timing and dry runs."""
    arrays: list[Array] = []
    for node, tensor in zip(program.placeholders, program.example, strict=True):
        value: Tensor = tensor
        for dim, name in program.dynamic.get(node.name, {}).items():
            if name == "batch":
                index = torch.arange(batch) % tensor.shape[dim]
                value = value.index_select(dim, index)
        arrays.append(np.ascontiguousarray(value.numpy()))
    return arrays


def checked(outputs: Sequence[Any], where: str) -> list[Array]:
    """Outputs as arrays.

    Raises:
        ExportError: a runtime gave something else.
    """
    arrays = [np.asarray(output) for output in outputs]
    if any(array.dtype == object for array in arrays):
        raise ExportError("an output is not a tensor", where=where)
    return arrays


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
