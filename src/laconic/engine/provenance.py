"""Where a result comes from: versions, machine, threads, seed, hashes. No names, no folders."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.core.task import Task

_PACKAGES = ("laconic", "torch", "openvino", "onnxruntime", "onnx", "numpy", "constriction")


def provenance(*, seed: int, device: torch.device, threads: int | None) -> dict[str, Any]:
    """Versions, the machine and the settings of a run, flat."""
    return {
        **versions(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "torch threads": torch.get_num_threads(),
        "runtime threads": threads or "all cores",
        "device": str(device),
        "seed": seed,
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that numbers depend on."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def data_hashes(task: Task) -> dict[str, str]:
    """A hash of the first batch of every split: cheap, and enough to see that data changed."""
    found: dict[str, str] = {}
    for name in ("calibration", "validation", "test"):
        loader = getattr(task, name)
        if loader is not None:
            for batch in loader:
                found[f"{name} data, first batch"] = _hash(batch)
                break
    return found


def _hash(value: Any) -> str:
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(str((value.dtype, tuple(value.shape))).encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(str(key).encode())
            _feed(digest, item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(value).encode())


def _processor() -> str:
    """The processor's own name where the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or "unknown"
