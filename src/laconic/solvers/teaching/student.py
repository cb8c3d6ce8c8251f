"""Filling a given network with what a larger one knows, tensor by tensor, matched by name.

Layers are matched chain by chain: where the student has fewer, each of its layers stands for one of
the larger network's that is chosen by position.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from laconic.core.errors import RecipeError, SurgeryError
from laconic.core.suggest import nearest
from laconic.program.program import Program
from laconic.program.sites import Sites
from laconic.solvers.channels.slices import cropped
from laconic.solvers.layers.depth import Chain, Spread, places

Pairs = dict[str, str]


@dataclass
class Filled:
    """What became of the student's float tensors: names of its own.

    Attributes:
        taken: those that got a slice along the groups, or a whole tensor.
        cropped: those that got a slice by themselves, because no group gives their shape.
        own: those that kept their values.
    """

    taken: list[str] = field(default_factory=list[str])
    cropped: list[str] = field(default_factory=list[str])
    own: list[str] = field(default_factory=list[str])


def check(student: Program, program: Program) -> None:
    """Refuse a student whose inputs or outputs are not the program's.

    Raises:
        RecipeError: says what differs.
    """
    if len(student.placeholders) != len(program.placeholders):
        raise RecipeError(
            f"takes {len(student.placeholders)} input tensors, the program "
            f"{len(program.placeholders)}",
            where="student",
        )
    found = program.clone()
    try:
        found.propagate()
        student.propagate(program.example)
    except SurgeryError as error:
        raise RecipeError(
            f"does not take the program's inputs: {error.message}", where="student"
        ) from error
    ours, theirs = _outputs(student), _outputs(found)
    if ours != theirs:
        raise RecipeError(
            f"gives {ours}, the program {theirs}",
            where="student",
            hint="a student has the outputs of what it learns from, in shape and dtype",
        )
    student.propagate()


def paired(
    student: Program,
    program: Program,
    names: Mapping[str, str],
    chains: tuple[Sequence[Chain], Sequence[Chain]],
    spread: Spread,
    sites: Sites,
) -> Pairs:
    """Tensors of the student → tensors of the program, where there is one.

    Args:
        student: the smaller network.
        program: the larger one.
        names: globs over the student's names → the program's, the n-th `*` standing for the n-th.
        chains: the student's and the program's layers.
        spread: which layers of the program the student's stand for.
        sites: which of the student's tensors.

    Raises:
        RecipeError: not one tensor has a counterpart, or sites match nothing.
    """
    known = {name: name for name, _ in program.tensors()} | program.aliases
    layers = _layers(*chains, names, spread)
    found: Pairs = {}
    floats = [name for name, tensor in student.tensors() if tensor.is_floating_point()]
    for name in sites.choose(floats):
        other = _moved(name, renamed(name, names), layers)
        if other in known:
            found[name] = known[other]
    if floats and not found:
        raise RecipeError(
            f"none of the student's {len(floats)} tensors has the name of one of the program's",
            where="match",
            hint=f"{floats[0]}: {nearest(floats[0], known)}",
        )
    return found


def used(pairs: Pairs, chains: Sequence[Chain]) -> list[str]:
    """Names of the program's layers that one of the student's tensors stands for."""
    wanted = list(pairs.values())
    return [
        layer.name
        for chain in chains
        for layer in chain
        if any(name.startswith(layer.name + ".") for name in wanted)
    ]


@torch.no_grad()
def fill(student: Program, pairs: Pairs, cut: Program, whole: Program) -> Filled:
    """Put the values of `cut` into the student, in place.

    Args:
        student: to fill.
        pairs: its tensors → those of the other two.
        cut: the larger network cut to the student's sizes, as far as its groups allow.
        whole: the larger network, of which a tensor is cropped where `cut` has another shape.
    """
    done = Filled()
    there = dict(cut.tensors())
    for name, tensor in list(student.tensors()):
        if not tensor.is_floating_point():
            continue
        value = there.get(pairs[name]) if name in pairs else None
        where = done.taken
        if value is not None and value.shape != tensor.shape:
            value = cropped(whole.tensor(pairs[name]), tensor.shape)
            where = done.cropped
        if value is None:
            where = done.own
        else:
            student.set_tensor(name, value.detach().to(tensor))
        where.append(name)
    return done


def renamed(name: str, patterns: Mapping[str, str]) -> str:
    """The name that the first fitting pattern gives, else the name itself.

    >>> renamed("body.0.weight", {"body.*": "encoder.layer.*"})
    'encoder.layer.0.weight'
    """
    for pattern, other in patterns.items():
        parts = [re.escape(part) for part in pattern.split("*")]
        fits = re.fullmatch("(.*)".join(parts), name)
        if fits:
            pieces = other.split("*")
            held = [*fits.groups(), *[""] * len(pieces)]
            return pieces[0] + "".join(a + b for a, b in zip(held, pieces[1:], strict=False))
    return name


def _outputs(program: Program) -> list[tuple[list[int], str]]:
    nodes = program.output_node.all_input_nodes
    return [(list(n.meta["shape"]), str(n.meta["dtype"]).removeprefix("torch.")) for n in nodes]


def _layers(
    ours: Sequence[Chain], theirs: Sequence[Chain], names: Mapping[str, str], spread: Spread
) -> dict[str, str]:
    """Layers of the student → the layers that they stand for."""
    found: dict[str, str] = {}
    for chain in ours:
        other = _twin(chain, theirs, names)
        if other is not None and len(chain) <= len(other):
            chosen = places(len(chain), len(other), spread)
            found |= {
                layer.name: other[place].name for layer, place in zip(chain, chosen, strict=True)
            }
    return found


def _twin(chain: Chain, theirs: Sequence[Chain], names: Mapping[str, str]) -> Chain | None:
    """The chain under the same module path."""
    first = renamed(chain[0].branches[0].tensors[0], names)
    exact = [o for o in theirs if any(first.startswith(layer.name + ".") for layer in o)]
    above = [o for o in theirs if first.startswith(o[0].name.rpartition(".")[0] + ".")]
    return next(iter([*exact, *above]), None)


def _moved(name: str, other: str, layers: Mapping[str, str]) -> str:
    """`other`, the program's name for the student's tensor `name`, in the layer that is stood for.

    Names within a layer are alike, so the part of `other` behind the layer's place stays.
    """
    for layer, wanted in layers.items():
        if name.startswith(layer + "."):
            depth = wanted.count(".") + 1
            return ".".join([wanted, *other.split(".")[depth:]])
    return other
