"""Ctrl-C waits for the end of a step, so that what is kept is whole."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupt:
    """Whether somebody asked to stop."""

    asked: bool = False


@contextmanager
def deferred() -> Generator[Interrupt, None, None]:
    """Note the first Ctrl-C instead of raising it; the second one raises at once.

    Outside the main thread signals cannot be caught; there nothing changes.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    before = signal.signal(signal.SIGINT, note) or signal.SIG_DFL
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
