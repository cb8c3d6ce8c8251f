"""Where quantisation nodes go: the inputs of integer operators, and nowhere else.

A runtime runs a convolution or a matrix product in integers when its activation and its weight come
straight out of quantisation nodes; whatever follows (bias, activation function, residual addition)
is fused into it and must not have a node of its own. So nodes are placed from the consumers:

1. *ports* are the activation inputs of convolutions and matrix products, queries and keys of an
   attention (not its probabilities and values), and both inputs of a residual addition, a gate or a
   pooling whose result goes on to another port, as in a convolutional network (in a transformer it
   goes to a layer norm, which is float);
2. from a port the node moves up through operators that only move values (views, padding with
   zeros, max pooling, concatenation), as long as everything that reads them is a port as well, to
   the tensor's source, where one node serves all ports;
3. tensors that meet in a concatenation share one grid, so that it needs no arithmetic.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (arXiv 1712.05877), appendix; measured with OpenVINO: a node behind every operator is
many times slower than these.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from laconic.program.normalize import base_name
from laconic.program.program import DEQUANTIZE, DYNAMIC_QUANTIZE, FAKES, LEVELS, Program
from laconic.solvers.quantization.weight_sites import MATRIX, WeightSite

_PRODUCTS = {"matmul": (0, 1), "bmm": (0, 1), "baddbmm": (1, 2)}
_ATTENTION = {"scaled_dot_product_attention": (0, 1)}
MOVES = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "expand", "slice",
    "select", "squeeze", "unsqueeze", "max_pool1d", "max_pool2d", "max_pool3d", "clone",
    "contiguous", "dropout", "split", "split_with_sizes", "chunk", "unbind", "getitem", "roll",
    "flip", "pixel_shuffle", "pixel_unshuffle", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "constant_pad_nd", "pad", "repeat", "narrow", "alias", "_unsafe_view",
    "adaptive_max_pool2d",
}  # fmt: skip
"""Operators that only move values."""
_JOINS = {"cat", "concat", "stack"}
_FUSED = {
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "silu", "gelu", "sigmoid", "hardswish",
    "hardsigmoid", "leaky_relu", "prelu", "elu", "tanh", "mish", "batch_norm",
}  # fmt: skip
_POOLS = {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean"}
_MEETINGS = {"add", "mul"}


@dataclass
class Place:
    """A tensor of the graph that gets one quantisation node.

    Attributes:
        source: the node that makes it.
        users: the nodes that read the quantised value; others keep the float one.
        kinds: of the ports it serves: "matrix", "product", "meeting", "pool".
        group: places of one group share a grid.
        sites: names of the sites it belongs to.
    """

    source: fx.Node
    users: list[fx.Node] = field(default_factory=list[fx.Node])
    kinds: set[str] = field(default_factory=set[str])
    group: int = 0
    sites: set[str] = field(default_factory=set[str])

    @property
    def name(self) -> str:
        """Name of the source node: the tensors are `activations.<name>_scale`, `_zero_point`."""
        return self.source.name


@dataclass(frozen=True)
class Port:
    """An input of an operator that should be integers."""

    node: fx.Node
    source: fx.Node
    kind: str
    site: str


# activations ------------------------------------------------------------------------------


def places(program: Program, sites: Sequence[WeightSite], operators: Iterable[str]) -> list[Place]:
    """The tensors to quantise so that `sites` and the named `operators` compute in integers.

    Args:
        program: its shapes are propagated.
        sites: the chosen weights.
        operators: names (see `operator_sites`) of the chosen operators without weights.
    """
    ports = _matrix_ports(sites)
    chosen = set(operators)
    ports += [p for p in _product_ports(program) if p.site in chosen]
    ports += [p for p in _stream_ports(program, ports) if p.site in chosen]
    return _place(program, ports)


def operator_sites(program: Program, sites: Sequence[WeightSite]) -> list[str]:
    """Names of the operators without weights that have ports: module path, then node name."""
    matrix = _matrix_ports(sites)
    products = _product_ports(program)
    ports = products + _stream_ports(program, matrix + products)
    return list(dict.fromkeys(port.site for port in ports))


def _site_name(node: fx.Node) -> str:
    origin = str(node.meta.get("origin") or "")
    return f"{origin}.{node.name}" if origin else node.name


def _matrix_ports(sites: Sequence[WeightSite]) -> list[Port]:
    found: list[Port] = []
    for site in sites:
        for node in site.operators:
            if base_name(node) in MATRIX:
                source = node.args[MATRIX[base_name(node)][0]]
                if isinstance(source, fx.Node):
                    found.append(Port(node, source, "matrix", site.name))
    return found


def _product_ports(program: Program) -> list[Port]:
    """Inputs of products of two activations, except where one is a softmax."""
    found: list[Port] = []
    for node in program.graph.nodes:
        positions = {**_PRODUCTS, **_ATTENTION}.get(base_name(node))
        if positions is None:
            continue
        sources = [node.args[i] for i in positions]
        stored = any(_root(s).op == "get_attr" for s in sources)
        if not stored and not any(base_name(_root(s)) in ("softmax", "_softmax") for s in sources):
            found += [Port(node, source, "product", _site_name(node)) for source in sources]
    return found


def _root(node: fx.Node) -> fx.Node:
    """Up through operators that only move values."""
    while base_name(node) in MOVES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _stream_ports(program: Program, ports: Sequence[Port]) -> list[Port]:
    """Ports of additions, gates and pools that lie between integer operators."""
    found: list[Port] = []
    wanted = {(port.node, port.source) for port in ports}
    for node in reversed(list(program.graph.nodes)):
        name = base_name(node)
        if name not in _MEETINGS and name not in _POOLS:
            continue
        sources = [a for a in node.args[: 2 if name in _MEETINGS else 1] if isinstance(a, fx.Node)]
        if name in _MEETINGS and not _is_meeting(node, sources):
            continue
        if not _reaches(node, wanted) or not any(_from_convolution(s) for s in sources):
            continue
        kind = "meeting" if name in _MEETINGS else "pool"
        found += [Port(node, source, kind, _site_name(node)) for source in sources]
        wanted |= {(node, source) for source in sources}
    return found


def _is_meeting(node: fx.Node, sources: Sequence[fx.Node]) -> bool:
    """Whether two feature maps meet: not a constant, not a scalar, no other multiple of one."""
    if len(sources) != 2 or node.kwargs.get("alpha", 1) != 1:
        return False
    shapes = [source.meta.get("shape") for source in sources]
    maps = all(isinstance(shape, tuple) and len(shape) >= 3 for shape in shapes)
    same = shapes[0] == shapes[1] or base_name(node) == "mul"
    return maps and same and all(_root(source).op != "get_attr" for source in sources)


def _reaches(node: fx.Node, wanted: set[tuple[fx.Node, fx.Node]]) -> bool:
    """Whether the result goes on to a port, through operators that can stay in integers."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        for user in here.users:
            if (user, here) in wanted:
                return True
            name = base_name(user)
            if user not in seen and name in MOVES | _JOINS | _FUSED | _POOLS:
                seen.add(user)
                stack.append(user)
    return False


def _from_convolution(node: fx.Node) -> bool:
    """Whether a convolution makes it, at most through operators that can stay in integers."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        name = base_name(here)
        if name.startswith("conv"):
            return True
        if name in MOVES | _JOINS | _FUSED | _POOLS | _MEETINGS:
            above = [source for source in here.all_input_nodes if source not in seen]
            seen.update(above)
            stack += above
    return False


# from ports to places ---------------------------------------------------------------------


def _place(program: Program, ports: Sequence[Port]) -> list[Place]:
    wanted: dict[tuple[fx.Node, fx.Node], Port] = {(p.node, p.source): p for p in ports}
    made: dict[fx.Node, Place] = {}
    joined: list[list[fx.Node]] = []
    carries = _Carries(wanted)
    for port in ports:
        for source, user in _sources(port.source, port.node, carries, joined):
            if _is_quantised(source):
                continue
            place = made.setdefault(source, Place(source))
            place.kinds.add(port.kind)
            place.sites.add(port.site)
            if user not in place.users:
                place.users.append(user)
    _group(made, joined)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return sorted(made.values(), key=lambda place: order[place.source])


class _Carries:
    """Whether everything that reads a moving operator's result is, in the end, a port."""

    def __init__(self, wanted: dict[tuple[fx.Node, fx.Node], Port]) -> None:
        self.wanted = wanted
        self._known: dict[fx.Node, bool] = {}

    def __call__(self, node: fx.Node) -> bool:
        name = base_name(node)
        if name not in MOVES | _JOINS or not _keeps_zero(node):
            return False
        if node not in self._known:
            self._known[node] = bool(node.users) and all(
                (user, node) in self.wanted or self(user) for user in node.users
            )
        return self._known[node]


def _keeps_zero(node: fx.Node) -> bool:
    """Padding moves values only where it pads with zeros or with values that are there."""
    name = base_name(node)
    if name == "constant_pad_nd":
        return not any(node.args[2:3])
    return name != "pad" or not any(node.args[3:4])


def _sources(
    node: fx.Node, user: fx.Node, carries: _Carries, joined: list[list[fx.Node]]
) -> list[tuple[fx.Node, fx.Node]]:
    """(node to quantise, its reader) for every tensor that comes in at a port."""
    if not carries(node):
        return [(node, user)]
    if base_name(node) in _JOINS:
        parts: Any = node.args[0]
        found = [pair for part in parts for pair in _sources(part, node, carries, joined)]
        joined.append([source for source, _ in found])
        return found
    above = node.args[0]
    if not isinstance(above, fx.Node) or (_has_pieces(above) and not carries(above)):
        return [(node, user)]
    return _sources(above, node, carries, joined)


def _has_pieces(node: fx.Node) -> bool:
    """Whether it gives several tensors, so that a node behind it cannot quantise them."""
    return any(base_name(user) == "getitem" for user in node.users)


def _is_quantised(node: fx.Node) -> bool:
    return _root(node).target in (*FAKES, DYNAMIC_QUANTIZE, DEQUANTIZE, LEVELS)


def _group(made: dict[fx.Node, Place], joined: Sequence[Sequence[fx.Node]]) -> None:
    """Number the groups: places that meet in a concatenation have the same number."""
    for number, place in enumerate(made.values()):
        place.group = number
    for sources in joined:
        members = [made[source] for source in sources if source in made]
        numbers = {place.group for place in members}
        for place in made.values():
            if place.group in numbers:
                place.group = min(numbers)
