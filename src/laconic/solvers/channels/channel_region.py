"""Where the channels of a group run: who writes them, what each channel passes, who reads them.

Two channels of a group are the same function if everything that writes them and everything on
their way has the same numbers for both, as long as every operator on the way treats each channel
for itself and all of them alike. If, besides, every operator on the way gives `c f(x)` for `c x`
(ReLU, pooling, sums of such channels, ...), one channel may be a multiple `c > 0` of the other.
Wang & Srinivas 2015 (arXiv 1507.06149), Kim et al. 2020, "Neuron Merging" (2010.13160).
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from laconic.program import axes
from laconic.program.equations import Dims, arguments, operator_name
from laconic.program.groups import Group, Groups, Member
from laconic.program.program import Program
from laconic.solvers.recalibrate import Norm, norms
from laconic.statistics.layers import Layer, layers

_MOVES = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "expand", "contiguous", "clone", "cat", "split", "split_with_sizes", "chunk", "unbind",
    "getitem", "slice", "select", "constant_pad_nd", "pad", "dropout", "feature_dropout", "repeat",
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum", "amax",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d",
}  # fmt: skip
"""Operators that work along other dimensions, and give `c f(x)` for `c x`."""
_HOMOGENEOUS = _MOVES | {"relu", "leaky_relu", "prelu", "abs", "neg", "detach", "alias"}
_ALIKE = {"batch_norm", "prelu", "hardswish", "hardsigmoid", "hardtanh", "relu6", "elu", "selu"}
_PIECES = {"getitem", "slice"}


@dataclass(frozen=True)
class Writer:
    """A layer whose output rows are channels of the group, and the batch norm behind it, if any."""

    layer: Layer
    member: Member
    norm: Norm | None


@dataclass(frozen=True)
class Region:
    """The way of a group's channels.

    Attributes:
        writers: layers that write the channels.
        readers: layers that read them, with the member that says which columns.
        others: members with one entry for each channel that has to be equal for two channels to be
            the same: norms, slopes, tables, depthwise filters.
        homogeneous: whether a multiple of a channel stays one up to the readers.
        filters: depthwise convolutions on the way.
        scalable: whether it stays one if the biases of the filters are multiplied as well.
    """

    group: Group
    writers: tuple[Writer, ...]
    readers: tuple[tuple[Layer, Member], ...]
    others: tuple[Member, ...]
    homogeneous: bool
    filters: tuple[Layer, ...] = ()
    scalable: bool = False


def _name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return operator_name(node).removeprefix("aten.")


class _Refused(Exception):
    """Why the channels of a group cannot be followed."""


class Regions:
    """Finds the regions of one program's groups."""

    def __init__(self, program: Program, groups: Groups) -> None:
        self.program = program
        self._terms = groups.equations.terms
        self._layers = {layer.node: layer for layer in layers(program)}
        self._norms = {norm.node: norm for norm in norms(program)}
        self._uses: dict[str, int] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                name = program.aliases.get(str(node.target), str(node.target))
                self._uses[name] = self._uses.get(name, 0) + len(node.users)

    def of(self, group: Group) -> Region | str:
        """The region of a group, or in words why there is none."""
        try:
            return self._follow(group)
        except _Refused as refused:
            return str(refused)

    def _follow(self, group: Group) -> Region:
        writers: list[Writer] = []
        readers: list[tuple[Layer, Member]] = []
        homogeneous = scalable = True
        inner: list[fx.Node] = []
        members = {(m.tensor, m.dim): m for m in group.members}
        carriers = [n for n in self._terms if n.op != "get_attr" and self._carries(n, group)]
        users = {user for node in carriers for user in node.users}
        for node in self.program.graph.nodes:
            if node not in users and node not in carriers:
                continue
            if node not in carriers and self._is_other_piece(node):
                continue
            layer = self._layers.get(node)
            into = members.get((layer.weight, layer.in_dim)) if layer is not None else None
            out = members.get((layer.weight, layer.out_dim)) if layer is not None else None
            reads = any(s in carriers for s in node.all_input_nodes)
            if layer is not None and into and self._uses.get(layer.bias or "", 0) > 1:
                raise _Refused(f"{layer.bias} is used by several nodes")
            if layer is not None and layer.shared and (into or out):
                raise _Refused(f"{layer.weight} is used by several nodes")
            if layer is not None and into and not out and layer.groups == 1:
                readers.append((layer, into))
            elif layer is not None and out and not reads:
                writers.append(Writer(layer, out, self._norm_behind(layer)))
            else:
                inner.append(node)
        placed = {w.norm.node for w in writers if w.norm is not None}
        for node in inner:
            self._passes(node, group)
            if node not in placed:
                plain = self._is_homogeneous(node, carriers)
                homogeneous = homogeneous and plain
                scalable = scalable and (plain or node in self._layers)
        if not writers or not readers:
            raise _Refused("no layer writes it" if not writers else "no layer reads it")
        others = self._others(group, writers, readers)
        odd = {member.tensor for member in others if not self._multiplies(member)}
        filters = tuple(self._layers[node] for node in inner if node in self._layers)
        return Region(
            group, tuple(writers), tuple(readers), others, homogeneous and not odd, filters,
            scalable and odd <= {layer.bias for layer in filters},
        )  # fmt: skip

    def _dims(self, node: fx.Node) -> list[Dims]:
        """Terms of every dimension, for each output of a node."""
        found = self._terms.get(node, ())
        return found if isinstance(found, list) else [found]

    def _carries(self, node: fx.Node, group: Group) -> bool:
        terms = [term for dims in self._dims(node) for term in dims]
        return any(group.atom in axes.atoms(term) for term in terms)

    def _is_other_piece(self, node: fx.Node) -> bool:
        """Whether a node that does not carry the group only picks what stands beside it."""
        picks = node.op == "call_function" and _name(node) in _PIECES
        return picks and node in self._terms

    def _norm_behind(self, layer: Layer) -> Norm | None:
        """A batch norm that is all that reads the layer, channel by channel."""
        user = next(iter(layer.node.users), None)
        norm = self._norms.get(user) if user is not None and len(layer.node.users) == 1 else None
        flat = layer.space > 0 or len(layer.node.meta["shape"]) == 2
        return norm if norm is not None and flat and not norm.shared else None

    def _passes(self, node: fx.Node, group: Group) -> None:
        """Refuse an operator that does not treat every channel for itself and all alike."""
        place = f"{node.name} ({node.meta.get('origin') or 'top level'})"
        if node.op != "call_function":
            raise _Refused(f"{place} reads it")
        name = _name(node)
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        known = pointwise or name in _MOVES | _ALIKE
        layer = self._layers.get(node)
        depthwise = layer is not None and layer.groups > 1 and self._is_depthwise(layer)
        if not known and not depthwise:
            raise _Refused(f"{place} mixes its channels or treats them unlike")
        for entry in self._dims(node):
            times = sum(list(axes.atoms(term)).count(group.atom) for term in entry)
            if times > 1 and not any(isinstance(axes.resolve(t), axes.Sum) for t in entry):
                raise _Refused(f"{place} has it in two dimensions")
        if not self._carries(node, group):
            raise _Refused(f"{place} reduces over it")

    def _is_depthwise(self, layer: Layer) -> bool:
        shape = self.program.tensor(layer.weight).shape
        return shape[0] == layer.groups and shape[1] == 1

    def _is_homogeneous(self, node: fx.Node, carriers: list[fx.Node]) -> bool:
        name = _name(node)
        if name in ("constant_pad_nd", "pad"):
            return not arguments(node)["value"]
        if name in _HOMOGENEOUS:
            return True
        layer = self._layers.get(node)
        if layer is not None:
            return layer.bias is None
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        carried = sum(a in carriers for a in operands)
        if name in ("add", "sub"):
            return len(operands) == 2 == carried
        if name in ("mul", "div"):
            return carried == 1 and operands[0] in carriers
        return False

    def _others(
        self, group: Group, writers: list[Writer], readers: list[tuple[Layer, Member]]
    ) -> tuple[Member, ...]:
        """Members that are neither rows nor columns nor a norm that a writer takes in."""
        taken = {(w.layer.weight, w.layer.out_dim) for w in writers}
        taken |= {(layer.weight, layer.in_dim) for layer, _ in readers}
        names = {w.layer.bias for w in writers}
        for writer in writers:
            if writer.norm is not None:
                n = writer.norm
                names |= {n.weight, n.bias, n.mean, n.variance}
        rest = [m for m in group.members if (m.tensor, m.dim) not in taken]
        return tuple(m for m in rest if m.tensor not in names)

    def _multiplies(self, member: Member) -> bool:
        """Whether a stored tensor only ever multiplies the channels."""
        users = [
            user
            for node in self.program.graph.nodes
            if node.op == "get_attr" and node.target == member.tensor
            for user in node.users
        ]
        depthwise = {n for n, layer in self._layers.items() if layer.weight == member.tensor}
        names = {_name(user) for user in users if user not in depthwise}
        return names <= {"mul", "prelu"}


# signatures ---------------------------------------------------------------------------------


def rows(program: Program, region: Region) -> Tensor:
    """What writes each channel, batch norm taken in: float64 `[size, numbers]`.

    Numbers of different writers stand side by side; two channels whose rows are the same, or
    multiples of one another, are written the same, or as multiples.
    """
    return torch.cat([_written(program, region.group, writer) for writer in region.writers], 1)


def _written(program: Program, group: Group, writer: Writer) -> Tensor:
    layer = writer.layer
    weight = layer.matrix(program.tensor(layer.weight).detach()).double()
    bias = weight.new_zeros(len(weight))
    if layer.bias is not None:
        bias = program.tensor(layer.bias).detach().double()
    if writer.norm is not None:
        scale, shift = writer.norm.affine(program)
        weight, bias = weight * scale[:, None], bias * scale + shift
    return _by_index(torch.cat([weight, bias[:, None]], 1), group.index(writer.member), group.size)


def passed(program: Program, region: Region) -> Tensor:
    """What each channel meets on its way: float64 `[size, numbers]`, equal for equal channels."""
    group = region.group
    parts = [torch.zeros((group.size, 0), dtype=torch.float64)]
    for member in region.others:
        tensor = program.tensor(member.tensor).detach()
        along = tensor.double().movedim(member.dim, 0)
        along = along.reshape(len(along), -1)
        parts.append(_by_index(along, group.index(member), group.size))
    device = next((p.device for p in parts[1:]), parts[0].device)
    return torch.cat([part.to(device) for part in parts], 1)


def columns(group: Group, member: Member) -> Tensor:
    """int64 `[size, width]`: positions of each index along a member's dimension, in order."""
    index = group.index(member)
    return torch.stack([(index == i).nonzero().flatten() for i in range(group.size)])


def _by_index(along: Tensor, index: Tensor, size: int) -> Tensor:
    """`[positions, n]` → `[size, width * n]`, the positions of every index side by side."""
    order = index.argsort(stable=True).to(along.device)
    chosen = order[int((index < 0).sum()) :]
    return along[chosen].reshape(size, -1)
