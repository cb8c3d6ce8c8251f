"""How much a file may ask for before it is refused."""

from dataclasses import dataclass

DEFLATE_EXPANSION = 1100
CODER_EXPANSION = 256
EXPANSION_SLACK = 4096


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds under which a `.laconic` file is opened; a file beyond one is refused, not tried.

    Attributes:
        header_bytes: the header, unpacked. Bytes.
        header_values: JSON values in the header.
        depth: how deep the header nests.
        nodes: graph nodes.
        tensors: stored tensors.
        decoded_bytes: all tensors together, decoded. Bytes.
        input_bytes: all example inputs together. Bytes.
    """

    header_bytes: int = 32 << 20
    header_values: int = 2_000_000
    depth: int = 64
    nodes: int = 200_000
    tensors: int = 200_000
    decoded_bytes: int = 16 << 30
    input_bytes: int = 256 << 20


def plausible(decoded: int, stored: int, expansion: int) -> bool:
    """Whether `stored` bytes may stand for `decoded` bytes: a rule of the format.

    Deflate reaches 1032:1 at most. The entropy coder could go far beyond, which only a
    decompression bomb needs, so the writer never uses it there and the reader refuses.
    """
    return decoded <= expansion * stored + EXPANSION_SLACK
