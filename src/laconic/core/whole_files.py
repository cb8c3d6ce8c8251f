"""Files that are written whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """A path beside `path` to write to; what is there takes the place of `path` in one stroke.

    That happens when the block ends well, once it is on disk. Until then, and after any error,
    what stood at `path` stays, and nothing is left beside it.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
