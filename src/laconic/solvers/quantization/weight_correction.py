"""Take the mean error that rounded weights give the layers' outputs back out, through the biases.

The corrections of `bias_correction`, for methods that round weights only.
"""

from collections.abc import Container, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import fx

from laconic.program.program import Program
from laconic.solvers.quantization import bias_correction as biases
from laconic.solvers.quantization.weight_rounding import Rounding, calibration
from laconic.solvers.quantization.weight_sites import WeightSite
from laconic.solvers.setting import Setting
from laconic.statistics.collect import collect
from laconic.statistics.moments import Moments

Correction = Literal["none", "analytic", "empirical", "batch_norm"]
Layers = Sequence[tuple[fx.Node, str]]


class CorrectionOptions(BaseModel):
    """Options of the correction.

    Attributes:
        bias_correction: "none", "analytic" (from the mean inputs of each layer) or "empirical"
            (layer by layer, from the mean outputs), "batch_norm" (the spread of each channel's
            outputs as well, through the scales).
        samples: calibration samples of it; none are taken with "none".
    """

    bias_correction: Correction = "none"
    samples: int = Field(default=512, ge=1)

    def correct_settled(self, work: Rounding, before: Program, setting: Setting) -> None:
        """`correct` where every weight has been settled: its grid follows."""
        free = [name for name, grid in work.grids.items() if grid.scale.ndim]
        for name, factor in self.correct(work, before, setting, free).items():
            work.widen(name, factor)

    def correct(
        self, work: Rounding, before: Program, setting: Setting, free: Container[str] = ()
    ) -> dict[str, torch.Tensor]:
        """Correct the biases of the layers of `work`, whose weights are settled.

        Args:
            work: the program with rounded weights; is changed.
            before: the same program with its float weights.
            setting: for calibration data.
            free: weights with a scale for each output channel that may be multiplied.

        Returns:
            weight → what its output channels were multiplied by, float `[channels]`: their scales
            have to follow. What would make the typical sample worse is taken back, and noted.

        Raises:
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        factors: dict[str, torch.Tensor] = {}
        rounded = {site.name: work.program.tensor(site.name) for site in work.sites}
        if self.bias_correction == "none" or not work.sites:
            return factors
        pairs = _layers(work.sites)
        batches = list(calibration(before, setting, self.samples))
        probe = calibration(before, setting, min(self.samples, biases.GUARDED))
        guard = biases.Guard(before, work.program, pairs, probe)
        if self.bias_correction == "analytic":
            means = _means(before, pairs, "input 0", batches, setting)
            for node, name in pairs:
                now, old = work.program.tensor(name), before.tensor(name)
                difference = now.detach().double() - old.detach().double()
                shift = biases.mean_shift(node, difference, means[node.name])
                biases.add_to_bias(work.program, node, name, -shift)
        else:
            held = _moments(before, pairs, "output", batches, setting)
            means = {name: moments.mean for name, moments in held.items()}
            for node, name in pairs:
                biases.add_to_bias(work.program, node, name, torch.zeros_like(means[node.name]))
            spread: dict[str, torch.Tensor] = {}
            if self.bias_correction == "batch_norm":
                spread = {
                    node.name: held[node.name].variance
                    for node, name in pairs
                    if name in free and _own(work, name)
                }
            factors = biases.correct_empirically(
                work.program, pairs, means, batches, setting.progress, spread
            )
        undone = guard.settle()
        work.notes += undone
        if not undone:
            return factors
        for name in factors:
            work.program.set_tensor(name, rounded[name])
        return {}


def _layers(sites: Sequence[WeightSite]) -> list[tuple[fx.Node, str]]:
    """Operators with a bias that read a chosen weight as it is stored."""
    return [
        (node, site.name)
        for site in sites
        for node in site.operators
        if biases.has_bias(node) and node.args[1] in site.holders
    ]


def _own(work: Rounding, name: str) -> bool:
    """Whether one operator alone uses a weight, output channels first."""
    site = next(site for site in work.sites if site.name == name)
    return site.axis == 0 and len(site.operators) == 1


def _means(
    before: Program, pairs: Layers, place: str, batches: Sequence[Sequence[torch.Tensor]],
    setting: Setting,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Mean of each channel of the layers' inputs or outputs in the float program."""
    found = _moments(before, pairs, place, batches, setting)
    return {name: moments.mean for name, moments in found.items()}


def _moments(
    before: Program, pairs: Layers, place: str, batches: Sequence[Sequence[torch.Tensor]],
    setting: Setting,
) -> dict[str, Moments]:  # fmt: skip
    held = {node.name: Moments(biases.bias_axis(node)) for node, _ in pairs}
    requests = {name: (name, place, moments) for name, moments in held.items()}
    collect(before, batches, requests, setting.progress, total=len(batches))
    return held
