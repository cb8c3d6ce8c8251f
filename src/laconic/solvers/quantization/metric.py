"""How much an error in a layer's weight matters: second moments of its inputs, scales behind it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from laconic.core.progress import SILENT, Progress
from laconic.program.program import Program
from laconic.statistics.convoy import Convoy
from laconic.statistics.gram import Gram, InputGram
from laconic.statistics.layers import Layer

Metric = tuple[Tensor | None, Tensor | None]
"""Second moment of the input columns `[columns, columns]` and weights of the outputs `[out]`."""
_SINGULAR = 1e-7  # pivots below this part of the mean variance


def streamed(
    program: Program,
    wanted: Sequence[Layer],
    batches: Sequence[Sequence[Tensor]],
    seed: int = 0,
    progress: Progress = SILENT,
) -> Iterator[tuple[Layer, Gram]]:
    """Second moments of the inputs of one layer after the other, in the order of the graph.

    All batches go through the network once, side by side; only one layer's moments are held.
    """
    convoy = Convoy(program, batches)
    place = convoy.order.place
    ordered = sorted(wanted, key=lambda layer: place[layer.node])
    for layer in progress.track(ordered, "second moments", len(ordered)):
        convoy.before(layer.node)
        statistic = InputGram(layer, len(convoy), seed)
        for walk in convoy:
            statistic.update(walk.values[layer.source])
        yield layer, statistic.gram


def metric(
    gram: Gram, *, bias: bool, scale: Tensor | None = None, damping: float = 1e-3
) -> tuple[Metric, str]:
    """The metric on the CPU in float64, and a sentence where the data fall short.

    Args:
        gram: moments of the layer's input rows.
        bias: something behind the layer makes up for the means, so only what varies matters.
        scale: `[out]`, what each output is multiplied with afterwards.
        damping: added to the diagonal, in units of the mean variance.
    """
    moments = gram if bias else gram.raw()
    covariance = moments.covariance.double().cpu()
    columns, level = len(covariance), float(covariance.diagonal().mean())
    if not bool(torch.isfinite(covariance).all()):
        return (
            None,
            None,
        ), "its inputs are too large to be multiplied, every direction counts alike"
    if level <= 0.0:
        return (
            None,
            None,
        ), "calibration data give it a constant input, every direction counts alike"
    factor, failed = torch.linalg.cholesky_ex(covariance)
    pivot = float(factor.diagonal().square().min())
    note = ""
    if gram.count < columns or int(failed) or pivot < _SINGULAR * level:
        note = (
            f"the covariance of its {columns} input columns ({gram.count} rows) is singular, "
            f"damped by {damping:g} of the mean variance"
        )
    covariance.diagonal().add_(damping * level)
    return (covariance, _rows(scale)), note


def _rows(scale: Tensor | None) -> Tensor | None:
    """Positive weights; a channel that is switched off keeps a trace, so that it can be divided."""
    if scale is None:
        return None
    rows = scale.detach().double().abs().cpu()
    return rows.clamp(min=max(1e-6 * float(rows.max()), 1e-30))
