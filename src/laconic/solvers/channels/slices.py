"""Which indices of its groups a smaller network takes over from a larger one.

The larger one is cut along its groups, so that every tensor of the smaller one gets the same
channels, heads and hidden units as all others that share the axis. Sizes are a share of every
group, or those of a given network's tensors, from which the sizes of the groups are worked out.
"""

from collections.abc import Mapping, Sequence
from math import floor

import torch
from torch import Tensor

from laconic.program import axes
from laconic.program.axes import Atom, Product, Term
from laconic.program.groups import Group, Groups
from laconic.program.sites import Sites
from laconic.solvers.channels.selection import Keep, chosen
from laconic.solvers.weights.elimination import Removal

Counts = dict[str, int]


def counts(found: Groups, share: float | Mapping[str, float], sites: Sites) -> Counts:
    """How many indices every group keeps, of those that shrink.

    Args:
        found: groups of the larger network.
        share: of the indices that stay, above 0 to 1, rounded, at least one; or by glob over the
            groups' names. A number leaves the width of single heads alone where their number can
            shrink.
        sites: which groups.

    Raises:
        RecipeError: sites or globs that match nothing, or only groups that cannot shrink.
    """
    wanted = share if isinstance(share, Mapping) else {"*": share}
    left = chosen(found, sites)
    if not isinstance(share, Mapping):
        left = [name for name in left if not _inside_heads(found, found.find(name))]
    made: Counts = {}
    for pattern, part in wanted.items():
        for name in Sites.of(pattern).choose(left):
            size = found.find(name).size
            made[name] = max(floor(size * part + 0.5), 1)
            left.remove(name)
    return {name: count for name, count in made.items() if count < found.find(name).size}


def leading(sizes: Counts) -> Keep:
    """The first indices of every group."""
    return {name: torch.arange(count) for name, count in sizes.items()}


def ranked(sizes: Counts, removals: Mapping[str, Removal]) -> Keep:
    """The indices that go last, ascending; the first ones where nothing scores a group."""
    return leading(sizes) | {
        name: removals[name].kept(count) for name, count in sizes.items() if name in removals
    }


def fitting(found: Groups, shapes: Mapping[str, Sequence[int]]) -> Counts:
    """Sizes of groups with which the tensors of a network get given shapes, as far as they can.

    Axes that are one group say its size. Axes of several are solved by changing one factor (the
    number of heads before their width), or all parts of a concatenation alike.

    Args:
        found: groups of the larger network.
        shapes: its tensors' names → the shapes wanted; others are free.
    """
    wanted: dict[tuple[Term, int], None] = {}
    for name, shape in shapes.items():
        terms = found.equations.tensors.get(name, ())
        if len(terms) == len(shape):
            wanted |= {(axes.resolve(t), n): None for t, n in zip(terms, shape, strict=True)}
    free = {group.atom for group in found}
    sizes: dict[Atom, int] = {}
    left = list(wanted)
    while left:
        unknown = {at: [a for a in dict.fromkeys(axes.atoms(at[0])) if a in free and a not in sizes]
                   for at in left}  # fmt: skip
        left = [at for at in left if unknown[at]]
        if left:  # the most certain one first
            term, size = min(left, key=lambda at: len(unknown[at]))
            atoms = unknown[term, size]
            sizes |= _solved(term, atoms, sizes, size) or {atom: atom.size for atom in atoms}
    return {g.name: sizes[g.atom] for g in found if sizes.get(g.atom, g.size) != g.size}


def cropped(tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The beginning of the first two axes and the middle of the others; None if it is too small."""
    if tensor.ndim != len(shape) or any(n > m for n, m in zip(shape, tensor.shape, strict=True)):
        return None
    for dim, size in enumerate(shape):
        start = (tensor.shape[dim] - size) // 2 if dim > 1 else 0
        tensor = tensor.narrow(dim, start, size)
    return tensor.clone()


def _inside_heads(found: Groups, group: Group) -> bool:
    """Whether a group is what stands inside each head of another one that can shrink."""
    if group.atom.hint != "head_dim":
        return False
    heads = {other.atom for other in found if other.atom.hint == "heads"}
    return any(atom in heads for m in group.members for atom in axes.atoms(m.term))


def _solved(
    term: Term, unknown: Sequence[Atom], known: Mapping[Atom, int], size: int
) -> dict[Atom, int]:
    """Sizes of the unknown atoms that give a term a size, or nothing."""
    largest = max(atom.size for atom in unknown)
    singles = sorted(unknown, key=lambda atom: ("heads", None, "head_dim").index(
        atom.hint if atom.hint in ("heads", "head_dim") else None))  # fmt: skip
    together = [list(unknown)]
    trials = [[a] for a in singles] + together if isinstance(term, Product) else together
    for trial in trials:
        for step in range(1, largest + 1):
            made = {atom: max(floor(atom.size * step / largest + 0.5), 1) for atom in trial}
            if axes.new_size(term, {**known, **made}) == size:
                return made
    return {}
