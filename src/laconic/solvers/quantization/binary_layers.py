"""What a network with codes of one bit needs in its graph, put in as ordinary nodes.

* Weights (Rastegari et al., "XNOR-Net", arXiv 1603.05279): signs times one scale for each output
  channel, `mean |w|` at first. They are centred and brought to unit variance before their sign is
  taken, so that signs are balanced and weights change sides easily (Qin et al., "IR-Net", arXiv
  1909.10788). The gradient goes straight through, or through `k tanh(t w)`, which sharpens.
* Activations: signs of `x - shift` times a scale; a shift for each channel and the scale train (Liu
  et al., "ReActNet", arXiv 2003.03488; Tu et al., "AdaBin", arXiv 2208.08084).
* Around them, in floats: PReLU in place of ReLU (ReActNet), and a shortcut around every convolution
  (Liu et al., "Bi-Real Net", arXiv 1808.00278).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from laconic.program.normalize import base_name
from laconic.program.program import FAKE_LEVELS, Program
from laconic.solvers.quantization import insertion
from laconic.solvers.quantization.learned_steps import LearnedStep, as_buffer
from laconic.solvers.quantization.placement import Place
from laconic.solvers.quantization.weight_sites import WeightSite

Estimator = Literal["straight", "tanh"]
SHARPNESS = ("binary.sharpness", "binary.height")
"""t and k of `k tanh(t x)`, in a graph that has them."""
_SLOPE = 0.25
_EPS = 1e-12
_MOVES = {"slice", "pad", "constant_pad_nd", "reshape", "view"}
_aten = torch.ops.aten
_LIKE = torch.ops.aten.type_as.default


@dataclass(frozen=True, kw_only=True)
class BinaryWeight:
    """A weight of one bit while it trains; names of nodes and tensors.

    Attributes:
        weight: the master weight.
        scale: its scales.
        axis: what they belong to.
        node: the quantisation node that is used in the end.
        trained: the node that takes its place in training.
        count: how many weights share a scale.
    """

    weight: str
    scale: str
    axis: int | None
    node: str
    trained: str
    count: int

    @property
    def step(self) -> LearnedStep:
        """Its scales as steps that learn."""
        return LearnedStep(
            node=self.node, scale=self.scale, weight=None, gradient=(self.count**-0.5,),
            ends=((0, 1),),
        )  # fmt: skip


# weights ----------------------------------------------------------------------------------


def insert_weight(
    program: Program, site: WeightSite, estimator: Estimator, *, balanced: bool
) -> BinaryWeight:
    """Give a weight one bit: signs times scales that train."""
    weight = program.tensor(site.name).detach()
    axis = None if site.axis is None else site.axis % weight.ndim
    dims = [d for d in range(weight.ndim) if d != axis]
    mean = weight.abs().mean(dims)
    scale = torch.where(mean > 0, mean, mean.max().clamp(min=torch.finfo(mean.dtype).tiny))
    held = nn.Parameter(scale.float())
    node = insertion.insert_levels(program, site, axis, held, "binary")
    side: Any = node.args[1]
    one = _constant(program, "binary.one", node)
    graph = program.graph
    with graph.inserting_before(node):
        call = graph.call_function
        source: Any = node.args[0]
        flat: fx.Node = _balanced(graph, source, dims) if balanced else source
        code = call(FAKE_LEVELS, (call(_aten.detach.default, (flat,)), one, None, "binary"))
        soft = _soft(program, flat, node) if estimator == "tanh" else flat
        zero = call(_aten.sub.Tensor, (soft, call(_aten.detach.default, (soft,))))
        shape = [1 if d != axis else -1 for d in range(weight.ndim)]
        wide = call(_aten.reshape.default, (side, shape))
        made = call(_aten.mul.Tensor, (call(_aten.add.Tensor, (code, zero)), wide))
    node.replace_all_uses_with(made)
    return BinaryWeight(
        weight=site.name,
        scale=str(side.target),
        axis=axis,
        node=node.name,
        trained=made.name,
        count=weight.numel() // max(scale.numel(), 1),
    )


def _balanced(graph: fx.Graph, weight: fx.Node, dims: Sequence[int]) -> fx.Node:
    """Mean 0 and variance 1 over `dims`."""
    call = graph.call_function
    centred = call(_aten.sub.Tensor, (weight, call(_aten.mean.dim, (weight, list(dims), True))))
    square = call(_aten.mean.dim, (call(_aten.mul.Tensor, (centred, centred)), list(dims), True))
    root = call(_aten.rsqrt.default, (call(_aten.add.Scalar, (square, _EPS)),))
    return call(_aten.mul.Tensor, (centred, root))


def balanced(weight: Tensor, axis: int | None) -> Tensor:
    """Mean 0 and variance 1 of each slice of `axis`; zeros where a slice is constant."""
    dims = [d for d in range(weight.ndim) if d != axis]
    centred = weight - weight.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + _EPS).rsqrt()


# activations ------------------------------------------------------------------------------


def insert_activation(
    program: Program, place: Place, shift: Tensor, scale: Tensor, estimator: Estimator
) -> LearnedStep:
    """Give an activation one bit: signs of `x - shift` times a scale, both train.

    Args:
        program: to change; recompile it afterwards.
        place: where.
        shift: `[channels]`.
        scale: `[]`, positive.
        estimator: what the gradient goes through.
    """
    node = insertion.insert_activation_levels(program, place, nn.Parameter(scale), "binary")
    channels = program.add_tensor(f"activations.{place.name}_shift", nn.Parameter(shift))
    source: Any = node.args[0]
    graph = program.graph
    with graph.inserting_before(node):
        wide = _along(graph, channels, channel_axis(place), source)
        moved = graph.call_function(_aten.sub.Tensor, (source, wide))
        soft = _soft(program, moved, node) if estimator == "tanh" else moved
    node.update_arg(0, soft)
    side: Any = node.args[1]
    sharing = math.prod(source.meta["shape"]) / program.batch_size()
    return LearnedStep(
        node=node.name,
        scale=str(side.target),
        weight=None,
        gradient=(sharing**-0.5,),
        ends=((0, 1),),
    )


def channel_axis(place: Place) -> int:
    """The dimension of channels of what a place holds."""
    return 1 if any(base_name(user).startswith("conv") for user in place.users) else -1


def _along(graph: fx.Graph, name: str, axis: int, like: fx.Node) -> fx.Node:
    """A stored vector, shaped to broadcast along `axis` of a node, in its precision.

    So what is half precision under autocast stays half precision while it trains.
    """
    shape = [1] * len(like.meta["shape"])
    shape[axis] = -1
    wide = graph.call_function(_aten.reshape.default, (graph.get_attr(name), shape))
    return graph.call_function(_LIKE, (wide, like))


def _soft(program: Program, x: fx.Node, before: fx.Node) -> fx.Node:
    """`k tanh(t x)`: has the signs of x."""
    graph = program.graph
    sharp, height = (_constant(program, name, before) for name in SHARPNESS)
    call = graph.call_function
    inner = call(_aten.tanh.default, (call(_aten.mul.Tensor, (x, sharp)),))
    return call(_aten.mul.Tensor, (inner, height))


def _constant(program: Program, name: str, before: fx.Node) -> fx.Node:
    """A stored 1 on the program's device, read in front of a node."""
    if name not in dict(program.named_buffers()):
        like = next(tensor for _, tensor in program.tensors())
        program.add_tensor(name, torch.ones((), device=like.device))
    with program.graph.inserting_before(before):
        return program.graph.get_attr(name)


# around them ------------------------------------------------------------------------------


def soften(program: Program, relu: fx.Node) -> None:
    """A PReLU with a slope for each channel (dimension 1) in place of a ReLU.

    ReActNet shifts its PReLU on both sides. Here the bias of the layer or norm in front and the
    shift of the sign behind say the same.
    """
    source: Any = relu.args[0]
    like = next(tensor for _, tensor in program.tensors())
    slope = torch.full((relu.meta["shape"][1],), _SLOPE, device=like.device)
    name = program.add_tensor(f"activations.{relu.name}_slope", nn.Parameter(slope))
    graph = program.graph
    with graph.inserting_before(relu):
        held = graph.call_function(_LIKE, (graph.get_attr(name), source))
        made = graph.call_function(_aten.prelu.default, (source, held))
    made.meta = dict(relu.meta)
    relu.replace_all_uses_with(made)
    graph.erase_node(relu)


def add_shortcuts(program: Program, places: Sequence[Place]) -> int:
    """Lead each convolution's input past it, where both have one shape; how many were added.

    A sum that follows already takes the nearest input in place of the earlier one that has been
    led past before. The program is changed; recompile it afterwards.
    """
    led: set[fx.Node] = set()
    count = 0
    for place in places:
        for layer in place.users:
            end = _end(layer)
            if end is None:
                continue
            total = next(iter(end.users))
            if base_name(total) == "add" and len(end.users) == 1:
                count += _nearer(total, end, place.source, led)
            elif (found := _same_shape(place.source, end)) is not None:
                _lead(program, end, found)
                led.add(found)
                count += 1
    return count


def _end(layer: fx.Node) -> fx.Node | None:
    """The batch norm behind a convolution."""
    user = next(iter(layer.users), None)
    one = base_name(layer).startswith("conv") and len(layer.users) == 1
    return user if one and user is not None and base_name(user) == "batch_norm" else None


def _nearer(total: fx.Node, end: fx.Node, source: fx.Node, led: set[fx.Node]) -> int:
    others = [a for a in total.args[:2] if a is not end]
    if len(others) != 1 or others[0] not in led or others[0] is source:
        return 0
    if source.meta["shape"] != end.meta["shape"]:
        return 0
    total.args = tuple(source if a is others[0] else a for a in total.args)
    return 1


def _same_shape(source: fx.Node, end: fx.Node) -> fx.Node | None:
    """`source`, or what the graph makes of it by moving values alone, in the shape of `end`."""
    stack, seen = [source], {source}
    while stack:
        here = stack.pop(0)
        if here.meta["shape"] == end.meta["shape"]:
            return here
        for user in here.users:
            if base_name(user) in _MOVES and user.all_input_nodes == [here] and user not in seen:
                seen.add(user)
                stack.append(user)
    return None


def _lead(program: Program, end: fx.Node, shortcut: fx.Node) -> None:
    """Add `shortcut` to `end`; what makes it moves in front."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    chain: list[fx.Node] = []
    here = shortcut
    while order[here] > order[end]:
        chain.append(here)
        here = here.all_input_nodes[0]
    for node in reversed(chain):
        end.prepend(node)
    users = list(end.users)
    with program.graph.inserting_after(end):
        made = program.graph.call_function(_aten.add.Tensor, (end, shortcut))
    made.meta = dict(end.meta)
    for user in users:
        user.replace_input_with(end, made)


# the end ----------------------------------------------------------------------------------


@torch.no_grad()
def settle(
    program: Program, weights: Sequence[BinaryWeight], steps: Sequence[LearnedStep], *, even: bool
) -> None:
    """Leave one quantisation node for each weight and activation: the same values.

    `even`: whether weights were balanced.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    for held in weights:
        weight = program.tensor(held.weight).detach()
        scale = program.tensor(held.scale).detach()
        flat = balanced(weight, held.axis) if even else weight
        shape = [1 if d != held.axis else -1 for d in range(weight.ndim)]
        if even:
            flat = flat * scale.reshape(shape)
        program.set_tensor(held.weight, flat.contiguous())
        trained, node = nodes[held.trained], nodes[held.node]
        trained.replace_all_uses_with(node)
        as_buffer(program, held.scale)
    for step in steps:
        node = nodes[step.node]
        soft: Any = node.args[0]
        if base_name(soft) == "mul" and base_name(soft.args[0]) == "tanh":
            node.update_arg(0, soft.args[0].args[0].args[0])
        as_buffer(program, step.scale)
    for node in nodes.values():
        source: Any = node.args[0] if node.target is _LIKE else None
        while source is not None and base_name(source) == "reshape":
            source = source.args[0]
        if source is not None and str(source.target).startswith("activations."):
            node.replace_all_uses_with(node.args[0])  # pyright: ignore[reportArgumentType]
    program.graph.eliminate_dead_code()
    program.recompile()
