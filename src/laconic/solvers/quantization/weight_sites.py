"""The stored tensors that matrix operators multiply by: what can be quantised, shared or pruned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from laconic.program.normalize import base_name
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.layers.computed_weights import computed_weights

# operator name → positions of (activation, weight) and the weight's output axis
MATRIX: dict[str, tuple[int, int, int]] = {
    "conv1d": (0, 1, 0),
    "conv2d": (0, 1, 0),
    "conv3d": (0, 1, 0),
    "convolution": (0, 1, 0),
    "conv_transpose1d": (0, 1, 1),
    "conv_transpose2d": (0, 1, 1),
    "conv_transpose3d": (0, 1, 1),
    "linear": (0, 1, 0),
    "addmm": (1, 2, -1),
    "mm": (0, 1, -1),
    "matmul": (0, 1, -1),
}
_STAGES = 2  # argument of a recurrent operator: the weights and biases of its layers, in a list
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_TURNS = {"t", "transpose", "permute"}


@dataclass(frozen=True)
class WeightSite:
    """A stored tensor that matrix operators or look-ups multiply by.

    Attributes:
        name: of the tensor, canonical.
        holders: the `get_attr` nodes that read it.
        operators: the operators that use it.
        axis: its output axis: one scale for each of its indices; None where its operators disagree
            (a matrix that is used transposed as well), so that it can have one scale only.
        weight_only: only embeddings and recurrent layers use it: there is no activation to
            quantise.
    """

    name: str
    holders: tuple[fx.Node, ...]
    operators: tuple[fx.Node, ...]
    axis: int | None
    weight_only: bool

    @property
    def is_table(self) -> bool:
        """Whether only embeddings use it: its rows are picked, not multiplied."""
        return all(base_name(operator) == "embedding" for operator in self.operators)


def weight_sites(program: Program) -> tuple[list[WeightSite], list[str]]:
    """All weights that could be quantised, in graph order; and a note for each that cannot."""
    held: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and program.tensor(str(node.target)).is_floating_point():
            held.setdefault(str(node.target), []).append(node)
    found: list[WeightSite] = []
    notes: list[str] = []
    for name, holders in held.items():
        uses = [
            use
            for holder in holders
            for use in _turned_uses(holder, range(program.tensor(name).ndim))
        ]
        if not any(use is not None for use in uses):
            continue
        known = [use for use in uses if use is not None]
        axes = {axis for _, axis in known}
        if len(known) < len(uses):
            notes.append(f"{name}: stays float, because other operators read it too")
            continue
        operators = tuple(dict.fromkeys(operator for operator, _ in known))
        weight_only = not any(base_name(operator) in MATRIX for operator in operators)
        axis = axes.pop() if len(axes) == 1 else None
        found.append(WeightSite(name, tuple(holders), operators, axis, weight_only))
    for node, part in computed_weights(program).items():
        if any(_turned_uses(node, range(len(node.meta["shape"])))):
            notes.append(
                f"{part}: stays float, because the weight is computed from it: simplify.fold first"
            )
    return found, notes


def choose_sites(program: Program, sites: Sites, names: Sequence[str]) -> list[str]:
    """The selected names; a tied weight is in by any of its names, and out by any of them.

    Raises:
        RecipeError: nothing matches although there are names; says the nearest ones.
    """
    barred = Sites(("*", *(p for p in sites.patterns if p.startswith("!"))))
    every = {name: [name] for name in names}
    for alias, name in program.aliases.items():
        every.get(name, []).append(alias)
    sites.choose([each for group in every.values() for each in group])
    return [
        name for name, group in every.items()
        if any(sites.match(n) for n in group) and all(barred.match(n) for n in group)
    ]  # fmt: skip


def _turned_uses(node: fx.Node, order: Sequence[int]) -> list[tuple[fx.Node, int] | None]:
    """(operator, output axis of the stored tensor) of every use; None for an unknown one.

    `order[i]` is the stored dimension that stands at place `i` here.
    """
    found: list[tuple[fx.Node, int] | None] = []
    for user in node.users:
        name = base_name(user)
        if name in _TURNS:
            found += _turned_uses(user, _turn(user, order))
        elif name == "embedding" and user.all_input_nodes[0] is node:
            found.append((user, order[0]))
        elif name in MATRIX and _is_weight(user, node) and len(order) >= 2:
            found.append((user, order[_out_axis(user)]))
        elif name in RECURRENT and _is_stage(user, node) and len(order) == 2:
            found.append((user, order[0]))
        else:
            found.append(None)
    return found


def _turn(node: fx.Node, order: Sequence[int]) -> Sequence[int]:
    args: Any = node.args
    name = base_name(node)
    if name == "permute":
        return tuple(order[i] for i in args[1])
    one, other = (args[1], args[2]) if name == "transpose" else (0, len(order) - 1)
    turned = list(order)
    turned[one], turned[other] = turned[other], turned[one]
    return tuple(turned)


def _is_weight(user: fx.Node, node: fx.Node) -> bool:
    activation, weight, _ = MATRIX[base_name(user)]
    return user.args[weight] is node and user.args[activation] is not node


def _is_stage(user: fx.Node, node: fx.Node) -> bool:
    stages: Any = user.args[_STAGES]
    return isinstance(stages, (list, tuple)) and node in stages


def _out_axis(node: fx.Node) -> int:
    transposed = base_name(node) == "convolution" and bool(node.args[6])
    return 1 if transposed else MATRIX[base_name(node)][2]
