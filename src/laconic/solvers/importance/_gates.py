"""Gradients of the loss with respect to a gate of value 1 on each channel, sample by sample.

Closing a gate removes the channel from everything that reads it, so its derivative is the sum over
readers and positions of activation times gradient. A group that no layer reads, or along which
activations are multiplied (the shared axis of query and key), has its gate where the first layer
writes it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from laconic.core.errors import DataError
from laconic.program.freezing import plain
from laconic.program.groups import Group, Member
from laconic.solvers.importance.base import (
    Scene,
    in_products,
    pooled,
    reading_layers,
    writing_layers,
)
from laconic.statistics.batches import count
from laconic.statistics.gradients import Sensitivity, sensitivities
from laconic.statistics.layers import Layer


def gate_gradients(scene: Scene) -> Iterator[dict[str, Tensor]]:
    """For every batch: group name → derivative of each sample's loss, float32 `[samples, size]`.

    Groups that neither a layer reads nor writes are left out.

    Raises:
        DataError: there are no calibration data.
    """
    if scene.loss is None or not scene.batches:
        raise DataError("a score by gradients needs calibration data", where="importance")
    program = plain(scene.program)
    readers = {
        group.name: [] if in_products(group) else reading_layers(program, group)
        for group in scene.groups
    }
    writers = {
        group.name: writing_layers(program, group)[:1]
        for group in scene.groups
        if not readers[group.name]
    }
    nodes = {layer.node for pairs in (*readers.values(), *writers.values()) for layer, _ in pairs}

    def samples(batch: Sequence[Tensor]) -> int:
        return count(program, tuple(batch))

    batches = scene.progress.track(scene.batches, "gradients", len(scene.batches))
    if not nodes:
        return
    for seen in sensitivities(program, batches, list(nodes), scene.loss, samples):
        yield {
            group.name: gradient
            for group in scene.groups
            if (gradient := _of_group(group, readers[group.name], writers, seen)) is not None
        }


def _of_group(
    group: Group,
    readers: list[tuple[Layer, Member]],
    writers: dict[str, list[tuple[Layer, Member]]],
    seen: Sensitivity,
) -> Tensor | None:
    total: Tensor | None = None
    for layer, member in readers:
        found = _products(layer, layer.node, seen.inputs, seen.samples)
        found = pooled(found, _index(group, member, found.shape[-1]), group.size)
        total = found if total is None else total + found
    for layer, member in writers.get(group.name, []):
        found = _products(layer, layer.node, seen.outputs, seen.samples)
        total = pooled(found, group.index(member), group.size)
    return total


def _products(
    layer: Layer,
    node: fx.Node,
    values: dict[fx.Node, tuple[Tensor, Tensor]],
    samples: int,
) -> Tensor:
    """Activation times gradient, summed over positions of a sample: `[samples, channels]`."""
    value, gradient = values[node]
    product = (value * gradient).movedim(layer.channel_axis(value), -1)
    rows = product.flatten(0, -2)
    if len(rows) % samples:  # samples are not apart any more: every row counts as one
        return rows.float()
    return rows.unflatten(0, (samples, -1)).sum(1).float()


def _index(group: Group, member: Member, channels: int) -> Tensor:
    """Index of each input channel of a layer in the group, grouped convolutions included."""
    index = group.index(member)
    if len(index) != channels:  # the weight holds the channels of one convolution group
        index = index.repeat(channels // len(index))
    return index


def mean_over_samples(scene: Scene, power: int) -> dict[str, Tensor]:
    """Group name → mean over samples of |gate gradient|^power, float64 `[size]`."""
    sums: dict[str, Tensor] = {}
    seen = 0
    for gradients in gate_gradients(scene):
        seen += max((len(g) for g in gradients.values()), default=0)
        for name, gradient in gradients.items():
            part = gradient.double().abs().pow(power).sum(0).cpu()
            sums[name] = sums.get(name, torch.zeros_like(part)) + part
    missing = [group.name for group in scene.groups if group.name not in sums]
    for name in missing:
        scene.notes.append(f"{name}: no layer reads or writes it, left whole")
    return {name: total / max(seen, 1) for name, total in sums.items()}
