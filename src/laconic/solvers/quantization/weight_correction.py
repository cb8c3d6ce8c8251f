"""Take the mean error that rounded weights give the layers' outputs back out, through the biases.

The two corrections of `bias_correction`, for methods that round weights only.
"""

from collections.abc import Sequence
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

Correction = Literal["none", "analytic", "empirical"]
Layers = Sequence[tuple[fx.Node, str]]


class CorrectionOptions(BaseModel):
    """Options of the correction.

    Attributes:
        bias_correction: "none", "analytic" (from the mean inputs of each layer) or "empirical"
            (layer by layer, from the mean outputs).
        samples: calibration samples of it; none are taken with "none".
    """

    bias_correction: Correction = "none"
    samples: int = Field(default=512, ge=1)

    def correct(self, work: Rounding, before: Program, setting: Setting) -> None:
        """Correct the biases of the layers of `work`, whose weights are settled.

        `before`: the same program with its float weights. What would make the typical sample worse
        is taken back, and noted.

        Raises:
            DataError: calibration data that are missing, do not fit, or are not finite.
        """
        if self.bias_correction == "none" or not work.sites:
            return
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
            means = _means(before, pairs, "output", batches, setting)
            for node, name in pairs:
                biases.add_to_bias(work.program, node, name, torch.zeros_like(means[node.name]))
            biases.correct_empirically(work.program, pairs, means, batches, setting.progress)
        work.notes += guard.settle()


def _layers(sites: Sequence[WeightSite]) -> list[tuple[fx.Node, str]]:
    """Operators with a bias that read a chosen weight as it is stored."""
    return [
        (node, site.name)
        for site in sites
        for node in site.operators
        if biases.has_bias(node) and node.args[1] in site.holders
    ]


def _means(
    before: Program, pairs: Layers, place: str, batches: Sequence[Sequence[torch.Tensor]],
    setting: Setting,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Mean of each channel of the layers' inputs or outputs in the float program."""
    held = {node.name: Moments(biases.bias_axis(node)) for node, _ in pairs}
    requests = {name: (name, place, moments) for name, moments in held.items()}
    collect(before, batches, requests, setting.progress, total=len(batches))
    return {name: moments.mean for name, moments in held.items()}
