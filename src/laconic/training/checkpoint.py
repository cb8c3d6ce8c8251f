"""The state of a training run on disk: one safetensors file, replaced only by a complete one."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laconic.core.errors import StorageError
from laconic.core.whole_files import whole_file
from laconic.program.program import Program

FILE = "training.safetensors"
_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on.

    Attributes:
        identity: what run this is; another one does not take it up.
        tensors: `<part>/<name>` → tensor; the parts are the loop's.
        state: numbers and lists, JSON.
    """

    identity: str
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, without its prefix."""
        start = f"{name}/"
        return {k.removeprefix(start): t for k, t in self.tensors.items() if k.startswith(start)}

    def save(self, folder: Path) -> None:
        """Write to `folder`; what was there stays whole until the new file is on disk.

        Raises:
            OSError: it cannot be written, for example because the disk is full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        about = {"version": _VERSION, "identity": self.identity, "state": dict(self.state)}
        held = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        try:
            for left in folder.glob(f".{FILE}.*.part"):  # of a process that was killed
                left.unlink(missing_ok=True)
            with whole_file(folder / FILE) as unfinished:
                save_file(held, unfinished, metadata={"laconic": json.dumps(about)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def identity_of(told: Any, programs: Iterable[Program]) -> str:
    """What tells a run from others: its options, and the graphs and values of its Programs.

    Args:
        told: JSON.
        programs: that the run begins with and learns from.
    """
    digest = hashlib.sha256(json.dumps(told).encode())
    for program in programs:
        digest.update(program.graph.python_code("self").src.encode())
        for name, tensor in program.tensors():
            digest.update(name.encode())
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def read(folder: Path, identity: str) -> Checkpoint | None:
    """The state in `folder`; None where there is none, or it belongs to another run.

    Raises:
        StorageError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["laconic"])
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise StorageError(
            f"is damaged: {error}", where=str(path), hint="delete it to start training afresh"
        ) from error
    if about.get("version") != _VERSION or about.get("identity") != identity:
        return None
    return Checkpoint(identity, tensors, about["state"])


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """The optimizer's tensors as `<parameter>//<key>`."""
    found: dict[str, Tensor] = {}
    for parameter, held in optimizer.state.items():
        for key, value in held.items():
            if isinstance(value, Tensor):
                found[f"{names[parameter]}//{key}"] = value
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; the tensors take their parameters' layout and device."""
    by_name = {name: parameter for parameter, name in names.items()}
    for full, tensor in tensors.items():
        name, key = full.split("//")
        parameter = by_name[name]
        if tensor.shape == parameter.shape:
            held = torch.empty_like(parameter)
            held.detach().copy_(tensor)
            tensor = held.detach()
        optimizer.state[parameter][key] = tensor
