"""Bytes of the files that ship."""

from collections.abc import Iterable
from pathlib import Path

from laconic.core.errors import DataError
from laconic.core.measurement import Measurement


def of(paths: Path | Iterable[Path]) -> Measurement:
    """Total size of files, and of everything below folders, in bytes.

    Raises:
        DataError: one of them is not there.
    """
    given = [paths] if isinstance(paths, Path) else list(paths)
    files: list[Path] = []
    for path in given:
        if not path.exists():
            raise DataError("no such file", where=str(path))
        files += [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    return Measurement(
        name="size",
        value=float(sum(file.stat().st_size for file in files)),
        unit="B",
        conditions={"files": [file.name for file in files]},
    )
