"""Finished pieces of work by key, so that a stopped run goes on where it was.

A key is a hash of everything the piece depends on. Candidates that begin alike share their first
steps, and a run that is started again finds what the earlier one finished.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from laconic import storage
from laconic.core.errors import LaconicError, StorageError
from laconic.core.whole_files import whole_file
from laconic.program.program import Program


def key_of(*parts: Any) -> str:
    """A short hash of plain data.

    >>> key_of("a", {"x": 1}) == key_of("a", {"x": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def digests(paths: Iterable[str]) -> dict[str, str]:
    """Path → SHA-256 of the file, or "" where it cannot be read; whoever needs it says so."""
    found: dict[str, str] = {}
    for path in paths:
        try:
            with Path(path).open("rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            found[path] = ""
    return found


def fingerprint(program: Program) -> str:
    """A hash of a program's graph and tensors."""
    digest = hashlib.sha256(program.graph.python_code("self").src.encode())
    for name, tensor in program.tensors():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]


class Store:
    """Programs and plain data by key: in a folder, or in memory when there is none."""

    def __init__(self, folder: Path | None = None, about: str = "") -> None:
        """`about`: of what all pieces depend on; those of another are not found."""
        self.folder, self._about = folder, about
        self._held: dict[str, Any] = {}
        if folder is not None:
            _make(folder)

    def _path(self, key: str, ending: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key_of(self._about, key) if self._about else key}.{ending}"

    def get(self, key: str) -> dict[str, Any] | None:
        """Plain data kept under `key`; None where there is none or the file was cut short."""
        if self.folder is None:
            return self._held.get(key)
        try:
            return json.loads(self._path(key, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, key: str, data: Mapping[str, Any]) -> None:
        """Keep plain data.

        Raises:
            StorageError: it cannot be written.
        """
        if self.folder is None:
            self._held[key] = dict(data)
        else:
            write_text(self._path(key, "json"), json.dumps(data))

    def program(self, key: str, like: Program) -> Program | None:
        """The program kept under `key`; example inputs and record classes are those of `like`."""
        if self.folder is None:
            return self._held.get(f"{key}.program")
        path = self._path(key, "laconic")
        if not path.exists():
            return None
        try:
            found = storage.load(path)
        except LaconicError:  # cut short by whatever stopped the earlier run: made again
            return None
        found.signature = replace(found.signature, classes=like.signature.classes)
        found.example = like.example
        found.propagate()
        return found

    def put_program(self, key: str, program: Program) -> None:
        """Keep a program, exactly as it is.

        Raises:
            StorageError: it cannot be written.
        """
        if self.folder is None:
            self._held[f"{key}.program"] = program
        else:
            storage.save(program, self._path(key, "laconic"))

    def workdir(self, key: str) -> Path | None:
        """A folder for the state of the step `key`; None in memory."""
        if self.folder is None:
            return None
        path = self._path(key, "state")
        _make(path)
        return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        StorageError: it cannot be written; what was there before stays.
    """
    try:
        with whole_file(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            hint="free some space or choose another folder; an earlier file is still whole",
        ) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot be made: {error.strerror}", where=str(folder), hint="choose another --out"
        ) from error
