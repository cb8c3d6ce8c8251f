"""Batches without end, each with its number, in an order that can be taken up again anywhere.

The order is fixed like this. Before every batch the global generators of torch, Python and NumPy
are set from (seed, number of the batch), inside a fork that is undone afterwards; so a
`DataLoader` shuffles, and an augmentation draws, the same at the same place. A loader that has
`set_epoch(n)` (or whose sampler has) is told the number of each pass; a `torch.Generator` in
`loader.generator` is seeded for each pass. What none of this reaches (an iterable that counts its
own passes) is repeatable because earlier passes are gone through again when a run is resumed.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.core.task import Loader

_ODD = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: consecutive numbers give unrelated seeds


def mixed(*numbers: int) -> int:
    """A 63-bit seed from several numbers (splitmix64's finisher).

    >>> mixed(0, 1) != mixed(1, 0)
    True
    """
    state = 0
    for number in numbers:
        state = (state + number + _ODD) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


@contextmanager
def forked(device: torch.device | None = None) -> Generator[None, None, None]:
    """Give back the global generators of torch, Python and NumPy as they were."""
    devices = [device] if device is not None and device.type == "cuda" else []
    held, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(held)
            np.random.set_state(legacy)  # noqa: NPY002


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Set the global generators; only inside `forked`.

    Not by `torch.manual_seed`: where CUDA is unused, that keeps a stack trace of every call.
    """
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def digest(batch: Any) -> str:
    """What tells a batch from others: its tensors, numbers and texts, however they nest.

    >>> digest((torch.zeros(2), "a")) == digest((torch.zeros(2), "b"))
    False
    """
    found = hashlib.sha256()
    _tell(batch, found.update)
    return found.hexdigest()


def _tell(value: Any, told: Callable[[bytes], None]) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        told(f"{plain.dtype}{list(plain.shape)}".encode())
        told(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        array = cast("np.ndarray[Any, Any]", value)
        told(f"{array.dtype}{list(array.shape)}".encode())
        told(b"" if array.dtype.hasobject else array.tobytes())
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[Any, Any]", value).items():
            told(f"{key}:".encode())
            _tell(item, told)
    elif isinstance(value, (list, tuple)):
        told(f"{len(cast('Sequence[Any]', value))}[".encode())
        for item in cast("Sequence[Any]", value):
            _tell(item, told)
    else:
        known = isinstance(value, (str, bytes, int, float)) or value is None
        told((repr(value) if known else type(value).__name__).encode())


def beginnings(loaders: Iterable[Loader | None]) -> list[str]:
    """What tells data from others: a digest of how each stream begins.

    "" for one that is not there, that cannot be looked at for nothing, or begins anew each time.
    """
    found: list[str] = []
    with forked():
        for loader in loaders:
            seen = [] if loader is None else [Feed(loader, 0, "data").beginning() for _ in range(2)]
            found.append(seen[0] if len(set(seen)) == 1 else "")
    return found


class Feed:
    """An endless stream over a re-iterable of batches; use it inside `forked`."""

    def __init__(self, loader: Loader, seed: int, where: str = "training data") -> None:
        self._loader = loader
        self._seed = seed
        self._where = where
        self._ahead: deque[Any] = deque()
        self._number = 0  # of the next batch read from the loader
        self._epoch = 0
        self._in_epoch = 0
        self._size: int | None = len(loader) if isinstance(loader, Sized) else None
        self._running: Iterator[Any] | None = None
        if self._size == 0:
            raise self._empty()

    @property
    def period(self) -> int | None:
        """After how many batches the same ones come again; None where they need not.

        That is the length of a plain list or tuple; another loader may have a number `period`, as
        one that goes through a few fixed augmentations in turn.
        """
        if isinstance(self._loader, (list, tuple)):
            return len(self._loader)
        told = getattr(self._loader, "period", None)
        return told if isinstance(told, int) and told > 0 else None

    def known_length(self) -> int | None:
        """Batches of one pass, if the loader knows it."""
        return self._size

    def batches_per_epoch(self) -> int:
        """Its length; a loader that does not know it is gone through once.

        Raises:
            DataError: there are no batches.
        """
        if self._size is None:
            seed_all(mixed(self._seed, 0))
            self._size = sum(1 for _ in self._loader)
            if self._size == 0:
                raise self._empty()
        return self._size

    def beginning(self) -> str:
        """A digest of the stream's first batch; "" where looking would count as a pass."""
        return digest(Feed(self._loader, self._seed, self._where).take()) if self._direct() else ""

    def look_ahead(self, count: int) -> list[Any]:
        """The next `count` batches, which `take` will give again."""
        while len(self._ahead) < count:
            self._ahead.append(self._read())
        return [self._ahead[i] for i in range(count)]

    def take(self) -> Any:
        """The next batch.

        Raises:
            DataError: the loader gives nothing.
        """
        return self._ahead.popleft() if self._ahead else self._read()

    def skip(self, count: int) -> None:
        """Go on to batch number `count` of the stream; only at its beginning.

        Raises:
            DataError: the loader gives nothing.
        """
        if self._direct():
            size = self.batches_per_epoch()
            self._epoch, self._in_epoch = divmod(count, size)
            self._number = count - self._in_epoch
            count, self._in_epoch = self._in_epoch, 0
        for _ in range(count):
            self._read()

    def _direct(self) -> bool:
        """Whether a pass can be started without the ones before it."""
        known = (list, tuple, torch.utils.data.DataLoader)
        return isinstance(self._loader, known) or self._takes_epoch(self._loader)

    @staticmethod
    def _takes_epoch(loader: Any) -> bool:
        return callable(getattr(loader, "set_epoch", None))

    def _begin(self) -> Iterator[Any]:
        for part in self._parts():
            if self._takes_epoch(part):
                part.set_epoch(self._epoch)
            own = getattr(part, "generator", None)
            if isinstance(own, torch.Generator):
                own.manual_seed(mixed(self._seed, self._epoch, 1))
        return iter(self._loader)

    def _parts(self) -> list[Any]:
        """The loader and, of a DataLoader, what decides on its order."""
        parts = [self._loader]
        for name in ("sampler", "batch_sampler"):
            part = getattr(self._loader, name, None)
            parts += [part, getattr(part, "sampler", None)] if part is not None else []
        return [part for part in parts if part is not None]

    def _read(self) -> Any:
        seed_all(mixed(self._seed, self._number))
        for _ in range(2):
            if self._running is None:
                self._running = self._begin()
                self._in_epoch = 0
            try:
                batch = next(self._running)
            except StopIteration:
                if self._in_epoch == 0:
                    raise self._empty() from None
                self._size = self._in_epoch
                self._running = None
                self._epoch += 1
                continue
            self._in_epoch += 1
            self._number += 1
            return batch
        raise self._empty()

    def _empty(self) -> DataError:
        return DataError(
            "the loader gives no batches",
            where=self._where,
            hint="a loader has to give batches every time it is gone through, so give a list or a "
            "DataLoader, not a generator",
        )
