"""The files of a result, written all or none."""

import contextlib
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path

from laconic import runtimes, storage
from laconic.core.errors import ExportError, RecipeError, StorageError
from laconic.core.suggest import nearest
from laconic.program.chain import split
from laconic.program.choices import choices
from laconic.program.freezing import freeze
from laconic.program.program import Program
from laconic.runtimes import _chain
from laconic.runtimes.base import PRECISIONS, Precision, Runtime, quantized

NAME = "model"


@contextlib.contextmanager
def staged(folder: Path) -> Generator[Path]:
    """A folder beside the final files; what is in it moves to `folder` when the block ends well.

    Files are moved one by one, each in one stroke; nothing is moved unless all were written.

    Raises:
        StorageError: the disk is full or not writable; the earlier files are untouched.
    """
    stage = folder / f".saving-{secrets.token_hex(4)}"
    try:
        stage.mkdir(parents=True)
        yield stage
        for path in sorted(stage.iterdir()):
            path.replace(folder / path.name)
    except (OSError, StorageError) as error:
        place = error.where if isinstance(error, StorageError) and error.where else str(folder)
        told = error.strerror if isinstance(error, OSError) else error.message
        raise StorageError(
            f"{told or error}; what was saved in {folder} earlier is untouched",
            where=place.replace(f"{stage.name}/", ""),
            hint="free some space or choose another folder",
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def precisions(program: Program, engine: Runtime) -> list[Precision]:
    """What a Program can be run at: integers where it is quantised, otherwise every float kind."""
    integers = quantized(program) and "int8" in engine.precisions
    wanted: tuple[Precision, ...] = ("int8",) if integers else ("fp32", "bf16")
    return [kind for kind in wanted if not engine.check(program, kind)]


def as_precision(name: str) -> Precision:
    """A precision's name, checked.

    Raises:
        RecipeError: there is none of that name; the nearest is named.
    """
    for known in PRECISIONS:
        if name == known:
            return known
    raise RecipeError(f"no precision named {name!r}", hint=nearest(name, PRECISIONS))


def pick_precision(program: Program, engine: Runtime, name: str | None) -> Precision:
    """The precision asked for, or the first one the runtime has for this Program.

    Raises:
        ExportError: the runtime cannot do it; every obstacle is named.
    """
    if name is not None:
        return as_precision(name)
    able = precisions(program, engine)
    if not able:
        engine.demand(program, "fp32")
    return able[0] if able else "fp32"


def write_chain(
    program: Program, path: Path, engine: Runtime, kind: Precision, threads: int | None = None
) -> Path | None:
    """Write the chain of a Program that decides by input beside its static file at `path`.

    Returns:
        the `.chain` file; None where nothing is decided by input.

    Raises:
        ExportError: the runtime cannot express a piece.
    """
    if not choices(program):
        return None
    chain = split(program)
    if not chain.decides:
        return None
    options = {"threads": threads} if engine.name == "inductor" else {}
    return _chain.write(chain, engine, _chain.path_of(path, engine), kind, **options)


def write_models(program: Program, stage: Path, deploy: tuple[str, Precision] | None) -> list[str]:
    """Write `model.laconic`, `model.onnx`, an OpenVINO model, and the deployed runtime's file.

    Where inputs decide what is computed, the chain of pieces is written beside each.

    Returns:
        what could not be written and why, one sentence each.

    Raises:
        StorageError: the disk is full.
    """
    storage.save(freeze(program), stage / f"{NAME}.laconic")
    refused: list[str] = []
    chosen = deploy[0] if deploy else ""
    for name in dict.fromkeys(("onnxruntime", "openvino", chosen)):
        if not name:
            continue
        engine = runtimes.get(name)
        able: list[Precision] = (
            [deploy[1]] if deploy and name == chosen else precisions(program, engine)
        )
        kind = able[0] if able else "fp32"
        try:
            path = engine.write(program, stage / f"{NAME}{engine.suffix}", kind)
            write_chain(program, path, engine, kind)
        except ExportError as error:
            if shutil.disk_usage(stage).free < 1 << 16 or isinstance(error.__cause__, OSError):
                raise StorageError(error.message, where=error.where, hint=error.hint) from error
            refused.append(f"no {NAME}{engine.suffix}: {error}")
    return refused
