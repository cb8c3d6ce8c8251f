"""Work in portions: what would not fit into memory at once is done one after the other.

Second moments of a layer take the square of its columns, those of all layers together many times
the network. Layers are taken in portions instead, each with its own pass over the data.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
MOMENTS = 2**30
"""Bytes that the second moments of one portion may take together."""


def portions(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Runs of items that take at most `most` together; a larger one is a portion of its own.

    >>> list(portions([3, 3, 9, 1], lambda size: size, 6))
    [[3, 3], [9], [1]]
    """
    held: list[Item] = []
    taken = 0
    for item in items:
        needed = size(item)
        if held and taken + needed > most:
            yield held
            held, taken = [], 0
        held.append(item)
        taken += needed
    if held:
        yield held
