"""What the layers that read a group see of each of its indices, collected in one pass.

A group that no layer reads, or along which activations are multiplied (the shared axis of query
and key), is looked at where the first layer writes it.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from laconic.core.errors import DataError
from laconic.program.groups import Group, Member
from laconic.solvers.importance.base import (
    Scene,
    in_products,
    pooled,
    reading_layers,
    relative,
    writing_layers,
)
from laconic.statistics.base import Statistic
from laconic.statistics.collect import collect
from laconic.statistics.layers import Layer

S = TypeVar("S", bound=Statistic)
_Look = tuple[Layer, Member, str]


def per_index(
    scene: Scene, make: Callable[[int], S], score: Callable[[S], Tensor]
) -> dict[str, Tensor]:
    """Group name → mean score of each index over the layers that see it, float64 `[size]`.

    Each layer's scores count relative to their mean. Groups that neither a layer reads nor writes
    are left out, with a note.

    Args:
        scene: the groups and the data.
        make: a statistic that keeps the indices of this axis apart.
        score: what a filled statistic says of each channel, `[channels]`.

    Raises:
        DataError: there are no calibration data.
    """
    if not scene.batches:
        raise DataError("a score by activations needs calibration data", where="importance")
    looks = {group.name: _looks(scene, group) for group in scene.groups}
    held: dict[tuple[str, str], S] = {}
    for layer, _, place in (look for found in looks.values() for look in found):
        held.setdefault((layer.node.name, place), make(-1 - layer.space))
    requests = {key: (*key, statistic) for key, statistic in held.items()}
    if requests:
        collect(scene.program, scene.batches, requests, scene.progress, total=len(scene.batches))
    found: dict[str, Tensor] = {}
    for group in scene.groups:
        if not looks[group.name]:
            scene.notes.append(f"{group.name}: no layer reads or writes it, left whole")
            continue
        rows = [
            _of_group(group, member, score(held[layer.node.name, place]))
            for layer, member, place in looks[group.name]
        ]
        found[group.name] = torch.stack([relative(row) for row in rows]).mean(0)
    return found


def _looks(scene: Scene, group: Group) -> Sequence[_Look]:
    readers = [] if in_products(group) else reading_layers(scene.program, group)
    if readers:
        return [
            (layer, member, f"input {layer.node.args.index(layer.source)}")
            for layer, member in readers
        ]
    writers = writing_layers(scene.program, group)[:1]
    return [(layer, member, "output") for layer, member in writers]


def _of_group(group: Group, member: Member, scores: Tensor) -> Tensor:
    """The mean over the channels of each index."""
    index = group.index(member)
    if len(index) != len(scores):  # the weight holds the channels of one convolution group
        index = index.repeat(len(scores) // len(index))
    scores = scores.double().cpu()
    return pooled(scores, index, group.size) / pooled(torch.ones_like(scores), index, group.size)
