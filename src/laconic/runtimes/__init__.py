"""Runtimes that run what Laconic makes: one file each; a name is a file."""

from pathlib import Path
from typing import Any

import numpy as np

from laconic.core import registry
from laconic.program.program import Program
from laconic.runtimes.base import PRECISIONS as PRECISIONS
from laconic.runtimes.base import Model as Model
from laconic.runtimes.base import Precision as Precision
from laconic.runtimes.base import Runner as Runner
from laconic.runtimes.base import Runtime as Runtime
from laconic.runtimes.base import batch_of as batch_of
from laconic.runtimes.base import fixed_shapes as fixed_shapes


def names() -> list[str]:
    """Names of all runtimes, without importing any.

    >>> names()
    ['inductor', 'onnxruntime', 'openvino']
    """
    return registry.names(__name__)


def get(name: str) -> Runtime:
    """The runtime `name`.

    Raises:
        RecipeError: there is none of that name; the nearest is named.
    """
    kind: Any = registry.load(__name__, name, Runtime)
    return kind()


def exercise(
    runtime: str,
    path: str,
    precision: Precision,
    threads: int,
    inputs: dict[str, tuple[list[int], str]],
    calls: int = 3,
) -> None:
    """Load a file and run it on zeros: what a fresh process does to measure its memory.

    Args:
        runtime: name of the runtime.
        path: the file.
        precision: as in `Runtime.load`.
        threads: as in `Runtime.load`.
        inputs: name → (shape, NumPy dtype), see `described`.
        calls: how often to run it.
    """
    shapes = {name: shape for name, (shape, _) in inputs.items()}
    runner = get(runtime).load(Path(path), precision, threads, shapes)
    arrays = [np.zeros(*inputs[name]) for name in runner.inputs]
    for _ in range(calls):
        runner.run(arrays)


def described(program: Program, batch: int) -> dict[str, tuple[list[int], str]]:
    """Shapes and dtypes of a batch of the Program's inputs, as JSON, for `exercise`."""
    arrays = batch_of(program, batch)
    named = zip(program.placeholders, arrays, strict=True)
    return {node.name: (list(array.shape), str(array.dtype)) for node, array in named}
