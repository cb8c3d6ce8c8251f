"""Fold batch norm into the convolution or linear layer beside it.

In eval mode batch norm is `y = x * a + c` for each channel, with `a = gamma / sqrt(var + eps)` and
`c = beta - mean * a`. Behind a layer it goes into the layer's output channels (`W' = a W`,
`b' = a b + c`); in front of a layer without padding into its input channels (`W' = W a`,
`b' = b + W c`), exactly up to rounding: the factors are computed in float64 and rounded once.
A weight on a grid takes the factors into its scales, which keeps its codes; where a factor is
negative the grid has to be symmetric.
Jacob et al. (arXiv 1712.05877), section 3.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from laconic.forms import levels
from laconic.program.program import FAKE_LEVELS, FAKE_QUANTIZE, Program

_CONVOLUTIONS = {
    torch.ops.aten.conv1d.default: 1,
    torch.ops.aten.conv2d.default: 2,
    torch.ops.aten.conv3d.default: 3,
    torch.ops.aten.conv1d.padding: 1,
    torch.ops.aten.conv2d.padding: 2,
    torch.ops.aten.conv3d.padding: 3,
}
_TRANSPOSED = {
    torch.ops.aten.conv_transpose1d.default,
    torch.ops.aten.conv_transpose2d.input,
    torch.ops.aten.conv_transpose3d.input,
}
_LINEAR = torch.ops.aten.linear.default
_CONVOLUTION = torch.ops.aten.convolution.default
_BATCH_NORM = torch.ops.aten.batch_norm.default


@dataclass(frozen=True)
class Folding:
    """What was folded.

    Attributes:
        folded: (batch norm's origin or node, name of the weight it went into).
        notes: one sentence for every batch norm that stays.
    """

    folded: Sequence[tuple[str, str]]
    notes: Sequence[str]


def fold_batch_norms(
    program: Program, *, forwards: bool = True, allow: Callable[[str], bool] | None = None
) -> Folding:
    """Fold every batch norm of `program`, which is changed; its tensors are replaced, not written.

    Args:
        program: in eval mode; a clone of the caller's.
        forwards: whether a batch norm may also go into the layer behind it.
        allow: asked with the name of the weight that would change; None allows all.
    """
    folded: list[tuple[str, str]] = []
    notes: list[str] = []
    for node in list(program.graph.nodes):
        if node.target is not _BATCH_NORM:
            continue
        where = str(node.meta.get("origin") or node.name)
        weight, reason = _fold_back(program, node, allow or _everything)
        if weight is None and forwards:
            weight = _fold_forward(program, node, allow or _everything)
        if weight is None:
            notes.append(f"{where}: batch norm stays, because {reason}")
        else:
            folded.append((where, weight))
    if folded:
        program.graph.eliminate_dead_code()
        program.drop_unused()
        program.recompile()
    return Folding(folded, notes)


def scale_and_shift(program: Program, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """float64 `a, c` `[channels]` of a batch norm node; None where its tensors are computed."""
    tensors = [_stored(program, node.args[i]) for i in (1, 2, 3, 4)]
    mean, variance = tensors[2], tensors[3]
    if mean is None or variance is None or bool(node.args[5]):
        return None
    if any(isinstance(node.args[i], fx.Node) and tensors[i - 1] is None for i in (1, 2)):
        return None
    eps: Any = node.args[7]
    scale = (variance.double() + eps).rsqrt()
    if tensors[0] is not None:
        scale = scale * tensors[0].double()
    shift = -mean.double() * scale
    if tensors[1] is not None:
        shift = shift + tensors[1].double()
    return scale, shift


def _everything(name: str) -> bool:
    del name
    return True


# behind a layer -----------------------------------------------------------------------------


def _fold_back(
    program: Program, node: fx.Node, allow: Callable[[str], bool]
) -> tuple[str | None, str]:
    """Name of the weight a batch norm went into, or None and the reason."""
    layer: Any = node.args[0]
    affine = scale_and_shift(program, node)
    if affine is None:
        return None, "it is in training mode or its statistics are not stored tensors"
    if not _is_layer(layer):
        return None, f"it follows {_short(layer)}"
    if layer.target is _LINEAR and len(layer.meta.get("shape", (0, 0))) != 2:
        return None, "it normalises another axis than the linear layer's outputs"
    if len(layer.users) > 1:
        return None, f"{layer.name} is also read without it"
    scale, shift = affine
    weight, grid = _owned(program, layer, 1), None
    if weight is None:
        weight, grid = _on_grid(program, layer, scale)
    if weight is not None and not allow(weight):
        return None, f"{weight} is excluded"
    if weight is None:
        return None, "the layer's weight is shared, computed or on a grid that cannot be scaled"
    if isinstance(_argument(layer, 2), fx.Node) and _stored(program, layer.args[2]) is None:
        return None, "the layer's bias is computed"
    old = program.tensor(weight)
    if grid is not None:
        scale = _scale_grid(program, grid, scale)
    program.set_tensor(weight, (old.double() * _along_outputs(layer, scale, old)).to(old.dtype))
    bias = _stored(program, _argument(layer, 2))
    shift = shift if bias is None else shift + bias.double() * scale
    _set_bias(program, layer, weight, shift.to(old.dtype))
    node.replace_all_uses_with(layer)
    program.graph.erase_node(node)
    return weight, ""


def _is_layer(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    return (
        node.target in _CONVOLUTIONS
        or node.target in _TRANSPOSED
        or node.target in (_LINEAR, _CONVOLUTION)
    )


def _is_transposed(layer: fx.Node) -> bool:
    return layer.target in _TRANSPOSED or (
        layer.target is _CONVOLUTION and bool(_argument(layer, 6))
    )


def _groups(layer: fx.Node) -> int:
    if layer.target is _LINEAR:
        return 1
    position = 8 if layer.target is _CONVOLUTION else 6
    found = _argument(layer, position)
    return 1 if found is None else int(found)


def _along_outputs(layer: fx.Node, scale: Tensor, weight: Tensor) -> Tensor:
    """`scale` `[outputs]` shaped to multiply the weight's output channels."""
    if not _is_transposed(layer):
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    groups, inputs = _groups(layer), weight.shape[0]
    table = scale.reshape(groups, 1, -1).expand(groups, inputs // groups, -1)
    return table.reshape(inputs, -1, *[1] * (weight.ndim - 2))


def _on_grid(program: Program, layer: fx.Node, scale: Tensor) -> tuple[str | None, fx.Node | None]:
    """A layer's float weight behind a grid that can take `scale`: its name and the grid's node."""
    node: Any = layer.args[1]
    if not isinstance(node, fx.Node) or node.target not in (FAKE_QUANTIZE, FAKE_LEVELS):
        return None, None
    axis = node.args[3 if node.target is FAKE_QUANTIZE else 2]
    if len(node.users) > 1 or _is_transposed(layer) or axis not in (None, 0):
        return None, None
    weight = _owned(program, node, 0)
    if weight is None or _owned(program, node, 1) is None:
        return None, None
    fits = _is_symmetric(program, node) or bool((scale >= 0).all())
    return (weight, node) if fits else (None, None)


def _is_symmetric(program: Program, node: fx.Node) -> bool:
    """Whether every value of a grid has its negative on it."""
    if node.target is FAKE_LEVELS:
        held = levels.values(str(node.args[3]))
        return [-value for value in reversed(held)] == list(held)
    zero, ends = _stored(program, node.args[2]), [float(str(end)) for end in node.args[4:6]]
    return sum(ends) == 0 and zero is not None and not bool(zero.any())


def _scale_grid(program: Program, node: fx.Node, scale: Tensor) -> Tensor:
    """Give each output channel the scale that keeps its codes; returns what the weight takes.

    A channel whose factor is too small for a scale becomes zeros; levels without a zero take the
    smallest scale there is.
    """
    uniform = node.target is FAKE_QUANTIZE
    sides: Any = node.args[1 : 3 if uniform else 2]
    held = program.tensor(str(sides[0].target)).detach()
    factors = scale.abs().to(held.device)
    made = held.double() * factors.reshape(-1, *[1] * max(held.ndim - 1, 0))
    tiny = torch.finfo(torch.float32).tiny
    alive = (made >= tiny).reshape(len(factors), -1).all(1)
    if uniform:
        made = torch.where(alive.reshape(-1, *[1] * (made.ndim - 1)), made, held.double())
        zero = program.tensor(str(sides[1].target)).detach()
        program.set_tensor(str(sides[1].target), zero.expand(made.shape).clone())
    program.set_tensor(str(sides[0].target), made.clamp(min=tiny).to(held.dtype))
    for side in sides:
        side.meta["shape"] = tuple(made.shape)
    node.update_arg(3 if uniform else 2, 0)
    return torch.where(alive, scale, torch.zeros_like(scale))


# in front of a layer ------------------------------------------------------------------------


def _fold_forward(program: Program, node: fx.Node, allow: Callable[[str], bool]) -> str | None:
    affine = scale_and_shift(program, node)
    layer = next(iter(node.users), None)
    if affine is None or layer is None or len(node.users) > 1 or not _takes_shift(layer, node):
        return None
    weight = _owned(program, layer, 1)
    given = _argument(layer, 2)
    bias = _stored(program, given)
    if weight is None or not allow(weight) or (isinstance(given, fx.Node) and bias is None):
        return None
    scale, shift = affine
    old = program.tensor(weight)
    groups = _groups(layer)
    shape = (groups, 1, -1, *[1] * (old.ndim - 2))
    grouped = old.double().reshape(groups, -1, *old.shape[1:])
    moved = (grouped * shift.reshape(shape)).flatten(2).sum(2).flatten()
    program.set_tensor(weight, (grouped * scale.reshape(shape)).reshape(old.shape).to(old.dtype))
    total = moved if bias is None else moved + bias.double()
    _set_bias(program, layer, weight, total.to(old.dtype))
    source: Any = node.args[0]
    node.replace_all_uses_with(source)
    program.graph.erase_node(node)
    return weight


def _takes_shift(layer: fx.Node, node: fx.Node) -> bool:
    """Whether a constant added to the layer's input is a constant added to its output."""
    if layer.args[0] is not node:
        return False
    if layer.target is _LINEAR:
        return len(node.meta.get("shape", ())) == 2
    if layer.target not in _CONVOLUTIONS:
        return False
    padding = _argument(layer, 4)
    return (
        padding is None
        or padding == "valid"
        or (padding != "same" and not any([padding] if isinstance(padding, int) else padding))
    )


# tensors ------------------------------------------------------------------------------------


def _argument(node: fx.Node, position: int) -> Any:
    return node.args[position] if position < len(node.args) else None


def _stored(program: Program, node: Any) -> Tensor | None:
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return program.tensor(str(node.target)).detach()
    return None


def _owned(program: Program, layer: fx.Node, position: int) -> str | None:
    """Name of the tensor at `position`, if it is stored, float and nobody else reads it."""
    node: Any = layer.args[position]
    if not isinstance(node, fx.Node) or node.op != "get_attr" or len(node.users) > 1:
        return None
    name = str(node.target)
    readers = [
        n for n in program.graph.nodes if n.op == "get_attr" and n.target == name and n.users
    ]
    tied = name in program.aliases.values()
    floating = program.tensor(name).is_floating_point()
    return name if len(readers) == 1 and floating and not tied else None


def _set_bias(program: Program, layer: fx.Node, weight: str, value: Tensor) -> None:
    """Give the layer a bias of its own."""
    held = _owned(program, layer, 2) if isinstance(_argument(layer, 2), fx.Node) else None
    if held is not None:
        program.set_tensor(held, value)
        return
    path, _, _ = weight.rpartition(".")
    trains = program.tensor(weight).requires_grad
    name = program.add_tensor(
        f"{path}.bias" if path else "bias", nn.Parameter(value, requires_grad=trains)
    )
    holder: Any = layer.args[1]
    with program.graph.inserting_after(holder):
        made = program.graph.get_attr(name)
    made.meta = {"origin": holder.meta.get("origin", ""), "shape": tuple(value.shape),
                 "dtype": value.dtype}  # fmt: skip
    layer.args = (*layer.args[:2], made, *layer.args[3:])


def _short(node: Any) -> str:
    if not isinstance(node, fx.Node):
        return "a constant"
    return node.name if node.op == "call_function" else f"the {node.op} {node.target}"
