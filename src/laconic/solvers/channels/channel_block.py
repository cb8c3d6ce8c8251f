"""Which multiple of channels a runtime likes on this machine, found out by measuring it.

Kernels work on blocks of channels; a network cut to 63 channels may take as long as one with 64.
The probe times a small chain of convolutions at 64 channels and at 64 less 1, 2, 4, 8, 16 in the
runtime that counts, interleaved. The block is the smallest step down that gains at least half of
the work it takes away (the ends of the chain keep their width). Where none does, width does not
decide the speed and the block is 1.
"""

import functools
from collections.abc import Mapping

import torch
from torch import nn

from laconic.core.progress import SILENT, Progress
from laconic.program.capture import capture
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.program.surgery import cut
from laconic.solvers.search.stopwatch import Stopwatch

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
    whole = capture(_chain(), torch.zeros(2, WIDTH, _SIDE, _SIDE))
    inner = groups(whole)
    cuts: dict[str, Program] = {}
    for width in (WIDTH, *(WIDTH - step for step in STEPS)):
        keep = {group.name: list(range(width)) for group in inner}
        cuts[str(width)] = cut(whole, keep, inner)[0]
    found = Stopwatch(runtime, threads, progress)(cuts)
    return {int(name): milliseconds for name, milliseconds in found.items()}


@functools.cache
def block_for(runtime: str, threads: int | None) -> int:
    """The block that `runtime` likes on this machine; measured once in a process."""
    return preferred(measured(runtime, threads))


def _chain() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(_DEPTH):
        convolution = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        with torch.no_grad():
            convolution.weight.normal_(0.0, (2 / (9 * WIDTH)) ** 0.5, generator=generator)
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers).eval()
