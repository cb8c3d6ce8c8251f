"""What all tests share: the data folder, seeded randomness, a quiet environment."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from laconic.core.measurement import Measurement
from laconic.engine import deploy
from laconic.measuring import latency, memory

# Set before any package that would read them is imported: nothing here may use the network.
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(name, "1")

settings.register_profile("same", derandomize=True)  # a run in CI says the same every time
if os.environ.get("CI"):
    settings.load_profile("same")

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # the benchmarks are a folder of the repository, not of the package
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets; the test is skipped, with the reason, without it."""
    folder = Path(os.environ.get("LACONIC_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: set LACONIC_DATA to their folder")
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    """Torch randomness, the same in every run."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy randomness, the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from one seed and leaves torch's thread count as it found it.

    The library takes generators as arguments; modules that tests build draw their initial weights
    from the global one, which is why it is seeded here.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Within it no file of this process may grow beyond so many bytes: as on a full disk."""

    @contextmanager
    def full(most: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


_PEAKS: dict[str, Measurement] = {}


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies of jobs are taken, but briefly: their values mean nothing.

    Memory is taken once for each runtime: the process that is measured needs seconds to start.
    """
    brief = latency.Plan(rounds=2, seconds=0.0, calls=2, rest=0.0, repeats=0)
    monkeypatch.setattr(deploy, "BRIEF", brief)
    monkeypatch.setattr(latency, "USUAL", brief)
    peak = memory.peak

    def once(
        function: str, arguments: dict[str, Any], *, conditions: dict[str, Any]
    ) -> Measurement:
        runtime = arguments["runtime"]
        if runtime not in _PEAKS:
            _PEAKS[runtime] = peak(function, arguments, conditions=conditions)
        return replace(_PEAKS[runtime], conditions={**_PEAKS[runtime].conditions, **conditions})

    monkeypatch.setattr(memory, "peak", once)
