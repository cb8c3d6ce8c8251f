"""The frame of a small page: one file, no script."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#8a94a6", "#0f8b8d", "#c8553d", "#b58a1b", "#5b5ea6", "#3c7a3c")


def page(title: str, verdict: str, parts: Mapping[str, str], remarks: Sequence[str]) -> str:
    """A page of sections, heading → HTML, and how it was measured."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    sections = "".join(
        f"<section><h2>{escaped(heading)}</h2>{body}</section>" for heading, body in parts.items()
    )
    said = "".join(f"<li>{escaped(line)}</li>" for line in remarks)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escaped(title)}</title>'
        f"<style>{style}</style></head><body><main><h1>{escaped(title)}</h1>"
        f'<p class="verdict">{escaped(verdict)}</p>{sections}'
        f"<section><h2>How it was measured</h2><ul>{said}</ul></section>"
        "</main></body></html>\n"
    )


def escaped(value: object) -> str:
    """Text for HTML."""
    return html.escape(str(value))
