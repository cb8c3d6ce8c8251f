"""Running statistics of batch normalisation when a step has several batches.

Every batch is normalised by its own mean and variance, in whichever process it is. The running
statistics move once a step, by the moments of all batches of the step taken together:

    n = sum n_i,  mean = sum n_i mean_i / n,  var = sum n_i (var_i + mean_i^2) / n - mean^2

with biased var_i, then `running <- (1 - momentum) running + momentum moment`, the variance unbiased
by n / (n - 1). For one batch that is what `batch_norm` does itself. Instance normalisation has a
mean over instances, which is averaged by their number.

A channel with a single value in a batch (the last sample of a pass, behind global pooling) has no
variance: torch's operator would write NaN into the running one. Such a batch is normalised by the
running statistics, which stay as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from laconic.program.program import Program
from laconic.training.processes import Processes

_BATCH = torch.ops.aten.batch_norm.default
_INSTANCE = torch.ops.aten.instance_norm.default


@dataclass
class _Moments:
    """Sums over the batches of a step, for one call of a normalisation in the graph."""

    mean: Tensor
    var: Tensor
    momentum: float
    unbiased: bool
    sums: Tensor  # [2 * channels + 1]: n, n mean, n (var + mean^2); float64


def has_batch_norm(program: Program) -> bool:
    """Whether a program normalises by the batch."""
    return any(node.target is _BATCH for node in program.graph.nodes)


class LoneValues(TorchFunctionMode):
    """While active, batches with one value a channel are normalised by the running statistics."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func is _BATCH and args[5] and _lone(args):
            args = (*args[:5], False, *args[6:])
        return func(*args, **(kwargs or {}))


def _lone(args: Sequence[Any]) -> bool:
    """Whether a batch normalisation sees one value a channel, and knows what to do about it."""
    return args[3] is not None and args[0].numel() == args[0].shape[1]


class MergedStatistics(TorchFunctionMode):
    """While active, training normalisation writes its moments here instead of into its buffers.

    Call `start()` before every batch and `finish(processes)` once at the end of the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[_Moments] = []
        self._call = 0

    def start(self) -> None:
        """A new batch begins: calls are counted from the first again."""
        self._call = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func not in (_BATCH, _INSTANCE) or not args[5] or args[3] is None:
            return func(*args, **(kwargs or {}))
        x, weight, bias, mean, var, training, momentum, *rest = args
        if func is _BATCH and _lone(args):
            self._add(mean, var, momentum, True, mean.double(), var.double(), 0)
            return func(x, weight, bias, mean, var, False, momentum, *rest)
        own_mean, own_var = torch.zeros_like(mean), torch.zeros_like(var)
        out = func(x, weight, bias, own_mean, own_var, training, 1.0, *rest)
        batch = func is _BATCH
        count = x.numel() // x.shape[1] if batch else x.shape[0]
        self._add(mean, var, momentum, batch, own_mean.double(), own_var.double(), count)
        return out

    def _add(
        self,
        mean: Tensor,
        var: Tensor,
        momentum: float,
        unbiased: bool,
        m: Tensor,
        v: Tensor,
        n: int,
    ) -> None:
        if self._call == len(self._held):
            empty = m.new_zeros(2 * m.numel() + 1)
            self._held.append(_Moments(mean, var, momentum, unbiased, empty))
        held = self._held[self._call]
        self._call += 1
        if n:
            second = v * ((n - 1) / n) + m * m if unbiased else v
            held.sums += n * torch.cat([m.new_ones(1), m, second])

    @torch.no_grad()
    def finish(self, processes: Processes) -> None:
        """Merge over processes, move the running statistics, and forget."""
        processes.sum_([held.sums for held in self._held])
        for held in self._held:
            if not held.sums[0]:
                continue
            n, (mean, second) = held.sums[0], (held.sums[1:] / held.sums[0]).chunk(2)
            var = second
            if held.unbiased:
                var = (second - mean * mean).clamp(min=0) * (n / (n - 1).clamp(min=1))
            held.mean.lerp_(mean.to(held.mean.dtype), held.momentum)
            held.var.lerp_(var.to(held.var.dtype), held.momentum)
        self._held.clear()
