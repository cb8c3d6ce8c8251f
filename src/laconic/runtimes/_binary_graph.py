"""Find layers of signs in a graph and let our kernel compute them: one operator for each.

A convolution (or linear layer) whose weight and whose input both stand on the binary levels of one
scale is `sum of XNORs * scales + bias`. `laconic::binary_layer` computes that; what is compiled
around it stays what it was.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from laconic.forms import levels
from laconic.program.program import FAKE_LEVELS, LEVELS
from laconic.runtimes._binary import BinaryLayer
from laconic.runtimes._export import attribute, fetch, is_tensor

_LEAST_CHANNELS = 32  # with fewer, half of a word is empty and floats are as fast
aten: Any = torch.ops.aten


@torch.library.custom_op("laconic::binary_layer", mutates_args=())
def binary_layer(
    x: Tensor, weights: Tensor, scale: Tensor, bias: Tensor | None, outputs: int,
    kernel: Sequence[int], stride: int, padding: int, threads: int,
) -> Tensor:  # fmt: skip
    """A layer of signs (see `BinaryLayer`): `x` float32, `weights` packed.

    `[batch, channels]` → `[batch, outputs]`, or images, channels last.
    """
    del outputs
    high, wide = kernel
    layer = BinaryLayer(weights, scale, bias, None, x.shape[1], (high, wide), stride, padding)
    return layer(x, threads)


@binary_layer.register_fake
def _(
    x: Tensor, weights: Tensor, scale: Tensor, bias: Tensor | None, outputs: int,
    kernel: Sequence[int], stride: int, padding: int, threads: int,
) -> Tensor:  # fmt: skip
    del weights, scale, bias, threads
    if x.ndim == 2:
        return x.new_empty(x.shape[0], outputs)
    high, wide = (
        (size + 2 * padding - taps) // stride + 1
        for size, taps in zip(x.shape[2:], kernel, strict=True)
    )
    return x.new_empty(x.shape[0], high, wide, outputs).permute(0, 3, 1, 2)


def replace_binary(module: fx.GraphModule, threads: int) -> int:
    """Put `laconic::binary_layer` where a layer of signs stands; returns how many there were.

    Its tensors are looked up and packed; the module is changed. `threads` is compiled in.

    Raises:
        MissingExtra: there are such layers and no C compiler.
    """
    done = 0
    for node in list(module.graph.nodes):
        found = _layer(module, node)
        if found is None:
            continue
        source, codes, scale, stride, padding = found
        bias: Any = node.args[2] if len(node.args) > 2 else None
        held = None if bias is None else fetch(module, bias.target).detach()
        layer = BinaryLayer.of(codes, scale, held, None, stride, padding)
        with module.graph.inserting_before(node):
            sides = [
                None if tensor is None else attribute(module, f"{node.name}_{role}", tensor)
                for role, tensor in (
                    ("bits", layer.weights), ("scale", layer.scale), ("bias", layer.bias)
                )
            ]  # fmt: skip
            made = module.graph.call_function(
                torch.ops.laconic.binary_layer.default,
                (source, *sides, len(layer.scale), list(layer.kernel), stride, padding, threads),
            )
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
        done += 1
    module.graph.eliminate_dead_code()
    return done


def _layer(
    module: fx.GraphModule, node: fx.Node
) -> tuple[fx.Node, Tensor, Tensor, int, int] | None:
    """(what goes in, codes, scale of a sum, stride, padding) of a layer of signs, else None."""
    space = {aten.conv2d.default: 2, aten.linear.default: 0}.get(node.target)
    arguments: Any = node.args
    if space is None or not _is_binary(arguments[0]):
        return None
    signs = arguments[0]
    stride, padding, dilation, groups = 1, 0, 1, 1
    if space:
        given = dict(zip(("stride", "padding", "dilation"), arguments[3:6], strict=False))
        pairs = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], **given}
        if any(len(set(pair)) > 1 for pair in pairs.values()):
            return None
        stride, padding, dilation = (int(pair[0]) for pair in pairs.values())
        groups = arguments[6] if len(arguments) > 6 else 1
    shape = signs.meta.get("shape", ())
    if dilation != 1 or groups != 1 or len(shape) != 2 + space or shape[1] < _LEAST_CHANNELS:
        return None
    found = _codes(module, arguments[1])
    if found is None or signs.meta.get("dtype", torch.float32) is not torch.float32:
        return None
    codes, scale = found
    whole = scale * fetch(module, signs.args[1].target).detach()
    return signs.args[0], codes, whole, stride, padding


def _is_binary(node: Any) -> bool:
    """Whether it gives the signs of an activation, with one scale for the whole tensor."""
    if not isinstance(node, fx.Node) or node.target is not FAKE_LEVELS:
        return False
    x, scale, axis, name = node.args
    return name == "binary" and axis is None and not is_tensor(x) and is_tensor(scale)


def _codes(module: fx.GraphModule, node: Any) -> tuple[Tensor, Tensor] | None:
    """Codes and scale `[]` or `[outputs]` of a stored binary weight."""
    if not isinstance(node, fx.Node) or node.target not in (FAKE_LEVELS, LEVELS):
        return None
    arguments: Any = node.args
    held, scales, axis, name = arguments
    if name != "binary" or not is_tensor(held) or axis not in (None, 0):
        return None
    tensor, scale = (fetch(module, part.target).detach() for part in (held, scales))
    if scale.ndim > 1:
        return None
    return (tensor if node.target is LEVELS else levels.encode(tensor, scale, axis, name)), scale
