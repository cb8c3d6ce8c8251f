"""Normalisation: parameters go with the axis they stand on.

Statistics over an axis that shrinks are taken over what is left of it.
"""

from torch import fx

from laconic.program.axes import Atom, product
from laconic.program.equations import Arguments, Dims, Equations, Row

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


def per_channel(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Batch and instance norm: parameters and statistics per channel (dimension 1)."""
    x = see.dims(node.args[0])
    for name in _PER_CHANNEL:
        for term in see.dims(a.get(name)):
            see.same(x[1], term, node)
    return x


def native_per_channel(see: Equations, node: fx.Node, a: Arguments) -> list[Dims]:
    """Batch norm that also returns (empty) statistics of the batch."""
    x = per_channel(see, node, a)
    return [x, *(see.rigid(node, "statistics", *shape) for shape in node.meta["shape"][1:])]


def layer_norm(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Layer and RMS norm: parameters over the trailing `normalized_shape`."""
    x = see.dims(a["input"])
    count = len(a["normalized_shape"])
    for name in ("weight", "bias"):
        for mine, term in zip(x[-count:], see.dims(a.get(name)), strict=False):
            see.same(mine, term, node)
    see.sizes(node, "normalized_shape", x[-count:])
    return x


def native_layer_norm(see: Equations, node: fx.Node, a: Arguments) -> list[Dims]:
    """Layer norm that also returns mean and deviation."""
    x = layer_norm(see, node, a)
    count = len(a["normalized_shape"])
    small = tuple(Atom(1) if place >= len(x) - count else term for place, term in enumerate(x))
    return [x, small, small]


def group_norm(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Channels (dimension 1) = groups x channels per group; parameters per channel."""
    x = see.dims(a["input"])
    for name in ("weight", "bias"):
        for term in see.dims(a.get(name)):
            see.same(x[1], term, node)
    groups = Atom(a["num_groups"], hint="groups")
    see.same(x[1], product(groups, Atom(x[1].size // groups.size, hint="per_group")), node)
    see.size(node, "num_groups", groups)
    return x


def weight_norm(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Weight norm, g * v / norm(v), the norm over all dimensions but `dim`."""
    return see.broadcast(node, see.dims(a["v"]), see.dims(a["g"]))


ROWS: dict[str, Row] = {
    "aten.batch_norm": per_channel,
    "aten.instance_norm": per_channel,
    "aten._native_batch_norm_legit_no_training": native_per_channel,
    "aten.layer_norm": layer_norm,
    "aten.rms_norm": layer_norm,
    "aten.native_layer_norm": native_layer_norm,
    "aten.group_norm": group_norm,
    "aten._weight_norm": weight_norm,
}
