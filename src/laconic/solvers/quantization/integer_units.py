"""Quantisation nodes by what they make integer together, and a program without some of them.

A matrix product runs in integers if both its inputs come out of quantisation nodes, so a node is
worth nothing without its partners: all nodes that feed one operator, and all operators that one
node feeds, are one unit (the three products that read one activation; a convolution and the sum
that its block ends in). Units in graph order can be put together to pieces, so that a large network
has few of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from laconic.program.normalize import base_name
from laconic.program.program import FAKE_QUANTIZE, Program
from laconic.solvers.quantization.placement import MOVES


@dataclass(frozen=True)
class Unit:
    """Quantisation nodes that belong together.

    Attributes:
        name: of the first operator that they feed, for people.
        nodes: their names.
    """

    name: str
    nodes: tuple[str, ...]


def units(program: Program, most: int | None = None) -> list[Unit]:
    """The units of a program's uniform quantisation nodes, in graph order.

    Args:
        program: not frozen.
        most: neighbours are put together until there are at most so many; None: never.
    """
    fakes = [node for node in program.graph.nodes if node.target is FAKE_QUANTIZE]
    owner = {node: node for node in fakes}

    def root(node: fx.Node) -> fx.Node:
        while owner[node] is not node:
            node = owner[node]
        return node

    fed: dict[fx.Node, fx.Node] = {}
    for node in fakes:
        for operator in _operators(node):
            first = fed.setdefault(operator, node)
            owner[root(node)] = root(first)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in fakes:
        found.setdefault(root(node), []).append(node)
    place = {node: number for number, node in enumerate(program.graph.nodes)}
    made: list[tuple[int, Unit]] = []
    for nodes in found.values():
        operators = [operator for node in nodes for operator in _operators(node)]
        if operators:
            first = min(operators, key=lambda node: place[node])
            name = str(first.meta.get("origin") or first.name)
            made.append((place[first], Unit(name, tuple(node.name for node in nodes))))
    ordered = [unit for _, unit in sorted(made, key=lambda pair: pair[0])]
    return _together(ordered, most or len(ordered))


def _operators(node: fx.Node) -> list[fx.Node]:
    """What computes with a node's values, behind operators that only move them."""
    found: list[fx.Node] = []
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if base_name(user) in MOVES and user not in seen:
                seen.add(user)
                stack.append(user)
            elif user.op == "call_function" and base_name(user) not in MOVES:
                found.append(user)
    return found


def _together(ordered: Sequence[Unit], most: int) -> list[Unit]:
    """At most `most` pieces of neighbours, as even as can be."""
    count = min(most, len(ordered))
    ends = [round(i * len(ordered) / count) for i in range(count + 1)] if count else []
    pieces = [ordered[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return [
        Unit(piece[0].name, tuple(name for unit in piece for name in unit.nodes))
        for piece in pieces
    ]


@torch.no_grad()
def without(program: Program, nodes: Iterable[str]) -> Program:
    """A program whose quantisation nodes of these names are gone.

    Weights keep the values that they have on their grids: what corrects them (biases) and what was
    trained with them stays right; activations are floats again.
    """
    made = program.clone()
    gone = set(nodes)
    for node in list(made.graph.nodes):
        if node.name not in gone:
            continue
        source = node.all_input_nodes[0]
        if source.op == "get_attr" and len(source.users) == 1:
            sides = [made.tensor(str(side.target)) for side in node.all_input_nodes]
            made.set_tensor(str(source.target), FAKE_QUANTIZE(*sides, *node.args[len(sides) :]))
        node.replace_all_uses_with(source)
        made.graph.erase_node(node)
    made.graph.eliminate_dead_code()
    made.drop_unused()
    made.recompile()
    return made
