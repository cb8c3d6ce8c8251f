"""The nearest right name for a wrong one."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known words, or lists them all.

    >>> nearest("prune.chanels", ["prune.channels", "quantize.static"])
    "did you mean 'prune.channels'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "known: " + ", ".join(names)
