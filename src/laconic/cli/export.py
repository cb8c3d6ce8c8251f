"""`laconic export`: a `.laconic` file (or a task file's model) for a runtime."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laconic.cli._app import Debug, Member, Threads, verb
from laconic.core.errors import ExportError
from laconic.core.suggest import nearest

if TYPE_CHECKING:
    from laconic.program.program import Program
    from laconic.runtimes.base import Runner

_KINDS = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "inductor"}


@verb
def export(
    file: Annotated[Path, typer.Argument(help="A .laconic file, or a task file.")],
    to: Annotated[str, typer.Option("--to", help="onnx, openvino, pt2 or safetensors.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; beside FILE if not given.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or int8; int8 where FILE is quantised.")
    ] = None,
    branches: Annotated[
        bool,
        typer.Option(
            "--branches", help="One file that branches where inputs decide: the batch as a whole."
        ),
    ] = False,
    model: Member = None,
    threads: Threads = None,
    config: Annotated[
        Path | None, typer.Option(help="safetensors: the original model's config.json.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a model for a runtime and check it, output by output, against the Program.

    safetensors: a folder with the packed weights of a language model and its config.json, as
    transformers and vLLM read them (compressed-tensors).
    """
    del debug
    if to not in (*_KINDS, "safetensors"):
        raise typer.BadParameter(
            f"{to!r} is no kind of file; {nearest(to, [*_KINDS, 'safetensors'])}",
            param_hint="--to",
        )
    from laconic import runtimes
    from laconic.cli._load import member_of, program_of
    from laconic.engine.deploy import write_inductor
    from laconic.engine.files import pick_precision, write_chain
    from laconic.runtimes._chain import files as chain_files
    from laconic.runtimes._chain import load as load_chain

    program = member_of(program_of(file), model)
    if to == "safetensors":
        _write_weights(program, out or file.with_suffix(""), config)
        return
    engine = runtimes.get(_KINDS[to])
    kind = pick_precision(program, engine, precision)
    path = out or file.with_suffix(engine.suffix)
    if branches and engine.name == "inductor":
        raise typer.BadParameter("only onnx and openvino files branch", param_hint="--branches")
    options = {"branches": True} if branches else {}
    if engine.name == "inductor":
        path = write_inductor(program, path, kind, threads, None)
    else:
        path = engine.write(program, path, kind, **options)
    _check(program, path, engine.files(path), engine.load(path, kind, threads), kind)
    chain = None if branches else write_chain(program, path, engine, kind, threads)
    if chain is not None:
        _check(program, chain, chain_files(chain), load_chain(chain, engine, threads), kind)


def _check(program: "Program", path: Path, files: list[Path], runner: "Runner", kind: str) -> None:
    """Tell what was written and compare it with the Program."""
    from laconic.engine.deploy import noise
    from laconic.measuring.parity import parity

    for each in files:
        typer.echo(f"wrote {each} ({each.stat().st_size:,} bytes)")
    report = parity(program, runner.run, [noise(program, program.batch_size())], precision=kind)
    worst = max(report.outputs, key=lambda output: output.relative)
    typer.echo(
        f"{runner.conditions['runtime']} {kind} against the Program on noise: "
        f"largest relative error {worst.relative:.2g}, least cosine {worst.cosine_min:.6f}"
    )
    if not report.ok:
        raise ExportError("; ".join(report.failures), where=str(path))


def _write_weights(program: "Program", folder: Path, config: Path | None) -> None:
    """Weights and configuration for transformers and vLLM."""
    import json

    from laconic.runtimes._safetensors import write_safetensors

    try:
        held = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
    except (OSError, ValueError) as error:
        raise ExportError(f"not a configuration: {error}", where=str(config)) from error
    for path in write_safetensors(program, folder, held):
        typer.echo(f"wrote {path} ({path.stat().st_size:,} bytes)")
    if config is None:
        typer.echo("config.json holds the quantisation only: give the original's with --config")
