"""Give the channels of a group to their readers at scales that suit every weight on the way.

Where everything between the layers that write a channel and those that read it is positively
homogeneous (ReLU, pooling, sums of such channels), the rows that write channel `i` can be divided
by `s_i > 0` and the columns that read it multiplied by it. With `s_i = sqrt(r_i / c_i)`, `r` and
`c` the ranges of its rows and columns, both get the same share of their tensors' ranges. A
depthwise convolution that all of it passes has two such scales, one before and one behind.
Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction"
(arXiv 1906.04721), section 4.1 and appendix A.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from laconic.program.program import Program
from laconic.solvers.channels.channel_region import Region, columns
from laconic.statistics.layers import Layer

_LEAST = 1e-6  # a row below that part of its tensor's range is dead: it keeps its scale


@torch.no_grad()
def equalize(program: Program, regions: Sequence[Region], rounds: int) -> int:
    """Scale the channels of every region until nothing moves by more than a hundredth.

    The program is changed, its function is not (up to rounding).

    Args:
        program: whose regions they are; batch norm folded.
        regions: scalable, no writer with a norm.
        rounds: most passes over all of them: neighbours share weights.

    Returns:
        How many passes were made.
    """
    for done in range(rounds):
        moved = max((_balance(program, region) for region in regions), default=0.0)
        if moved < 0.01:
            return done + 1
    return rounds


@torch.no_grad()
def spread(program: Program, region: Region) -> float:
    """The largest range of a row over their median, at the tensor where it is largest."""
    found = [_ranges(program, writer.layer, True) for writer in region.writers]
    found += [_ranges(program, layer, True) for layer in region.filters]
    return max(float(rows.max() / rows.median().clamp(min=1e-30)) for rows in found)


def _balance(program: Program, region: Region) -> float:
    """One region; returns the largest absolute logarithm of its scales."""
    group = region.group
    written = torch.zeros(group.size, dtype=torch.float64)
    for writer in region.writers:
        share = _ranges(program, writer.layer, True)
        written = torch.maximum(written, _of_channels(share, group.index(writer.member)))
    read = torch.zeros(group.size, dtype=torch.float64)
    for layer, member in region.readers:
        share = _ranges(program, layer, False)
        read = torch.maximum(read, share[columns(group, member)].amax(1))
    middle = _chain(region)
    if middle is None:
        alive = (written > _LEAST) & (read > _LEAST)
        before = behind = torch.where(alive, (written / read).sqrt(), torch.ones_like(read))
    else:
        own = _of_channels(_ranges(program, middle, True), _own_index(region, middle))
        alive = (written > _LEAST) & (read > _LEAST) & (own > _LEAST)
        common = (written * own * read).pow(1 / 3)
        before = torch.where(alive, written / common, torch.ones_like(read))
        behind = torch.where(alive, common / read, torch.ones_like(read))
    scale(program, region, before, behind)
    return float(torch.stack([before, behind]).log().abs().max())


def scale(program: Program, region: Region, before: Tensor, behind: Tensor) -> None:
    """Divide the rows that write each channel, multiply the columns that read it.

    before, behind: positive, float64 `[channels]`; they differ only where a filter that all pass
    stands between.
    """
    group = region.group
    for writer in region.writers:
        layer, index = writer.layer, group.index(writer.member)
        _multiply(program, layer.weight, layer.out_dim, index, 1 / before)
        if layer.bias is not None:
            _multiply(program, layer.bias, 0, index, 1 / before)
    for layer in region.filters:
        index = _own_index(region, layer)
        _multiply(program, layer.weight, layer.out_dim, index, before / behind)
        if layer.bias is not None:
            _multiply(program, layer.bias, 0, index, 1 / behind)
    for layer, member in region.readers:
        _multiply(program, layer.weight, layer.in_dim, group.index(member), behind)


def _ranges(program: Program, layer: Layer, out: bool) -> Tensor:
    """Largest magnitude of every row (or column) as a share of the tensor's: float64 `[n]`."""
    weight = program.tensor(layer.weight).detach().double().abs().cpu()
    along = weight.movedim(layer.out_dim if out else layer.in_dim, 0).flatten(1).amax(1)
    return along / along.max().clamp(min=1e-30)


def _of_channels(along: Tensor, index: Tensor) -> Tensor:
    """`[positions]` → the largest of each channel's positions."""
    held = index >= 0
    size = int(index.max()) + 1
    return torch.zeros(size, dtype=along.dtype).scatter_reduce(
        0, index[held].cpu(), along[held.cpu()], "amax", include_self=False
    )


def _multiply(program: Program, name: str, dim: int, index: Tensor, factors: Tensor) -> None:
    """Multiply the channels' positions along a dimension of a stored tensor."""
    old = program.tensor(name)
    along = torch.ones(old.shape[dim], dtype=torch.float64)
    held = index.cpu() >= 0
    along[held] = factors[index.cpu()[held]]
    shape = [1] * old.ndim
    shape[dim] = -1
    scaled = old.detach().double() * along.to(old.device).reshape(shape)
    program.set_tensor(name, scaled.to(old.dtype))


def _own_index(region: Region, layer: Layer) -> Tensor:
    """Which channel stands at each row of a depthwise filter."""
    member = next(m for m in region.others if m.tensor == layer.weight and m.dim == layer.out_dim)
    return region.group.index(member)


def _chain(region: Region) -> Layer | None:
    """The one filter that every way from the writers to the readers passes, if there is."""
    if len(region.filters) != 1:
        return None
    (middle,) = region.filters
    ends = {layer.node for layer, _ in region.readers}
    seen: set[fx.Node] = set()
    stack = [writer.layer.node for writer in region.writers]
    while stack:
        for user in stack.pop().users:
            if user in ends:
                return None
            if user is not middle.node and user not in seen:
                seen.add(user)
                stack.append(user)
    behind: set[fx.Node] = set()
    stack = [middle.node]
    while stack:  # what comes in from another writer behind the filter is scaled by neither
        for user in stack.pop().users:
            if user in seen:
                return None
            if user not in ends and user not in behind:
                behind.add(user)
                stack.append(user)
    return middle
