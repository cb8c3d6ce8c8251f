"""Does an exported file give what the Program gives, output by output?

The bounds, by precision (see `bounds`):

* fp32: the largest error, relative to the largest magnitude of that output, is at most
  `float_tolerance(program)`: rounding errors of sums of K terms grow like u * sqrt(K) (Higham and
  Mary, SIAM J. Sci. Comput. 41, 2019; u = 2**-24), added up over all convolutions and matrix
  products, times 4, because runtimes sum in another order, fuse, and use Winograd's algorithm.
  The premise is a network that does not amplify errors, as normalised networks do not; where a
  Program fails on this count alone, its cosines tell whether it is wrong or ill-conditioned.
* bf16: cosine per sample at least 0.99, 0.999 in the mean, top-1 agreement at least 98 %.
* int8: cosine per sample at least 0.9, 0.99 in the mean, top-1 agreement at least 97 %. Runtimes
  fuse differently and compute the float rest in bf16; single steps flip and travel on.

Top-1 counts for outputs of shape [batch, classes]; a sample whose two best classes lie closer
than the error that the precision may make (`Bounds.tie`) counts as agreeing, since no bound could
tell them apart. At least one disagreement is always allowed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from laconic.core.errors import DataError
from laconic.core.task import Inputs
from laconic.program.program import DYNAMIC_QUANTIZE, FAKES, Program

Array = NDArray[Any]
Run = Callable[[Sequence[Array]], Sequence[Array]]
_SAFETY = 4
_ROUNDING = 2.0**-24
_SUMS = {  # operators that sum products
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm",
    "scaled_dot_product_attention",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What an export may differ by. None: not asked for.

    Attributes:
        relative: largest error over the output's largest magnitude.
        cosine_mean: least mean cosine per sample.
        cosine_min: least cosine of any sample.
        top1: least share of samples with the same best class.
        tie: two classes closer than this share of the largest magnitude are a tie.
    """

    relative: float | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    top1: float | None = None
    tie: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OutputParity:
    """How far one output is from the Program's.

    Attributes:
        name: the output's position and shape.
        max_abs: largest absolute error.
        relative: that over the largest magnitude of the Program's output.
        cosine_mean: mean over samples of the cosine to the Program's output.
        cosine_min: the least of them.
        top1: share of samples whose best class agrees; None if it is no class score.
        samples: how many were compared.
    """

    name: str
    max_abs: float
    relative: float
    cosine_mean: float
    cosine_min: float
    top1: float | None
    samples: int


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The check of one export; `failures` is empty if it holds.

    Attributes:
        outputs: one entry per output.
        bounds: what was asked for.
        failures: which bound was broken, by how much, in words.
        conditions: runtime, precision.
    """

    outputs: tuple[OutputParity, ...]
    bounds: Bounds
    failures: tuple[str, ...]
    conditions: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def ok(self) -> bool:
        """Whether every output is within the bounds."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain data for `result.json`."""
        return {**asdict(self), "conditions": dict(self.conditions), "ok": self.ok}


def parity(
    program: Program,
    run: Run,
    batches: Iterable[Inputs],
    *,
    precision: str = "fp32",
    limits: Bounds | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> ParityReport:
    """Compare a loaded export with its Program on batches of inputs.

    Args:
        program: what was exported; computed in eval mode on the CPU, in fp32.
        run: flat arrays in, flat arrays out (a Runner's `run`).
        batches: what the model is called with: tuples, or mappings for keyword inputs.
        precision: of the export; chooses the bounds.
        limits: other bounds than the precision's.
        conditions: what to state with the result.

    Raises:
        DataError: no batch, or outputs of another number or shape.
    """
    program = program.clone()
    accepted = limits or bounds(program, precision)
    found: list[_Comparison] = []
    for inputs in batches:
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
        flat = program.signature.flatten(args, kwargs)
        with torch.no_grad():
            wanted = program.run_flat(*flat)
        given = run([tensor.detach().cpu().numpy() for tensor in flat])
        if len(given) != len(wanted):
            raise DataError(f"found {len(given)} outputs, expected {len(wanted)}", where="parity")
        found = found or [_Comparison(number) for number in range(len(wanted))]
        for comparison, want, got in zip(found, wanted, given, strict=True):
            comparison.add(want, got, _rows(flat), accepted.tie)
    if not found:
        raise DataError("no batch to compare on", where="parity")
    outputs = tuple(comparison.result() for comparison in found)
    failures = tuple(text for output in outputs for text in _failures(output, accepted))
    return ParityReport(
        outputs=outputs, bounds=accepted, failures=failures, conditions=dict(conditions or {})
    )


def bounds(program: Program, precision: str) -> Bounds:
    """What an export of `program` in `precision` may differ by; see the module's docstring."""
    if precision == "fp32" and not _quantized(program):
        return Bounds(relative=float_tolerance(program))
    if precision == "bf16" and not _quantized(program):
        return Bounds(cosine_mean=0.999, cosine_min=0.99, top1=0.98, tie=0.02)
    return Bounds(cosine_mean=0.99, cosine_min=0.9, top1=0.97, tie=0.02)


def float_tolerance(program: Program) -> float:
    """Relative error that a correct fp32 export may show; see the module's docstring."""
    program.propagate()
    total = 1.0
    for node in program.graph.nodes:
        name = getattr(node.target, "__name__", "").split(".")[0]
        if node.op == "call_function" and name in _SUMS:
            total += _terms(name, node) ** 0.5
    return _SAFETY * _ROUNDING * total


def _terms(name: str, node: torch.fx.Node) -> float:
    """How many products one output element of `node` sums."""
    every: list[Any] = [source.meta["shape"] for source in node.all_input_nodes]
    shapes = [shape for shape in every if isinstance(shape, tuple)]
    if name == "scaled_dot_product_attention":
        return float(shapes[0][-1] + shapes[1][-2])
    if name in ("matmul", "mm", "bmm"):
        return float(shapes[0][-1])
    if name in ("addmm", "baddbmm"):
        return float(shapes[1][-1])
    weight = shapes[1]
    return float(np.prod(weight[1:] or weight))


def _quantized(program: Program) -> bool:
    """Whether activations are quantised; quantised weights alone are constants, and exact."""
    return any(
        node.target in (DYNAMIC_QUANTIZE, *FAKES) and node.all_input_nodes[0].op != "get_attr"
        for node in program.graph.nodes
    )


def _rows(flat: Sequence[Tensor]) -> int:
    return flat[0].shape[0] if flat and flat[0].ndim else 0


class _Comparison:
    """Collects one output over the batches."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.shape: Any = ()
        self.error = 0.0
        self.largest = 0.0
        self.cosines: list[Array] = []
        self.agreements: list[Array] = []

    def add(self, wanted: Tensor, given: Array, rows: int, tie: float) -> None:
        want = wanted.detach().cpu().numpy().astype(np.float64)
        got = np.asarray(given).astype(np.float64)
        if want.shape != got.shape:
            raise DataError(
                f"found shape {got.shape}, expected {want.shape}", where=f"output {self.number}"
            )
        self.shape = want.shape[1:]
        difference = np.abs(want - got)
        error = float(difference.max(initial=0.0))
        self.error = max(self.error, error) if np.isfinite(error) else float("inf")
        self.largest = max(self.largest, float(np.abs(want).max(initial=0.0)))
        per_sample = want.ndim > 0 and want.shape[0] == rows
        flat_want = want.reshape(rows if per_sample else 1, -1)
        flat_got = got.reshape(flat_want.shape)
        self.cosines.append(_cosines(flat_want, flat_got))
        if per_sample and want.ndim == 2 and want.shape[1] > 1 and wanted.is_floating_point():
            self.agreements.append(_agree(flat_want, flat_got, tie))

    def result(self) -> OutputParity:
        cosines = np.concatenate(self.cosines)
        top1 = float(np.concatenate(self.agreements).mean()) if self.agreements else None
        return OutputParity(
            name=f"output {self.number} {self.shape}",
            max_abs=self.error,
            relative=self.error / self.largest if self.largest else self.error,
            cosine_mean=float(cosines.mean()),
            cosine_min=float(cosines.min()),
            top1=top1,
            samples=len(cosines),
        )


def _cosines(want: Array, got: Array) -> Array:
    """Cosine per row `[n, k] x [n, k] -> [n]`; two zero rows agree, one alone does not."""
    product = (want * got).sum(1)
    lengths = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
    both_zero = (np.abs(want).max(1, initial=0) == 0) & (np.abs(got).max(1, initial=0) == 0)
    cosines = np.where(lengths > 0, product / np.where(lengths > 0, lengths, 1), both_zero * 1.0)
    return np.nan_to_num(cosines, nan=0.0)


def _agree(want: Array, got: Array, tie: float) -> Array:
    best = want.max(1)
    chosen = np.take_along_axis(want, got.argmax(1)[:, None], 1)[:, 0]
    return best - chosen <= tie * np.abs(want).max(1)


def _failures(output: OutputParity, limits: Bounds) -> list[str]:
    failures: list[str] = []
    if limits.relative is not None and output.relative > limits.relative:
        failures.append(
            f"{output.name}: relative error {output.relative:.2e}, allowed {limits.relative:.2e}"
        )
    for what, value, least in (
        ("mean cosine", output.cosine_mean, limits.cosine_mean),
        ("least cosine", output.cosine_min, limits.cosine_min),
    ):
        if least is not None and not value >= least:
            failures.append(f"{output.name}: {what} {value:.5f}, at least {least:g} expected")
    if limits.top1 is not None and output.top1 is not None:
        wrong = round((1 - output.top1) * output.samples)
        if wrong > max(1, (1 - limits.top1) * output.samples):
            failures.append(
                f"{output.name}: best class differs for {wrong} of {output.samples} samples"
            )
    return failures
