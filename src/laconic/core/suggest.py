"""The nearest right name for a wrong one."""

import difflib
from collections.abc import Iterable

_NEAR = 0.1  # a name that is that much less like the word than the best is no suggestion


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known words, or lists them all.

    >>> nearest("prune.chanels", ["prune.channels", "prune.nm", "quantize.static"])
    "did you mean 'prune.channels'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        likeness = [difflib.SequenceMatcher(a=word, b=name).ratio() for name in close]
        best = max(likeness)
        close = [n for n, r in zip(close, likeness, strict=True) if r >= best - _NEAR]
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "known: " + ", ".join(names)
