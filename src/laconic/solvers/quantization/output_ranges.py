"""Ranges by what rounding does to the outputs of layers, measured on calibration data.

Of a weight the squared error of its layer's outputs is `d H d` for every output channel, `d` the
rounding of its weights and `H` the second moments of the layer's inputs: steps are tried as for the
least squared error, with `H` in place of the identity (`ranges.weight_grid`). Of an activation it
is what the layers that read it make of its rounding; ranges are tried that the other rules give,
and parts of them. Nagel et al. 2021, "A White Paper on Neural Network Quantization" (arXiv
2106.08295), section 3.1; Hubara et al. 2020 (arXiv 2006.10518).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.core.progress import Progress
from laconic.program.program import FAKE_QUANTIZE, Program
from laconic.solvers.quantization import histogram_ranges
from laconic.solvers.quantization.histogram_ranges import Grid, Rule
from laconic.solvers.quantization.placement import Place
from laconic.statistics.base import Statistic, finite
from laconic.statistics.collect import collect
from laconic.statistics.gram import InputGram
from laconic.statistics.histogram import Histogram
from laconic.statistics.layers import Layer, layers

Range = tuple[float, float]
_RULES: tuple[Rule, ...] = ("minmax", "percentile", "mse", "entropy")
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
SAMPLES = 64
"""Calibration samples that are enough."""
_TRIED = 8
"""Samples of a batch that every range is tried on."""


def moments(
    program: Program,
    names: Iterable[str],
    batches: Sequence[Sequence[Tensor]],
    progress: Progress,
) -> dict[str, Tensor]:
    """Weight → second moments of the columns it multiplies, float64 `[columns, columns]`.

    Weights without a linear map from one set of columns are left out: look-ups, convolutions in
    groups, weights that are computed. Of a weight that several operators read the moments are
    those of all.

    Raises:
        DataError: no batch came, or a value is NaN or infinite; names the node.
    """
    wanted = set(names)
    found = [layer for layer in layers(program) if layer.weight in wanted and layer.groups == 1]
    requests: dict[str, tuple[str, str, Statistic]] = {
        layer.node.name: (layer.source.name, "output", InputGram(layer, len(batches)))
        for layer in found
    }
    if requests:
        collect(program, batches, requests, progress)
    made: dict[str, Tensor] = {}
    for layer in found:
        statistic = requests[layer.node.name][2]
        assert isinstance(statistic, InputGram)
        held = statistic.gram.raw().covariance
        made[layer.weight] = made[layer.weight] + held if layer.weight in made else held
    return made


class OutputErrors(Statistic):
    """What rounding an activation to each of several grids does to the layers that read it.

    Attributes:
        errors: float64 `[grids]`, squared errors of the outputs, summed.
    """

    def __init__(self, grids: Sequence[Grid], readers: Sequence[tuple[Layer, Tensor]]) -> None:
        """`readers`: layers with their weights."""
        self.errors = torch.zeros(len(grids), dtype=torch.float64)
        self._grids, self._readers = list(grids), list(readers)

    @torch.no_grad()
    def update(self, tensor: Tensor) -> None:
        """Take some samples of the activation in."""
        x = finite(tensor[:_TRIED])
        for number, grid in enumerate(self._grids):
            sides = grid.scale.to(x.device), grid.zero_point.to(x.device)
            off = FAKE_QUANTIZE(x, *sides, None, grid.qmin, grid.qmax) - x
            total = sum(float(_made(layer, off, weight).double().square().sum())
                        for layer, weight in self._readers)  # fmt: skip
            self.errors[number] += total

    def merge(self, other: "OutputErrors") -> None:
        """Take in what another one has seen."""
        if len(other.errors) != len(self.errors):
            raise DataError("cannot merge: other grids")
        self.errors = self.errors + other.errors


def _made(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer gives for `x` without its bias."""
    if not layer.space:
        return x @ layer.matrix(weight).T
    rest: Any = layer.node.args[3:]
    call: Any = layer.node.target
    return call(x, weight, None, *rest)


def activation_ranges(
    program: Program,
    groups: Mapping[int, tuple[Sequence[Place], Histogram, bool]],
    batches: Sequence[Sequence[Tensor]],
    percentile: float,
    progress: Progress,
) -> dict[int, Range]:
    """The range of each group of places whose readers' outputs suffer least.

    Groups that no layer reads directly are left out.

    Args:
        program: with float weights.
        groups: places that share a grid, all their values, and whether the grid is symmetric.
        batches: flat inputs.
        percentile: of the rule of that name, among the ranges that are tried.
        progress: one step a batch.

    Raises:
        DataError: no batch came, or a value is NaN or infinite; names the node.
    """
    known = {layer.node: layer for layer in layers(program)}
    tried: dict[int, list[Range]] = {}
    wanted: dict[tuple[int, str], tuple[str, str, Statistic]] = {}
    for number, (places, histogram, symmetric) in groups.items():
        tried[number] = _candidates(histogram, symmetric, percentile)
        grids = [histogram_ranges.grid(*ends, symmetric=symmetric) for ends in tried[number]]
        for place in places:
            readers = [known[user] for user in place.users if user in known]
            direct = [layer for layer in readers if layer.source is place.source]
            if direct:
                held = [(layer, program.tensor(layer.weight).detach()) for layer in direct]
                statistic = OutputErrors(grids, held)
                wanted[number, place.name] = (place.name, "output", statistic)
    if wanted:
        collect(program, batches, wanted, progress)
    errors: dict[int, Tensor] = {}
    for (number, _), (_, _, statistic) in wanted.items():
        assert isinstance(statistic, OutputErrors)
        errors[number] = errors.get(number, torch.zeros(())) + statistic.errors
    return {number: tried[number][int(total.argmin())] for number, total in errors.items()}


def _candidates(histogram: Histogram, symmetric: bool, percentile: float) -> list[Range]:
    """Ranges that the other rules choose, and parts of them; the extremes come first."""
    found: list[Range] = []
    for rule in _RULES:
        low, high = histogram_ranges.choose(
            histogram, rule, symmetric=symmetric, percentile=percentile
        )
        found += [(low * share, high * share) for share in _SHARES]
    return list(dict.fromkeys(found))
