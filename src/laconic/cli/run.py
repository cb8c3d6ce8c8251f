"""`laconic run`: predictions from any artifact."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from laconic.cli._app import Debug, Member, Threads, verb


@verb
def run(
    file: Annotated[Path, typer.Argument(help="A .laconic, .onnx, .xml or .pt2 file.")],
    inputs: Annotated[Path, typer.Argument(metavar="INPUT.npz", help="One array per input.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where predictions go: .npz or .json.")
    ] = Path("predictions.npz"),
    runtime: Annotated[
        str | None, typer.Option(help="openvino or onnxruntime, for .onnx files.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or int8.")] = "fp32",
    model: Member = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Run a file on the arrays of an .npz and keep what comes out."""
    del debug
    from laconic.cli._load import member_of
    from laconic.engine.artifact import arrange, of_program, open_artifact
    from laconic.engine.files import as_precision

    artifact = open_artifact(
        file, runtime=runtime, precision=as_precision(precision), threads=threads
    )
    if model is not None:
        if artifact.program is None:
            raise typer.BadParameter(
                f"{file} holds one model; only a .laconic file can hold several",
                param_hint="--model",
            )
        artifact = of_program(member_of(artifact.program, model), file)
    given = arrange(read_arrays(inputs), artifact)
    outputs = artifact.run(given)
    named = artifact.outputs or tuple(
        "output" if len(outputs) == 1 else f"output_{i}" for i in range(len(outputs))
    )
    _write(dict(zip(named, outputs, strict=True)), out)
    shapes = ", ".join(f"{n} {list(o.shape)}" for n, o in zip(named, outputs, strict=True))
    typer.echo(f"wrote {out}: {shapes}")


def read_arrays(path: Path) -> dict[str, Any]:
    """The named arrays of an .npz file.

    Raises:
        DataError: it cannot be read.
    """
    import numpy as np

    from laconic.core.errors import DataError

    try:
        with np.load(path, allow_pickle=False) as held:
            if not hasattr(held, "items"):
                raise DataError("is a single array, expected an .npz", where=str(path))
            return dict(held.items())
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(
            f"cannot be read: {reason}",
            where=str(path),
            hint="numpy.savez(path, name=array) writes such a file",
        ) from error


def _write(outputs: dict[str, Any], path: Path) -> None:
    import numpy as np

    from laconic.engine.files import staged

    if path.suffix not in (".npz", ".json"):
        raise typer.BadParameter("predictions are written as .npz or .json", param_hint="--out")
    with staged(path.parent) as stage:
        if path.suffix == ".json":
            text = json.dumps({name: value.tolist() for name, value in outputs.items()})
            (stage / path.name).write_text(text, encoding="utf-8")
        else:
            np.savez(stage / path.name, **outputs)
