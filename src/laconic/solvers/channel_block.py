"""Which multiple of channels a runtime likes on this machine, found out by measuring it.

Kernels work on blocks of channels; a network cut to 63 channels may take as long as one with 64.
The probe times a small chain of convolutions at 64 channels and at 64 less 1, 2, 4, 8, 16 in the
runtime that counts, interleaved. The block is the smallest step down that gains at least half of
the work it takes away. Where none does, width does not decide the speed and the block is 1.
"""

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from laconic.core.progress import SILENT, Progress
from laconic.measuring.latency import Plan, compare
from laconic.program.capture import capture
from laconic.runtimes import get
from laconic.runtimes.base import fixed_shapes

WIDTH = 64
STEPS = (1, 2, 4, 8, 16)
_DEPTH, _SIDE = 6, 16

Times = Mapping[int, float]


def preferred(times: Times) -> int:
    """The block that follows from times by width.

    Args:
        times: width → milliseconds, at `WIDTH` and at `WIDTH` less each of `STEPS`.

    >>> preferred({64: 1.0, 63: 1.0, 62: 1.0, 60: 1.0, 56: 0.76, 48: 0.6})
    8
    >>> preferred({64: 1.0, 63: 1.0, 62: 1.0, 60: 1.0, 56: 1.0, 48: 1.0})
    1
    """
    whole = times[WIDTH]
    for step in STEPS:
        width = WIDTH - step
        saved_work = 1 - (width / WIDTH) ** 2
        if 1 - times[width] / whole >= saved_work / 2:
            return step
    return 1


def measured(runtime: str, threads: int | None, progress: Progress = SILENT) -> dict[int, float]:
    """Milliseconds of the probe at every width, in fp32 at batch 1.

    Raises:
        ExportError, MissingExtra: the runtime cannot be used here.
    """
    engine = get(runtime)
    generator = torch.Generator().manual_seed(0)
    calls: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for width in (WIDTH, *(WIDTH - step for step in STEPS)):
            program = capture(_chain(width, generator), torch.zeros(2, width, _SIDE, _SIDE))
            path = engine.write(program, Path(folder) / f"probe{width}{engine.suffix}")
            runner = engine.load(path, threads=threads, shapes=fixed_shapes(program, 1))
            batch = [np.zeros((1, width, _SIDE, _SIDE), dtype=np.float32)]
            calls[str(width)] = lambda runner=runner, batch=batch: runner.run(batch)
        found = compare(calls, plan=Plan(rounds=5, seconds=0.05), progress=progress)
    return {int(name): measurement.value for name, measurement in found.latency.items()}


@functools.cache
def block_for(runtime: str, threads: int | None) -> int:
    """The block that `runtime` likes on this machine; measured once in a process."""
    return preferred(measured(runtime, threads))


def _chain(width: int, generator: torch.Generator) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(_DEPTH):
        convolution = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():
            convolution.weight.normal_(0.0, (2 / (9 * width)) ** 0.5, generator=generator)
            convolution.bias.zero_() if convolution.bias is not None else None
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers).eval()
