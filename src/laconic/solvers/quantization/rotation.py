"""Rotate axes of a network: norms' weights go into the next layers, then the tensors are turned."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from laconic.program import axes
from laconic.program.axes import Atom, Product, Sum, Term
from laconic.program.groups import groups
from laconic.program.program import Program
from laconic.solvers.quantization import bias_correction
from laconic.solvers.quantization.rotatable import Rotatable, Scale, Turn
from laconic.statistics.layers import Layer

Rotations = Mapping[str, Tensor]
"""Group name → its orthogonal matrix."""


@dataclass(frozen=True)
class Prepared:
    """Axes that can be rotated right away.

    Attributes:
        turns: by group name; no scales are left.
        refused: group name → why it cannot be rotated.
        notes: what had to be done besides, one sentence each.
    """

    turns: dict[str, Turn]
    refused: dict[str, str]
    notes: list[str]


def rotatable(program: Program, names: Iterable[str]) -> Prepared:
    """Which of the groups `names` can be rotated; nothing is changed."""
    found = groups(program)
    about = Rotatable(program, found)
    made = Prepared({}, {}, [])
    for name in names:
        told = about.of(found.find(name)) if name in found.by_name else "it is no longer there"
        if isinstance(told, str):
            made.refused[name] = told
        else:
            made.turns[name] = told
    return made


def prepare(program: Program, names: Iterable[str]) -> Prepared:
    """Put the weights of norms on the way into the layers that read them; the program is changed.

    What it computes stays. A tied weight that takes one in gets a copy of its own, which is noted.
    The proof is made again on what came out.
    """
    first = rotatable(program, names)
    notes: list[str] = []
    done: set[str | None] = set()
    for turn in first.turns.values():
        for scale in turn.scales:
            if scale.weight not in done or scale.bias not in done:
                _absorb(program, scale, notes)
            done |= {scale.weight, scale.bias}
    if done:
        program.recompile()
        program.propagate()
    second = rotatable(program, first.turns)
    for name, turn in list(second.turns.items()):
        if turn.scales:  # a norm of two axes, of which one took its weight elsewhere
            second.refused[name] = f"{turn.scales[0].name} has a weight that stays"
            del second.turns[name]
    return Prepared(second.turns, {**first.refused, **second.refused}, notes)


@torch.no_grad()
def _absorb(program: Program, scale: Scale, notes: list[str]) -> None:
    """Multiply the readers' columns by the weight, add what the bias gives to their biases."""
    weight, bias = (None if name is None else program.tensor(name).detach().double().flatten()
                    for name in (scale.weight, scale.bias))  # fmt: skip
    for layer in scale.readers:
        name = _own_weight(program, layer, notes)
        old = program.tensor(name).detach()
        if bias is not None:
            moved = layer.matrix(old).double() @ bias.to(old.device)
            if layer.bias is not None and layer.node.args[0] is not layer.source:  # addmm
                value = program.tensor(layer.bias).detach()
                program.set_tensor(layer.bias, (value.double() + moved).to(value.dtype))
            else:
                bias_correction.add_to_bias(program, layer.node, name, moved)
        if weight is not None:
            shape = [1] * old.ndim
            shape[layer.in_dim] = -1
            scaled = old.double() * weight.to(old.device).reshape(shape)
            program.set_tensor(name, scaled.to(old.dtype))
    for name, fresh in ((scale.weight, torch.ones_like), (scale.bias, torch.zeros_like)):
        if name is not None:
            program.set_tensor(name, fresh(program.tensor(name).detach()))


def _own_weight(program: Program, layer: Layer, notes: list[str]) -> str:
    """A layer's weight, which nothing else reads: its own, or a copy."""
    holder: Any = next(
        n for n in layer.node.all_input_nodes
        if n.op == "get_attr" and program.aliases.get(str(n.target), n.target) == layer.weight
    )  # fmt: skip
    readers = [n for n in program.graph.nodes if n.op == "get_attr" and n.target == holder.target]
    if sum(len(n.users) for n in readers) == 1 and layer.weight not in program.aliases.values():
        return layer.weight
    origin = str(layer.node.meta.get("origin") or layer.node.name)
    tied = [alias for alias, name in program.aliases.items() if name == layer.weight]
    name = f"{origin}.weight"
    if name == layer.weight and tied:
        program.untie(tied[0])
        others = [user for n in readers for user in n.users if user is not layer.node]
        _read(program, tied[0], holder, others)
    else:
        if name in tied:
            program.untie(name)
        else:
            held = program.tensor(layer.weight)
            name = program.add_tensor(name, type(held)(held.detach().clone()))
        _read(program, name, holder, [layer.node])
    notes.append(f"{origin} no longer shares its weight: it takes a norm's weight in")
    return name


def _read(program: Program, name: str, holder: fx.Node, users: Sequence[fx.Node]) -> None:
    """Let nodes read the tensor `name` in place of what any holder of the same tensor gives."""
    for user in users:
        with program.graph.inserting_before(user):
            made = program.graph.get_attr(name)
        made.meta = dict(holder.meta)
        for source in user.all_input_nodes:
            if source.op == "get_attr" and source.target == holder.target:
                user.replace_input_with(source, made)


# turning ------------------------------------------------------------------------------------


def members(turns: Iterable[Turn]) -> dict[str, list[tuple[str, int, Term, Atom]]]:
    """Tensor → (group, dimension, its term, the axis) of every rotation it takes part in."""
    found: dict[str, list[tuple[str, int, Term, Atom]]] = {}
    for turn in turns:
        for member in turn.group.members:
            if member.tensor not in turn.fixed:
                place = (turn.group.name, member.dim, member.term, turn.group.atom)
                found.setdefault(member.tensor, []).append(place)
    return found


def rotated(tensor: Tensor, places: Sequence[tuple[str, int, Term, Atom]], by: Rotations) -> Tensor:
    """A stored tensor along with the axes it carries; gradients pass. In the matrices' dtype."""
    made = tensor
    for name, dim, term, atom in places:
        if name in by:
            made = made.to(by[name].dtype)
            made = _turned(made.movedim(dim, -1), axes.resolve(term), atom, by[name])
            made = made.movedim(-1, dim)
    return made


def _turned(x: Tensor, term: Term, atom: Atom, by: Tensor) -> Tensor:
    """The last dimension of `x`, which is `term`, turned wherever the atom stands in it."""
    if isinstance(term, Atom):
        return x @ by if term is atom else x
    if isinstance(term, Sum):
        pieces = x.split([part.size for part in term.parts], -1)
        turned = [_turned(p, t, atom, by) for p, t in zip(pieces, term.parts, strict=True)]
        return torch.cat(turned, -1)
    return _turned_factor(x, term, atom, by)


def _turned_factor(x: Tensor, term: Product, atom: Atom, by: Tensor) -> Tensor:
    sizes = [factor.size for factor in term.factors]
    wide = x.reshape(*x.shape[:-1], *sizes)
    for place, factor in enumerate(term.factors):
        dim = place - len(sizes)
        wide = _turned(wide.movedim(dim, -1), factor, atom, by).movedim(-1, dim)
    return wide.reshape(x.shape)


@torch.no_grad()
def turn(program: Program, turns: Iterable[Turn], by: Rotations) -> None:
    """Rotate the stored tensors in float64, round them once; the program is changed."""
    for name, places in members(turns).items():
        old = program.tensor(name)
        moved = {key: matrix.to(old.device).double() for key, matrix in by.items()}
        made = rotated(old.detach(), places, moved)
        program.set_tensor(name, made.to(old.dtype).contiguous())
