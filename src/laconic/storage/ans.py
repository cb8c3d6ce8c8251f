"""The entropy coder: `constriction`'s ANS coder, fed with integer tables.

Duda, "Asymmetric numeral systems" (arXiv 1311.2540); 32-bit words, 64-bit state, 24-bit
frequencies. `constriction` takes probabilities as floats: for n symbols it gives symbol i the
left border `trunc(c_i * (2^24 - n) / s) + i`, with c_i the sum of the entries before i and s the
sum of all. Entries `frequency - 1` add up to exactly 2^24 - n, every partial sum is exact in
float64, the factor is 1, and the borders are the integer ones: the conversion is the identity.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from laconic.core.errors import StorageError

Symbols = NDArray[np.int32]


class Channel(Protocol):
    """One side of a coder; the same model code runs on both sides."""

    def code(self, frequencies: NDArray[np.int64], symbols: Symbols) -> Symbols:
        """Code `len(symbols)` symbols with one table; a decoder ignores their values."""
        ...


def _stream() -> Any:
    import constriction

    module: Any = constriction
    return module.stream


def _model(frequencies: NDArray[np.int64]) -> Any:
    return _stream().model.Categorical((frequencies - 1).astype(np.float64), perfect=False)


class Encoder:
    """Collects symbols with their tables; `finish` gives the bytes."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.int64], Symbols]] = []

    def code(self, frequencies: NDArray[np.int64], symbols: Symbols) -> Symbols:
        """Append symbols, each in `0 .. len(frequencies) - 1`."""
        self._parts.append((frequencies, symbols))
        return symbols

    def finish(self) -> bytes:
        """The words, little-endian, without the last word's high zero bytes."""
        coder = _stream().stack.AnsCoder()
        for frequencies, symbols in reversed(self._parts):
            coder.encode_reverse(np.ascontiguousarray(symbols, np.int32), _model(frequencies))
        return np.asarray(coder.get_compressed(), "<u4").tobytes().rstrip(b"\0")


class Decoder:
    """Gives the symbols back in the order they were appended."""

    def __init__(self, data: bytes) -> None:
        """Start at the end of `data`.

        Raises:
            StorageError: `data` ends with a zero byte, which no encoder writes.
        """
        if data.endswith(b"\0"):
            raise StorageError("the coded symbols end with a zero byte")
        words = np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(np.uint32)
        self._coder: Any = _stream().stack.AnsCoder(words)

    def code(self, frequencies: NDArray[np.int64], symbols: Symbols) -> Symbols:
        """The next `len(symbols)` symbols."""
        return np.asarray(self._coder.decode(_model(frequencies), len(symbols)), np.int32)

    def finish(self) -> None:
        """Check that everything was used.

        Raises:
            StorageError: words are left over, so the data are not what was written.
        """
        if not self._coder.is_empty():
            raise StorageError("coded symbols are left over after the last one")
