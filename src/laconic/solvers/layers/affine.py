"""Affine maps over channels and positions as values: composed, added, and only then computed.

A linear layer, a convolution, an average pooling, a batch norm in eval mode and the identity are
the same thing here: output position `o` is `b + sum_t W[t] x[o * stride - padding + t * dilation]`.
Two in a row are one with

    kernel  W[t1 + s1 t2] = sum W2[t2] W1[t1],   stride s1 s2,   padding p1 + s1 p2,

as long as the zeros that the second one pads with are what the first one would have given there;
two side by side are added after their kernels are laid over one another (Ding et al. 2021, "RepVGG"
and "Diverse Branch Block", arXiv 2101.03697 and 2103.13425). Shapes are known at once, numbers are
computed in float64 when `build` is called.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Pads = tuple[tuple[int, int], ...]
Parts = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Affine:
    """An affine map.

    Attributes:
        inputs, outputs: channels.
        kernel, stride, dilation, padding: one entry for each spatial dimension, none for a linear
            layer; padding as (before, after).
        groups: the map is block diagonal over channels with so many blocks.
        biased: whether the bias is anything but zero.
        build: makes float64 `weight [outputs, inputs / groups, *kernel]` and `bias [outputs]`.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Pads
    groups: int
    biased: bool
    build: Callable[[], tuple[Tensor, Tensor]]

    @property
    def space(self) -> int:
        """Spatial dimensions; 0 for a linear layer."""
        return len(self.kernel)

    @property
    def weights(self) -> int:
        """Elements of the weight, which is multiply-adds for each output position."""
        return self.outputs * (self.inputs // self.groups) * math.prod(self.kernel)

    @property
    def params(self) -> int:
        """Elements of weight and bias."""
        return self.weights + (self.outputs if self.biased else 0)

    def reach(self, dim: int) -> int:
        """Input positions from the first tap to the last, less one."""
        return self.dilation[dim] * (self.kernel[dim] - 1)


def diagonal(scale: Tensor, shift: Tensor, space: int) -> Affine:
    """`y = scale * x + shift` for each channel; both `[channels]`."""
    channels, one = len(scale), (1,) * space
    weight = scale.double().reshape(channels, 1, *one)
    return Affine(
        channels, channels, one, one, one, ((0, 0),) * space, channels,
        bool(shift.any()), lambda: (weight, shift.double()),
    )  # fmt: skip


def identity(channels: int, space: int) -> Affine:
    """`y = x`."""
    one = torch.ones(channels, dtype=torch.float64)
    return diagonal(one, torch.zeros_like(one), space)


def scaled(one: Affine, scale: Tensor) -> Affine:
    """`scale * one(x)`; scale is `[outputs]` or a single number."""
    factor = scale.double().expand(one.outputs)

    def build() -> tuple[Tensor, Tensor]:
        weight, bias = one.build()
        factors = factor.to(weight.device)
        return weight * factors.reshape(-1, *[1] * (weight.ndim - 1)), bias * factors

    return replace(one, build=build)


def shifted(one: Affine, shift: Tensor) -> Affine:
    """`one(x) + shift`; shift is `[outputs]` or a single number."""
    added = shift.double().expand(one.outputs)

    def build() -> tuple[Tensor, Tensor]:
        weight, bias = one.build()
        return weight, bias + added.to(bias.device)

    return replace(one, build=build, biased=one.biased or bool(shift.any()))


# one behind the other -----------------------------------------------------------------------


def compose(second: Affine, first: Affine) -> Affine | str:
    """`second(first(x))` as one map, or in words why it would not be exact."""
    if first.space != second.space or first.outputs != second.inputs:
        return "they do not work along the same axes"
    if any(any(pair) for pair in second.padding):
        if first.biased:
            return "the second one pads with zeros where the first one would give its bias"
        if not all(_pads_with_zeros(first, second, dim) for dim in range(first.space)):
            return "the second one pads with zeros where the first one would still see its input"
    steps = [_steps(second, first, dim) for dim in range(first.space)]
    groups = math.gcd(first.groups, second.groups)
    kernel = tuple(
        (s.one * (first.kernel[d] - 1) + s.two * (second.kernel[d] - 1)) + 1
        for d, s in enumerate(steps)
    )
    pads = tuple(
        (before[0] + step * after[0], before[1] + step * after[1])
        for before, after, step in zip(first.padding, second.padding, first.stride, strict=True)
    )

    def build() -> tuple[Tensor, Tensor]:
        (one, bias_one), (two, bias_two) = _beside(first.build(), second.build())
        inner, outer = _blocks(one, first, groups), _blocks(two, second, groups)
        moved = outer.reshape(*outer.shape[:3], -1).sum(3) @ bias_one.reshape(groups, -1, 1)
        return _convolved(outer, inner, kernel, steps).flatten(0, 1), bias_two + moved.flatten()

    return Affine(
        first.inputs,
        second.outputs,
        kernel,
        tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        tuple(s.unit for s in steps),
        pads,
        groups,
        first.biased or second.biased,
        build,
    )


def _pads_with_zeros(first: Affine, second: Affine, dim: int) -> bool:
    """Whether `first` gives zeros wherever `second` pads, without counting its bias."""
    (left, right), reach = first.padding[dim], first.reach(dim)
    clear_left = not second.padding[dim][0] or reach < left + first.stride[dim]
    return clear_left and (not second.padding[dim][1] or reach <= right)


@dataclass(frozen=True)
class _Steps:
    """How far apart the taps of both kernels are in the common one, whose dilation is `unit`."""

    one: int
    two: int
    unit: int


def _steps(second: Affine, first: Affine, dim: int) -> _Steps:
    one, two = first.dilation[dim], first.stride[dim] * second.dilation[dim]
    several = [
        step for step, size in ((one, first.kernel[dim]), (two, second.kernel[dim])) if size > 1
    ]
    unit = math.gcd(*several) if several else 1
    return _Steps(one // unit, two // unit, unit)


def _convolved(
    outer: Tensor, inner: Tensor, kernel: Sequence[int], steps: Sequence[_Steps]
) -> Tensor:
    """`[g, out, mid, *taps]` with `[g, mid, in, *taps]` → `[g, out, in, *kernel]`."""
    made = outer.new_zeros((*outer.shape[:2], inner.shape[2], *kernel))
    for late in itertools.product(*map(range, outer.shape[3:])):
        for early in itertools.product(*map(range, inner.shape[3:])):
            place = tuple(s.one * a + s.two * b for s, a, b in zip(steps, early, late, strict=True))
            made[(..., *place)] += outer[(..., *late)] @ inner[(..., *early)]
    return made


def _blocks(weight: Tensor, one: Affine, groups: int) -> Tensor:
    """The weight as `[groups, outputs, inputs, *kernel]` for fewer groups than it has."""
    within = one.groups // groups
    split = weight.reshape(groups, within, -1, *weight.shape[1:])
    if within == 1:
        return split[:, 0]
    _, _, rows, columns, *kernel = split.shape
    made = weight.new_zeros((groups, within, rows, within, columns, *kernel))
    for place in range(within):
        made[:, place, :, place] = split[:, place]
    return made.reshape(groups, within * rows, within * columns, *kernel)


def _beside(one: Parts, two: Parts) -> tuple[Parts, Parts]:
    """Both on one device: numbers that were made up (the identity) follow those that are stored."""
    device = two[0].device if one[0].device.type == "cpu" else one[0].device
    return (one[0].to(device), one[1].to(device)), (two[0].to(device), two[1].to(device))


# side by side -------------------------------------------------------------------------------


def total(one: Affine, two: Affine) -> Affine | str:
    """`one(x) + two(x)` as one map, or in words why that is none."""
    if (one.space, one.inputs, one.outputs) != (two.space, two.inputs, two.outputs):
        return "they do not work along the same axes"
    if one.stride != two.stride:
        return "their strides differ"
    layouts = [_layout(one, two, dim) for dim in range(one.space)]
    if any(lay is None for lay in layouts):
        return "their paddings do not lay the kernels over one another"
    lay = [layout for layout in layouts if layout is not None]
    groups = math.gcd(one.groups, two.groups)
    kernel = tuple(layout.size for layout in lay)

    def build() -> tuple[Tensor, Tensor]:
        made: Tensor | None = None
        shift = torch.zeros(())
        for which, (weight, bias) in enumerate(_beside(one.build(), two.build())):
            part = (one, two)[which]
            blocks = _blocks(weight, part, groups).flatten(0, 1)
            spread = blocks.new_zeros((*blocks.shape[:2], *kernel))
            spread[(..., *(layout.taps(which) for layout in lay))] = blocks
            made = spread if made is None else made + spread
            shift = shift.to(bias) + bias
        assert made is not None
        return made, shift

    return Affine(
        one.inputs,
        one.outputs,
        kernel,
        one.stride,
        tuple(layout.unit for layout in lay),
        tuple(layout.padding for layout in lay),
        groups,
        one.biased or two.biased,
        build,
    )


@dataclass(frozen=True)
class _Layout:
    """A kernel's taps on the common grid: first place, step and count for each of the two."""

    unit: int
    size: int
    padding: tuple[int, int]
    starts: tuple[int, int]
    steps: tuple[int, int]
    counts: tuple[int, int]

    def taps(self, which: int) -> slice:
        start, step, count = self.starts[which], self.steps[which], self.counts[which]
        return slice(start, start + step * (count - 1) + 1, step)


def _layout(one: Affine, two: Affine, dim: int) -> _Layout | None:
    parts = (one, two)
    before = max(part.padding[dim][0] for part in parts)
    starts = [before - part.padding[dim][0] for part in parts]
    ends = [start + part.reach(dim) for start, part in zip(starts, parts, strict=True)]
    last = max(ends)
    afters = {part.padding[dim][1] + last - end for part, end in zip(parts, ends, strict=True)}
    if len(afters) > 1:
        return None
    several = [part.dilation[dim] for part in parts if part.kernel[dim] > 1]
    unit = math.gcd(*several, *starts) or 1
    return _Layout(
        unit,
        last // unit + 1,
        (before, afters.pop()),
        (starts[0] // unit, starts[1] // unit),
        (max(one.dilation[dim] // unit, 1), max(two.dilation[dim] // unit, 1)),
        (one.kernel[dim], two.kernel[dim]),
    )
