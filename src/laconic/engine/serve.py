"""What a serving process does: open the file, run a batch. Its memory is measured."""

from pathlib import Path
from typing import Any

import numpy as np

from laconic import runtimes
from laconic.runtimes.base import Precision

_RUNS = 3  # the first ones allocate


def serve(runtime: str, path: str, precision: Precision, threads: int | None, inputs: str) -> None:
    """Load the file `path` and run the arrays of the `.npz` file `inputs`, in their order."""
    with np.load(inputs) as held:
        arrays: list[Any] = [held[name] for name in held.files]
    runner = runtimes.get(runtime).load(Path(path), precision, threads)
    for _ in range(_RUNS):
        runner.run(arrays)
