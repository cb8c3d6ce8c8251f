"""Give the input channels that count most finer steps, by scaling them up before rounding.

A weight column that is multiplied by `s` before rounding to a grid, and divided by it afterwards,
has its rounding error divided by `s` as long as the grid does not grow with it. So the columns of
input channels with large activations are scaled up, `s_c = rms(x_c)^a` (Lin et al., "AWQ", arXiv
2306.00978), with the exponent that moves the outputs least, found on second moments of the inputs.
The inputs are divided by `s` where they are made: in the rows of the layers that write them, if all
on the way is positively homogeneous, or in the layer norm in front. Elsewhere nothing is scaled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.solvers.channels.channel_region import Region, Regions, columns
from laconic.solvers.portions import MOMENTS, portions
from laconic.solvers.quantization import equalization, ranges, smoothing
from laconic.solvers.quantization.weight_rounding import Rounding, calibration
from laconic.solvers.setting import Setting
from laconic.solvers.weights.weight_scores import INPUT_BATCH, input_place
from laconic.statistics.collect import collect
from laconic.statistics.gram import Gram, InputGram
from laconic.statistics.layers import Layer, layers


@dataclass(frozen=True)
class Place:
    """Input channels that several layers read, and where they can be divided.

    Attributes:
        name: of the group or of the layer norm.
        readers: layer and int64 `[channels, width]`, the columns of every channel.
        region: whose writers take the division, or
        norm: the layer norm that does.
    """

    name: str
    readers: tuple[tuple[Layer, Tensor], ...]
    region: Region | None = None
    norm: fx.Node | None = None


@torch.no_grad()
def protect(work: Rounding, setting: Setting, samples: int, tries: int) -> dict[str, float]:
    """Scale channels of the open program; its function does not change (up to rounding).

    Args:
        work: whose chosen weights are not settled yet.
        setting: data, device, progress.
        samples: calibration samples at most.
        tries: exponents between 0 and 1.

    Returns:
        Place → the exponent that was chosen, 0 where nothing pays.

    Raises:
        DataError: calibration data that are missing, do not fit, or are not finite.
    """
    before, found = work.program.clone(), places(work)
    if not found:
        return {}
    batches = list(calibration(before, setting, samples, INPUT_BATCH))
    scaled: dict[str, Tensor] = {}
    chosen: dict[str, float] = {}

    def needed(place: Place) -> int:
        return 8 * sum(_matrix(before, layer).shape[1] ** 2 for layer, _ in place.readers)

    for some in portions(found, needed, MOMENTS):
        held = {
            layer.node.name: InputGram(layer, len(batches), setting.seed)
            for place in some
            for layer, _ in place.readers
        }
        nodes = {layer.node.name: layer for place in some for layer, _ in place.readers}
        requests = {name: (name, input_place(nodes[name]), held[name]) for name in held}
        collect(before, batches, requests, setting.progress, total=len(batches))
        moments = {name: one.gram.raw() for name, one in held.items()}
        for place in some:
            exponent, factors = _search(work, before, place, moments, scaled, tries)
            if exponent and _scale(work.program, place, factors):
                chosen[place.name] = exponent
                for layer, index in place.readers:
                    scaled[layer.weight] = _along(before, layer, index, factors, scaled)
    work.program.recompile()
    return chosen


def places(work: Rounding) -> list[Place]:
    """Where channels can be divided exactly, and a chosen weight reads them."""
    program = work.program
    held = {layer.node: layer for layer in layers(program)}
    names = {site.name for site in work.sites if work.bits[site.name] < 8}
    made: list[Place] = []
    found = groups(program)
    finder = Regions(program, found)
    for group in found:
        region = finder.of(group)
        if isinstance(region, str) or not region.homogeneous or region.filters:
            continue
        if any(writer.norm is not None for writer in region.writers):
            continue
        readers = tuple((layer, columns(group, member)) for layer, member in region.readers)
        made.append(Place(group.name, tuple(_wide(r) for r in readers), region=region))
    taken = {layer.weight for place in made for layer, _ in place.readers}
    for node, members in smoothing.linear_readers(work.sites).items():
        if str(node.target).startswith("aten.layer_norm") and len(members) == len(node.users):
            mine = [held[user] for user, _ in members if user in held]
            if len(mine) == len(members) and not any(layer.weight in taken for layer in mine):
                index = torch.arange(node.meta["shape"][-1])[:, None]
                made.append(Place(node.name, tuple((x, index) for x in mine), norm=node))
    return [p for p in made if any(layer.weight in names for layer, _ in p.readers)]


def _wide(reader: tuple[Layer, Tensor]) -> tuple[Layer, Tensor]:
    """Input channels as columns of the weight's matrix: every tap of each."""
    layer, index = reader
    taps = torch.arange(layer.taps)
    return layer, (index[:, :, None] * layer.taps + taps).flatten(1)


def _search(
    work: Rounding,
    before: Program,
    place: Place,
    moments: Mapping[str, Gram],
    scaled: Mapping[str, Tensor],
    tries: int,
) -> tuple[float, Tensor]:
    """The exponent, and the factors `[channels]` it stands for."""
    size = torch.stack([
        moments[layer.node.name].covariance.diagonal()[index].mean(1)
        for layer, index in place.readers
    ]).mean(0).sqrt()  # fmt: skip
    if not bool(torch.isfinite(size).all()):
        work.notes.append(f"{place.name}: not scaled, its activations are too large to be squared")
        return 0.0, torch.ones_like(size)
    size = size.clamp(min=1e-4 * float(size.max()) + 1e-30)
    best, found = float("inf"), (0.0, torch.ones_like(size))
    for number in range(tries):
        exponent = number / tries
        factors = size**exponent
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = 0.0
        for layer, index in place.readers:
            along = _along(before, layer, index, factors, scaled)
            error += _error(work, before, layer, moments[layer.node.name], along)
        if error < best:
            best, found = error, (exponent, factors)
    return found


def _along(
    before: Program, layer: Layer, index: Tensor, factors: Tensor, scaled: Mapping[str, Tensor]
) -> Tensor:
    """float64 `[columns]`: all that a weight's columns are multiplied by."""
    width = _matrix(before, layer).shape[1]
    old = scaled.get(layer.weight)
    made = torch.ones(width, dtype=torch.float64, device=factors.device) if old is None else old
    made = made.clone()
    made[index.to(made.device)] *= factors[:, None]
    return made


def _error(work: Rounding, before: Program, layer: Layer, gram: Gram, along: Tensor) -> float:
    """What rounding the scaled weight does to the outputs, as a share of their energy."""
    site = next((s for s in work.sites if s.name == layer.weight), None)
    if site is None:
        return 0.0
    old = before.tensor(layer.weight).detach()
    matrix = _matrix(before, layer)
    weight = layer.weight_from(matrix * along, old)
    grid = work.grid(site, weight)
    made = layer.matrix(ranges.on_grid(weight, site.axis, grid)).double() / along
    away, moments = made - matrix, gram.covariance
    energy = float(((matrix @ moments) * matrix).sum())
    return float(((away @ moments) * away).sum()) / max(energy, 1e-300)


def _matrix(program: Program, layer: Layer) -> Tensor:
    return layer.matrix(program.tensor(layer.weight).detach()).double()


def _scale(program: Program, place: Place, factors: Tensor) -> bool:
    """Divide where the channels are made, multiply where they are read; False if it cannot be."""
    if place.region is not None:
        on = factors.cpu()
        equalization.scale(program, place.region, on, on)
        return True
    assert place.norm is not None
    if not smoothing.scale_norm(program, place.norm, factors):
        return False
    _multiply(program, place.readers, factors)
    return True


def _multiply(program: Program, readers: Sequence[tuple[Layer, Tensor]], factors: Tensor) -> None:
    for layer in {layer.weight: layer for layer, _ in readers}.values():
        old = program.tensor(layer.weight)
        matrix = layer.matrix(old.detach()).double() * factors.to(old.device)
        program.set_tensor(layer.weight, layer.weight_from(matrix, old))
