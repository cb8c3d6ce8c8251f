"""`laconic export`: a `.laconic` file (or a task file's model) for a runtime."""

from pathlib import Path
from typing import Annotated

import typer

from laconic.cli._app import Debug, Member, Threads, verb
from laconic.core.errors import ExportError
from laconic.core.suggest import nearest

_KINDS = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "inductor"}


@verb
def export(
    file: Annotated[Path, typer.Argument(help="A .laconic file, or a task file.")],
    to: Annotated[str, typer.Option("--to", help="onnx, openvino or pt2.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; beside FILE if not given.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or int8; int8 where FILE is quantised.")
    ] = None,
    model: Member = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Write a model for a runtime and check it, output by output, against the Program."""
    del debug
    if to not in _KINDS:
        raise typer.BadParameter(
            f"{to!r} is no kind of file; {nearest(to, _KINDS)}", param_hint="--to"
        )
    from laconic import runtimes
    from laconic.cli._load import member_of, program_of
    from laconic.engine.deploy import noise, write_inductor
    from laconic.engine.files import pick_precision
    from laconic.measuring.parity import parity

    program = member_of(program_of(file), model)
    engine = runtimes.get(_KINDS[to])
    kind = pick_precision(program, engine, precision)
    path = out or file.with_suffix(engine.suffix)
    if engine.name == "inductor":
        path = write_inductor(program, path, kind, threads, None)
    else:
        path = engine.write(program, path, kind)
    for each in engine.files(path):
        typer.echo(f"wrote {each} ({each.stat().st_size:,} bytes)")
    runner = engine.load(path, kind, threads)
    report = parity(program, runner.run, [noise(program, program.batch_size())], precision=kind)
    worst = max(report.outputs, key=lambda output: output.relative)
    typer.echo(
        f"{engine.name} {kind} against the Program on noise: largest relative error "
        f"{worst.relative:.2g}, least cosine {worst.cosine_min:.6f}"
    )
    if not report.ok:
        raise ExportError("; ".join(report.failures), where=str(path))
