"""How long work shows that it is going on.

Library code takes a `Progress` and knows nothing about terminals; the command line passes one that
draws bars. The default is silent.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Bar(Protocol):
    """One piece of work under way."""

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Move on by `steps`; `note` replaces the text behind the bar."""
        ...


class Progress:
    """Silent progress; a front end subclasses it and draws."""

    @contextmanager
    def task(self, what: str, total: float | None = None) -> Generator[Bar]:
        """Open a bar for the length of a `with` block."""
        del what, total
        yield _Silent()

    def say(self, text: str) -> None:
        """One line worth telling a person."""
        del text

    def track(self, items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
        """Pass items on, moving a bar along."""
        with self.task(what, total) as bar:
            for item in items:
                yield item
                bar.advance()


class _Silent:
    def advance(self, steps: float = 1, note: str = "") -> None:
        del steps, note


SILENT = Progress()


def clock(seconds: float) -> str:
    """Time for people.

    >>> clock(95), clock(12)
    ('1:35', '0:12')
    """
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"
