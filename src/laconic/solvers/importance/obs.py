"""Optimal brain surgeon in blocks: what the readers of a channel lose after the best repair.

For every layer that reads a group: second moments S of its inputs, second moments D of the loss
gradient at its output, and the greedy elimination of `solvers.elimination` (Hassibi & Stork 1993;
ZipLM, Kurtic et al. 2023). Harms are in nats and already count what the refit will repair (means
only where the layer, or a batch norm behind it, has a bias), so this is the right score before
compensation. Moments are collected for as many groups at a time as fit
into memory, with a pass over the data for each such portion; those of one group are needed together
(the stream that all layers of a transformer read is one group). Groups that no plain layer reads
(the shared axis of query and key, inputs of grouped convolutions) are scored by `fisher`, in the
same unit.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.program.groups import Group, Member
from laconic.solvers.channels.compensate import with_bias
from laconic.solvers.importance.base import Importance, Scene, in_products, reading_layers
from laconic.solvers.importance.fisher import Fisher
from laconic.solvers.portions import MOMENTS, portions
from laconic.solvers.weights.elimination import Consumer, Removal, eliminate
from laconic.statistics.batches import count
from laconic.statistics.collect import collect
from laconic.statistics.gradients import sensitivities
from laconic.statistics.gram import Gram, InputGram
from laconic.statistics.layers import Layer

RIDGE = 1e-3
"""Damping of the second moments, in units of the mean variance of the columns."""


class Obs(Importance):
    """Greedy block-wise elimination."""

    def removals(self, scene: Scene) -> dict[str, Removal]:
        """Group name → order of elimination and the harm of each step.

        Raises:
            DataError: there are no calibration data.
        """
        if scene.loss is None or not scene.batches:
            raise DataError("obs needs calibration data", where="importance")
        readers = {g.name: reading_layers(scene.program, g) for g in scene.groups}
        plain = [g for g in scene.groups if _plain(g, [layer for layer, _ in readers[g.name]])]
        found = _by_fisher(scene, [g for g in scene.groups if g not in plain])

        def needed(group: Group) -> int:
            return sum(_bytes(scene, layer) for layer, _ in readers[group.name])

        for some in portions(plain, needed, MOMENTS):
            found |= _by_elimination(scene, some, readers)
        return {group.name: found[group.name] for group in scene.groups if group.name in found}


def _by_elimination(
    scene: Scene, groups: Sequence[Group], readers: Mapping[str, Sequence[tuple[Layer, Member]]]
) -> dict[str, Removal]:
    """The removals of groups whose moments fit into memory together."""
    layers = {layer.node.name: layer for g in groups for layer, _ in readers[g.name]}
    grams = input_moments(scene, list(layers.values()))
    metrics = output_metrics(scene, list(layers.values()))
    moved = with_bias(scene.program, layers.values())
    found: dict[str, Removal] = {}
    for group in scene.progress.track(groups, "elimination", len(groups)):
        consumers = [
            _consumer(scene, group, layer, member, grams, metrics, moved)
            for layer, member in readers[group.name]
        ]
        found[group.name] = eliminate(consumers, group.size)
    return found


def _bytes(scene: Scene, layer: Layer) -> int:
    """What the second moments of a layer take, of its inputs and at its outputs."""
    rows, columns = layer.matrix(scene.program.tensor(layer.weight)).shape
    return 8 * (rows**2 + columns**2)


def input_moments(scene: Scene, layers: Sequence[Layer]) -> dict[str, Gram]:
    """Node name → second moments of the rows that the layer's weight multiplies."""
    held = {layer.node.name: InputGram(layer, len(scene.batches), scene.seed) for layer in layers}
    requests = {
        layer.node.name: (layer.node.name, _place(layer), held[layer.node.name]) for layer in layers
    }
    if requests:
        collect(scene.program, scene.batches, requests, scene.progress, total=len(scene.batches))
    return {name: statistic.gram for name, statistic in held.items()}


def output_metrics(scene: Scene, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Node name → second moment of the loss gradient at the layer's output, float64 `[out, out]`.

    Summed over the positions of a sample, averaged over samples.
    """
    if scene.loss is None or not layers:
        return {}
    sums: dict[str, Tensor] = {}
    samples = 0
    batches = scene.progress.track(scene.batches, "gradients", len(scene.batches))
    nodes = [layer.node for layer in layers]

    def size(batch: Sequence[Tensor]) -> int:
        return count(scene.program, tuple(batch))

    for seen in sensitivities(scene.program, batches, nodes, scene.loss, size):
        samples += seen.samples
        for layer in layers:
            gradient = layer.rows_out(seen.outputs[layer.node][1], None).float()
            part = (gradient.T @ gradient).double()
            sums[layer.node.name] = sums.get(layer.node.name, torch.zeros_like(part)) + part
    return {name: total / max(samples, 1) for name, total in sums.items()}


def _consumer(
    scene: Scene,
    group: Group,
    layer: Layer,
    member: Member,
    grams: dict[str, Gram],
    metrics: dict[str, Tensor],
    moved: Collection[Layer],
) -> Consumer:
    weight = layer.matrix(scene.program.tensor(layer.weight).detach())
    name = layer.node.name
    columns = blocks(group, member, layer.taps)
    return Consumer(grams[name], weight, metrics[name], columns, ridge=RIDGE, bias=layer in moved)


def blocks(group: Group, member: Member, taps: int) -> Tensor:
    """Columns of each index of the group, int64 `[size, columns an index]`."""
    index = group.index(member)
    order = index.argsort(stable=True)[int((index < 0).sum()) :]
    channels = order.reshape(group.size, -1)
    columns = channels[..., None] * taps + torch.arange(taps)
    return columns.flatten(1)


def _plain(group: Group, layers: Sequence[Layer]) -> bool:
    """Whether every consumer of the group is a layer with one set of columns."""
    read = {layer.weight for layer in layers}
    known = all(member.tensor in read for member in group.by_role("consumer"))
    apart = all(layer.groups == 1 for layer in layers)
    return bool(layers) and known and apart and not in_products(group)


def _by_fisher(scene: Scene, groups: Sequence[Group]) -> dict[str, Removal]:
    if not groups:
        return {}
    scene.notes.extend(f"{g.name}: no plain layer reads it, scored by fisher" for g in groups)
    return Fisher().removals(replace(scene, groups=groups))


def _place(layer: Layer) -> str:
    return f"input {layer.node.args.index(layer.source)}"
