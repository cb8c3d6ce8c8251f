"""Weights that a graph computes from trainable tensors: weight norm, spectral norm, masks.

Training wants them in parts; everything else wants the weight. What may be put together is a value
of the shape of one of its parameters that depends on stored tensors only, and whose parameters
nobody else reads.
"""

import re

import torch
from torch import fx, nn

from laconic.program.program import Program
from laconic.solvers.layers.constants import is_computable, run

_PART = re.compile(r"\.parametrizations\.(\w+)\.original\d*$|(\w+)_(?:v|orig)$")


def computed_weights(program: Program) -> dict[fx.Node, str]:
    """Nodes that can become one weight → the parameter whose shape they have, in graph order.

    Shapes are those that `propagate` wrote.
    """
    inside: dict[fx.Node, frozenset[str]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            inside[node] = frozenset([program.aliases.get(str(node.target), str(node.target))])
        elif is_computable(node) and all(source in inside for source in node.all_input_nodes):
            inside[node] = frozenset[str]().union(*(inside[s] for s in node.all_input_nodes))
    found: dict[fx.Node, str] = {}
    for node, names in inside.items():
        ends = any(user not in inside for user in node.users) and "shape" in node.meta
        if node.op == "get_attr" or not ends:
            continue
        shape, alone = tuple(node.meta["shape"]), _read_for(inside, node)
        parameters = [n for n in names if isinstance(program.tensor(n), nn.Parameter)]
        fitting = [n for n in parameters if tuple(program.tensor(n).shape) == shape]
        tied = set(program.aliases.values())
        if len(shape) > 1 and fitting and alone >= set(parameters) and not tied & set(parameters):
            found[node] = min(fitting)
    return found


def fold_computed_weights(program: Program) -> list[str]:
    """Put every such weight together; their names now, `c.weight` for weight norm's parts of `c`.

    The values are parameters like those that they were made of. Eliminate dead code and recompile
    the program afterwards.
    """
    made: list[str] = []
    values: dict[fx.Node, torch.Tensor] = {}
    for node, part in computed_weights(program).items():
        with torch.no_grad():
            value = _value(program, node, values).clone().contiguous()
        trains = program.tensor(part).requires_grad
        weight, name = nn.Parameter(value, requires_grad=trains), _PART.sub(_whole, part)
        if name == part:
            program.set_tensor(name, weight)
        else:
            name = program.add_tensor(name, weight)
        with program.graph.inserting_before(node):
            stored = program.graph.get_attr(name)
        stored.meta = dict(node.meta)
        node.replace_all_uses_with(stored)
        made.append(name)
    return made


def _read_for(inside: dict[fx.Node, frozenset[str]], end: fx.Node) -> set[str]:
    """Tensors that are read on the way to `end` only."""
    way, stack = set[fx.Node](), [end]
    while stack:
        here = stack.pop()
        if here not in way:
            way.add(here)
            stack += here.all_input_nodes
    strays: set[str] = set()
    for node, names in inside.items():
        if node is not end and any(user not in way for user in node.users):
            strays |= names
    return set(inside[end]) - strays


def _value(program: Program, node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    if node not in values:
        if node.op == "get_attr":
            return program.tensor(str(node.target)).detach()
        values[node] = run(node, lambda source: _value(program, source, values))
    return values[node]


def _whole(part: re.Match[str]) -> str:
    return f".{part[1]}" if part[1] else part[2]
