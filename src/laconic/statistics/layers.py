"""Weights that multiply activations, seen as one linear map from rows of columns to rows.

A linear layer and a convolution are the same thing here: every output position is `W` times a row
of input columns, plus a bias. For a convolution the columns are the unfolded patch, in the order of
`weight.flatten(1)`: channel, then kernel row, then kernel column.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from laconic.program.equations import arguments, operator_name
from laconic.program.program import Program

_PLAIN = {"aten.linear": ("input", "weight", "bias"), "aten.addmm": ("mat1", "mat2", "self")}
_PRODUCTS = {"aten.mm", "aten.matmul"}
_CONVOLUTIONS = {"aten.convolution": 0, "aten.conv1d": 1, "aten.conv2d": 2}
WORK = 2e10
"""Multiply-adds that the second moments of one layer may cost."""
ROWS = 131_072
"""More rows than that make no fit better."""


@dataclass(frozen=True)
class Layer:
    """A node that applies a stored weight.

    Attributes:
        node, source: the operator, and the node that gives its input.
        weight, bias: names of the stored tensors; no bias is None.
        in_dim, out_dim: which dimensions of the weight are columns and rows.
        space: spatial dimensions of a convolution, 0 for a linear layer.
        groups: convolution groups; only 1 has one set of columns.
        shared: several nodes read the weight, or the bias.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    in_dim: int
    out_dim: int
    space: int = 0
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    shared: bool = False

    @property
    def taps(self) -> int:
        """Columns per input channel."""
        return int(torch.Size(self.kernel).numel())

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as `[out, columns]`."""
        return weight.flatten(1) if self.space or self.in_dim == 1 else weight.T

    def weight_from(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrix`, in the dtype of `like`: `[out, columns]` → the weight."""
        turned = matrix if self.space or self.in_dim == 1 else matrix.T
        shape = (len(matrix), matrix.shape[1] // self.taps, *self.kernel) if self.space else None
        return turned.reshape(shape or turned.shape).to(like.dtype).contiguous()

    def channel_axis(self, value: Tensor) -> int:
        """Which dimension of the output (or the input) holds the channels."""
        return value.ndim - 1 - self.space

    def positions(self, output: Tensor) -> int:
        """How many rows the output has, over all samples."""
        return output.numel() // output.shape[self.channel_axis(output)]

    def input_positions(self, x: Tensor) -> int:
        """How many rows the output for input `x` has, over all samples."""
        places = x.numel() // x.shape[-1] if not self.space else x.shape[0]
        for dim in range(self.space):
            reach = self.dilation[dim] * (self.kernel[dim] - 1) + 1
            room = x.shape[2 + dim] + sum(self.padding[dim]) - reach
            places *= room // self.stride[dim] + 1
        return places

    def rows_out(self, output: Tensor, pick: Tensor | None) -> Tensor:
        """`[positions, out]` of an output-shaped tensor; `pick` selects positions."""
        rows = output.movedim(self.channel_axis(output), -1).flatten(0, -2)
        return rows if pick is None else rows[pick]

    def rows_in(self, x: Tensor, pick: Tensor | None) -> Tensor:
        """`[positions, columns]` of the input, in the order of `rows_out`."""
        if not self.space:
            rows = x.flatten(0, -2)
            return rows if pick is None else rows[pick]
        pads = [side for pair in reversed(self.padding) for side in pair]
        windows = F.pad(x, pads) if any(pads) else x
        for dim, (size, step, gap) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            windows = windows.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
        order = (0, *range(2, 2 + self.space), 1, *range(2 + self.space, windows.ndim))
        windows = windows.permute(order)  # [n, *positions, channels, *kernel], still a view
        if pick is None:
            return windows.flatten(0, self.space).flatten(1)
        places = torch.unravel_index(pick, windows.shape[: 1 + self.space])
        return windows[places].flatten(1)


def layers(program: Program) -> list[Layer]:
    """Every node that multiplies an activation by a stored float weight, in graph order."""
    found = [layer for node in program.graph.nodes if (layer := _layer(program, node))]
    readers: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            name = program.aliases.get(str(node.target), str(node.target))
            readers[name] = readers.get(name, 0) + len(node.users)
    tied = set(program.aliases.values())
    return [
        _marked(layer, layer.weight in tied or any(readers.get(n or "", 0) > 1
                                                   for n in (layer.weight, layer.bias)))
        for layer in found
    ]  # fmt: skip


def pick(positions: int, columns: int, batches: int, seed: int) -> Tensor | None:
    """Ascending positions of one batch that serve as rows, or None for all of them.

    Enough rows in all batches together for `columns` unknowns, as many as `WORK` multiply-adds
    afford. The same for every batch of one shape, so that halves of the data merge exactly.
    """
    rows = min(max(8 * columns, int(WORK / (2 * columns**2))), ROWS)
    wanted = -(-rows // max(batches, 1))
    if positions <= wanted:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(positions, generator=generator)[:wanted].sort().values


def _marked(layer: Layer, shared: bool) -> Layer:
    return replace(layer, shared=True) if shared else layer


def _layer(program: Program, node: fx.Node) -> Layer | None:
    if node.op != "call_function":
        return None
    name = operator_name(node)
    if name in _PLAIN:
        given = arguments(node)
        if any(given.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            return None  # the stored weight is not the map
        source, weight, bias = (given[slot] for slot in _PLAIN[name])
        in_dim = 1 if name == "aten.linear" else 0
        return _plain(program, node, source, weight, bias, in_dim)
    if name in _PRODUCTS and isinstance(node.args[1], fx.Node):
        return _plain(program, node, node.args[0], node.args[1], None, 0)
    if name in _CONVOLUTIONS and not arguments(node).get("transposed"):
        return _convolution(program, node)
    return None


def _plain(
    program: Program, node: fx.Node, source: Any, weight: Any, bias: Any, in_dim: int
) -> Layer | None:
    held = _stored(program, weight, 2)
    if held is None or not isinstance(source, fx.Node) or source.op == "get_attr":
        return None
    kept = _stored(program, bias, 1)
    if bias is not None and kept is None:
        return None
    return Layer(node, source, held, kept, in_dim, 1 - in_dim)


def _convolution(program: Program, node: fx.Node) -> Layer | None:
    a = arguments(node)
    held, kept = _stored(program, a["weight"], None), _stored(program, a["bias"], 1)
    source = a["input"]
    if held is None or not isinstance(source, fx.Node) or (a["bias"] is not None and kept is None):
        return None
    shape = program.tensor(held).shape
    space = len(shape) - 2
    if space > 2 or len(source.meta["shape"]) != len(shape):
        return None
    dilation = _each(a["dilation"], space)
    return Layer(
        node,
        source,
        held,
        kept,
        in_dim=1,
        out_dim=0,
        space=space,
        groups=int(a["groups"]),
        stride=_each(a["stride"], space),
        padding=_padding(a["padding"], shape[2:], dilation),
        dilation=dilation,
        kernel=tuple(shape[2:]),
    )


def _stored(program: Program, value: Any, ndim: int | None) -> str | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    name = program.aliases.get(str(value.target), str(value.target))
    tensor = program.tensor(name)
    fits = tensor.is_floating_point() and ndim in (None, tensor.ndim)
    return name if fits else None


def _each(value: Sequence[int], space: int) -> tuple[int, ...]:
    held = tuple(int(v) for v in value)
    return held * space if len(held) == 1 else held


def _padding(
    value: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        totals = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert not isinstance(value, str)
    return tuple((side, side) for side in _each(value, len(kernel)))
