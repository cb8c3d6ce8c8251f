"""Batch norms whose factors are not negative, so that they fold into any grid's scales."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from laconic.program.program import Program
from laconic.solvers.quantization.weight_sites import WeightSite
from laconic.solvers.recalibrate import Norm, norms


@torch.no_grad()
def make_positive(program: Program, sites: Sequence[WeightSite]) -> list[str]:
    """Turn the signs of filters whose batch norm has a negative factor, in place; exact.

    A filter, its bias and its running mean change signs with the factor: same outputs.

    Args:
        program: to change.
        sites: weights that a batch norm may stand behind.

    Returns:
        Names of the factors of all batch norms behind `sites`: none is negative now.
    """
    found = norms(program)
    uses = Counter(norm.weight for norm in found)
    behind = {norm.source: norm for norm in found if not norm.shared}
    done: list[str] = []
    for site in sites:
        layer = site.operators[0]
        norm = behind.get(layer)
        if norm is None or norm.weight is None or uses[norm.weight] > 1:
            continue
        if len(site.operators) > 1 or site.axis != 0 or not _alone(layer):
            continue
        _turn(program, site, layer, norm)
        done.append(norm.weight)
    return done


def _alone(layer: fx.Node) -> bool:
    """Whether only one node reads a layer, and only the layer its bias."""
    bias: Any = layer.args[2] if len(layer.args) > 2 else None
    return len(layer.users) == 1 and (bias is None or len(bias.users) == 1)


def _turn(program: Program, site: WeightSite, layer: fx.Node, norm: Norm) -> None:
    assert norm.weight is not None
    factor = program.tensor(norm.weight).detach()
    sign = torch.where(factor < 0, -torch.ones_like(factor), torch.ones_like(factor))
    names = [norm.weight, norm.mean]
    bias: Any = layer.args[2] if len(layer.args) > 2 else None
    if bias is not None:
        names.append(str(bias.target))
    for name in names:
        program.set_tensor(name, program.tensor(name) * sign)
    weight = program.tensor(site.name)
    program.set_tensor(site.name, weight * sign.reshape(-1, *[1] * (weight.ndim - 1)))
