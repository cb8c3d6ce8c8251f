"""What all verbs share: the application, its options, and errors as one clear message."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec, TypeVar

import typer

import laconic
from laconic.core.errors import LaconicError
from laconic.core.suggest import nearest

P = ParamSpec("P")
R = TypeVar("R")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of the runtime; all cores if not given.")
]
Batch = Annotated[int, typer.Option(min=1, help="Batch size of the latency that counts.")]
Engine = Annotated[str, typer.Option("--runtime", help="auto, openvino, onnxruntime or inductor.")]
Member = Annotated[
    str | None, typer.Option("--model", help="Which one, of a file that holds several models.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that is written.")]

app = typer.Typer(
    name="laconic",
    help="Make trained PyTorch models smaller and faster: measured, verified, ready to deploy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"laconic {laconic.__version__}")
        raise typer.Exit


@app.callback()
def _every(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    del version


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Errors become one message and a non-zero exit status; `--debug` lets them through."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as error:
            fail("\n  ".join(["stopped", *getattr(error, "__notes__", [])]), code=130)
        except LaconicError as error:
            if kwargs.get("debug"):
                raise
            fail(str(error))
        except Exception as error:
            if kwargs.get("debug"):
                raise
            text = (str(error).strip().splitlines() or ["no message"])[0]
            fail(f"{type(error).__name__}: {text} (unexpected: --debug shows where)")

    return guarded


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one message on standard error and leave."""
    typer.secho(f"error: {message}", err=True, fg="red" if sys.stderr.isatty() else None)
    raise typer.Exit(code)


def choice(value: str, known: tuple[str, ...], option: str) -> str:
    """A value out of a few.

    Raises:
        BadParameter: another one; the nearest is named.
    """
    if value not in known:
        raise typer.BadParameter(f"{value!r}; {nearest(value, known)}", param_hint=option)
    return value


def runtime_name(name: str, *, auto: bool = True) -> str:
    """A runtime's name, checked.

    Raises:
        BadParameter: there is none of that name; the nearest is named.
    """
    from laconic.core.registry import names

    known = [*(["auto"] if auto else []), *(n for n in names("laconic.runtimes") if n != "base")]
    if name not in known:
        raise typer.BadParameter(f"no runtime named {name!r}; {nearest(name, known)}")
    return name
