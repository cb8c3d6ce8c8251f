"""`laconic methods`: what there is, one line each; with a name, its card and options."""

import ast
import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from laconic.cli._app import Debug, verb


@verb
def methods(
    name: Annotated[str | None, typer.Argument(help="A method's name, for its card.")] = None,
    debug: Debug = False,
) -> None:
    """List the methods, or show the card and the options of one."""
    del debug
    console = Console()
    if name is None:
        _list(console)
    else:
        _card(console, name)


def _list(console: Console) -> None:
    from laconic.core.registry import names

    table = Table(box=None, pad_edge=False, show_header=False)
    for method in names("laconic.methods"):
        table.add_row(f"[bold]{method}[/]", escape(_docstring(method).splitlines()[0]))
    console.print(table)
    console.print("\n[dim]laconic methods NAME shows a method's card and options[/]")


def _card(console: Console, name: str) -> None:
    from laconic.methods.base import method_class

    made = method_class(name)
    console.print(f"[bold]{name}[/]\n")
    for paragraph in _docstring(name).split("\n\n"):
        console.print(" ".join(paragraph.split()) + "\n", markup=False, highlight=False)
    told: dict[str, str] = {}
    for base in reversed(made.__mro__):  # options may be inherited, described where they stand
        if issubclass(base, BaseModel):
            told |= _described(base.__doc__ or "")
    table = Table(title="options", title_justify="left", box=None, pad_edge=False)
    for column in ("option", "default", "kind", "what it does"):
        table.add_column(column, header_style="bold", overflow="fold")
    for key, field in made.model_fields.items():
        kind = getattr(field.annotation, "__name__", None) or str(field.annotation)
        kind = str(field.annotation) if "[" in str(field.annotation) else kind
        default = "required" if field.is_required() else str(field.default)
        shown = kind.replace("typing.", "").replace("NoneType", "None")
        table.add_row(key, escape(default), escape(shown), escape(told.get(key, "")))
    console.print(table)


def _docstring(name: str) -> str:
    """A method's card, read from its file without running it."""
    folder = importlib.util.find_spec("laconic.methods")
    if folder is None or not folder.submodule_search_locations:
        return ""
    path = Path(folder.submodule_search_locations[0], *name.split(".")).with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "no card"


def _described(docstring: str) -> dict[str, str]:
    """Attribute → description, from a Google-style docstring."""
    found: dict[str, str] = {}
    current = ""
    for line in docstring.partition("Attributes:")[2].splitlines():
        key, colon, rest = line.strip().partition(": ")
        if colon and key.isidentifier():
            current = key
            found[current] = rest
        elif current and line.strip():
            found[current] += " " + line.strip()
    return found
