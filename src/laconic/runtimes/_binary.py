"""Layers of one-bit weights and one-bit activations, on a small kernel of ours.

No CPU runtime has kernels for signs (ONNX Runtime, OpenVINO and Inductor run a binary network as
floats), so this one comes as C source and is compiled at first use, into the user's cache folder.
It counts differing bits, with AVX-512 VPOPCNTDQ where the processor has it, plainly elsewhere.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from laconic.core.errors import ExportError, MissingExtra

_SOURCE = Path(__file__).with_name("_binary.c")
_FLAGS = ("-O3", "-shared", "-fPIC", "-std=gnu11", "-ffp-contract=off")


@dataclass(frozen=True)
class BinaryLayer:
    """A convolution (or, with a kernel of one place, a linear layer) of signs, ready to run.

    Attributes:
        weights: int64, packed bits.
        scale: float32 `[outputs]`: what a sum of signs is multiplied by.
        bias: float32 `[outputs]`, or None.
        threshold: float32 `[channels]`, or None: an input counts as +1 from there on (None: 0).
        channels, kernel, stride, padding: of the convolution; padding counts as zeros.
    """

    weights: Tensor
    scale: Tensor
    bias: Tensor | None
    threshold: Tensor | None
    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: int = 0

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        threshold: Tensor | None = None,
        stride: int = 1,
        padding: int = 0,
    ) -> "BinaryLayer":
        """Pack a layer.

        Args:
            codes: uint8 `[outputs, channels]` or `[outputs, channels, height, width]`; 1 is +1.
            scale: `[]` or `[outputs]`.
            bias: `[outputs]`.
            threshold: `[channels]`.
            stride: of both dimensions.
            padding: of all four sides.

        Raises:
            MissingExtra: there is no C compiler.
        """
        outputs, channels = codes.shape[:2]
        kernel = (codes.shape[2], codes.shape[3]) if codes.ndim == 4 else (1, 1)
        area, words = kernel[0] * kernel[1], (channels + 63) // 64
        packed = torch.zeros(area * words * ((outputs + 7) // 8 * 8), dtype=torch.int64)
        plain = codes.to("cpu", torch.uint8).contiguous()
        library().laconic_binary_pack_weights(_at(plain), _at(packed), outputs, channels, area)
        return cls(
            packed, scale.detach().float().cpu().expand(outputs).contiguous(), _floats(bias),
            _floats(threshold), channels, kernel, stride, padding,
        )  # fmt: skip

    def __call__(self, x: Tensor, threads: int = 1, *, vectors: bool | None = None) -> Tensor:
        """float32 `[batch, channels, height, width]` → `[batch, outputs, ...]`, channels last.

        A matrix `[batch, channels]` gives `[batch, outputs]`.

        Args:
            x: its signs count.
            threads: to use.
            vectors: whether to use vector instructions; None: where there are any.

        Raises:
            ExportError: inputs of another shape or dtype.
        """
        if x.dtype != torch.float32 or x.ndim not in (2, 4) or x.shape[1] != self.channels:
            raise ExportError(
                f"inputs {list(x.shape)} of {x.dtype}, expected float32 [batch, {self.channels}]"
                " or [batch, channels, height, width]",
                where="binary layer",
            )
        rows = x if x.ndim == 2 else x.permute(0, 2, 3, 1)
        rows = rows.contiguous()
        sizes = (len(x), 1, 1) if x.ndim == 2 else tuple(rows.shape[:3])
        out_sizes = [
            (size + 2 * self.padding - taps) // self.stride + 1
            for size, taps in zip(sizes[1:], self.kernel, strict=True)
        ]
        if min(out_sizes) < 1:
            raise ExportError(f"inputs {list(x.shape)} are smaller than the kernel {self.kernel}")
        use = has_vectors() if vectors is None else vectors
        words, outputs = (self.channels + 63) // 64, len(self.scale)
        bits = torch.empty(rows.numel() // self.channels, words, dtype=torch.int64)
        made = torch.empty(sizes[0], *out_sizes, outputs)
        held = library()
        held.laconic_binary_pack(
            _at(rows), _at(self.threshold), _at(bits), len(bits), self.channels, threads, use
        )
        shape = (ctypes.c_long * 12)(
            *sizes, words, self.channels, outputs, *self.kernel, self.stride, self.padding,
            *out_sizes,
        )  # fmt: skip
        held.laconic_binary_conv2d(
            _at(bits), _at(self.weights), _at(self.scale), _at(self.bias), _at(made), shape,
            threads, use,
        )  # fmt: skip
        return made.flatten(0, 2) if x.ndim == 2 else made.permute(0, 3, 1, 2)


def has_vectors() -> bool:
    """Whether this processor has the instructions that the fast form needs."""
    return bool(library().laconic_binary_vectors())


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel.

    Raises:
        MissingExtra: there is no C compiler, or it failed; says with what.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise MissingExtra(
            "binary layers need a C compiler", hint="install gcc or clang, or name one in CC"
        )
    path = _folder() / f"binary-{_key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    found = ctypes.CDLL(str(path))
    pointer, long, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    found.laconic_binary_pack.argtypes = [pointer, pointer, pointer, long, long, number, number]
    found.laconic_binary_pack.restype = None
    found.laconic_binary_pack_weights.argtypes = [pointer, pointer, long, long, long]
    found.laconic_binary_pack_weights.restype = None
    found.laconic_binary_conv2d.argtypes = [*[pointer] * 5, ctypes.POINTER(long), number, number]
    return found


def _compile(compiler: str, path: Path) -> None:
    """Compile beside and move: two processes may do so at once. Without OpenMP if need be."""
    handle, made = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    said = ""
    for parallel in (["-fopenmp"], []):
        command = [*compiler.split(), *_FLAGS, *parallel, str(_SOURCE), "-o", made]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            Path(made).replace(path)
            return
        said = done.stderr[-500:]
    Path(made).unlink()
    raise MissingExtra(f"{compiler} could not compile the kernel of binary layers: {said}")


def _key(compiler: str) -> str:
    told = "\0".join([_SOURCE.read_text(), compiler, sys.platform, *_FLAGS])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _folder() -> Path:
    """The user's cache folder for compiled kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "laconic" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", torch.float32).contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
