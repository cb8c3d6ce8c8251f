"""Several models in one Program: their names, the choice among them, and each one alone.

Models of one graph are stored together as rows below each other, and `laconic.member` nodes pick
those of the chosen one (`solvers/sharing/together.py` puts them there). The choice is an argument
in the graph, so that cloning, storage and training know nothing of it.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from laconic.core.errors import SurgeryError
from laconic.core.suggest import nearest
from laconic.program.program import MEMBER, Program


def names(program: Program) -> tuple[str, ...]:
    """The models that a Program holds, the first one first; none if it holds just itself."""
    for node in _picks(program):
        return tuple(str(node.args[2]).split(","))
    return ()


def chosen(program: Program) -> str | None:
    """The model that a Program computes, of those it holds."""
    for node in _picks(program):
        return names(program)[_whole(node.args[3])]
    return None


def choose(program: Program, name: str) -> Program:
    """A Program that computes the model `name` and holds the others as well.

    It shares memory with `program` until one of them trains.

    Raises:
        SurgeryError: there is no such model; says the nearest names.
    """
    return switched(program.clone(), name)


def switched(program: Program, name: str) -> Program:
    """`program` itself, made to compute the model `name`.

    Raises:
        SurgeryError: there is no such model; says the nearest names.
    """
    known = names(program)
    if name not in known:
        raise SurgeryError(
            f"holds no model {name!r}" + ("" if known else ", nor several models at all"),
            where="members",
            hint=nearest(name, known) if known else "share.models stores several models together",
        )
    for node in _picks(program):
        node.update_arg(3, known.index(name))
    program.recompile()
    return program


def members(program: Program) -> dict[str, Program]:
    """Every model that a Program holds, by name, each alone; they have the plain models' tensors.

    A Program that holds just itself has no members.
    """
    return {name: alone(program, name) for name in names(program)}


def alone(program: Program, name: str | None = None) -> Program:
    """The chosen model, or the one called `name`, as a Program that knows nothing of the others.

    Its tensors have the names and shapes that the model had; what it shared with others, it holds
    as float values. A Program that holds just itself is given back as it is.

    Raises:
        SurgeryError: there is no such model; says the nearest names.
    """
    if name is None and not names(program):
        return program
    made = program.clone() if name is None else choose(program, name)
    with torch.no_grad():
        for node in list(_picks(made)):
            _settle(made, node)
    made.drop_unused()
    made.recompile()
    return made


def _picks(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is MEMBER]


def _whole(value: Any) -> int:
    return int(value)


def _settle(program: Program, pick: fx.Node) -> None:
    """Put the value of a choice under the name of the rows it chooses from."""
    rows: Any = pick.args[0]
    while rows.op != "get_attr":
        rows = rows.args[0]
    name = str(rows.target)
    old, value = program.tensor(name), _value(program, pick).detach().clone()
    coded = value.is_floating_point() and not old.is_floating_point()  # it was a parameter
    if coded or isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=coded or old.requires_grad)
    with program.graph.inserting_before(pick):
        held = program.graph.get_attr(name)
    held.meta = {**pick.meta, "shape": tuple(value.shape), "dtype": value.dtype}
    pick.replace_all_uses_with(held)
    program.set_tensor(name, value)
    _erase(program, pick)


def _value(program: Program, node: fx.Node) -> Tensor:
    """What a node that reads stored tensors only gives."""
    if node.op == "get_attr":
        return program.tensor(str(node.target)).detach()
    given: Any = map_arg(node.args, lambda source: _value(program, source))
    target: Any = node.target
    return target(*given, **node.kwargs)


def _erase(program: Program, node: fx.Node) -> None:
    """Remove a node that nothing reads, and then its inputs that nothing reads either."""
    sources = node.all_input_nodes
    program.graph.erase_node(node)
    for source in sources:
        if not source.users:
            _erase(program, source)
