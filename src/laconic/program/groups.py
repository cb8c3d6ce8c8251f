"""Groups: axes of several tensors that must shrink together.

    for group in groups(program):
        print(group.name, group.size, [member.tensor for member in group.members])

A group is one atom that the equations of a program leave. Its members are the stored tensors that
carry it; one index of the group is a set of positions along each member's dimension (one channel,
all positions of one head, the same place in every head, ...).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from laconic.core.errors import SurgeryError
from laconic.core.suggest import nearest
from laconic.program import axes
from laconic.program.axes import Atom, Term
from laconic.program.equations import Equations
from laconic.program.program import Program


@dataclass(frozen=True)
class Member:
    """Dimension `dim` of stored tensor `tensor`, as a term in which the group's atom stands.

    `role`: "producer" (rows that write the axis), "consumer" (columns that read it), or
    "parameter" (norms, biases, tables, statistics: what goes along).
    """

    tensor: str
    dim: int
    role: str
    term: Term = field(repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Group:
    """One axis that shrinks as a whole: `size` indices, carried by `members`.

    `frozen` says why it must keep its size; None where it can shrink.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str | None
    atom: Atom = field(repr=False)

    def by_role(self, role: str) -> tuple[Member, ...]:
        """Members that are "producer", "consumer" or "parameter"."""
        return tuple(member for member in self.members if member.role == role)

    def positions(self, member: Member, keep: Tensor | Sequence[int]) -> Tensor:
        """Positions along the member's dimension that stay when the group keeps indices `keep`.

        int64; positions that do not belong to the group stay.
        """
        return axes.positions(member.term, {self.atom: torch.as_tensor(keep, dtype=torch.int64)})

    def index(self, member: Member) -> Tensor:
        """For every position along the member's dimension its index in the group, or -1.

        int64 [size of the dimension]; -1 where the position belongs to other groups only.
        """
        return axes.indices(member.term, self.atom)


class Groups(Sequence[Group]):
    """The groups of a program that can shrink, in graph order; the others are in `frozen`."""

    def __init__(self, equations: Equations, found: Sequence[Group]) -> None:
        self.equations = equations
        self._free = tuple(group for group in found if group.frozen is None)
        self.frozen = tuple(group for group in found if group.frozen is not None)
        self.by_name = {group.name: group for group in found}

    def __getitem__(self, place: int) -> Group:  # type: ignore[override]
        return self._free[place]

    def __len__(self) -> int:
        return len(self._free)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._free)

    @property
    def unknown(self) -> dict[str, list[str]]:
        """Operators nobody described → the places (node and module path) where they stand."""
        return {
            name: [f"{node.name} in {node.meta.get('origin') or 'top level'}" for node in nodes]
            for name, nodes in self.equations.unknown.items()
        }

    def find(self, name: str) -> Group:
        """The group `name`, frozen or not.

        Raises:
            SurgeryError: there is none; names the nearest.
        """
        if name not in self.by_name:
            raise SurgeryError(f"no group named {name!r}", hint=nearest(name, list(self.by_name)))
        return self.by_name[name]

    def kept(self, keep: Mapping[str, Tensor | Sequence[int]]) -> dict[Atom, Tensor]:
        """What atoms keep when groups keep `keep`, checked.

        Raises:
            SurgeryError: an unknown or frozen group, or indices that are empty or out of range.
        """
        found: dict[Atom, Tensor] = {}
        for name, wanted in keep.items():
            group = self.find(name)
            indices = torch.as_tensor(wanted, dtype=torch.int64).cpu().unique()
            if group.frozen is not None and len(indices) != group.size:
                raise SurgeryError("this group cannot shrink", where=name, hint=group.frozen)
            if not len(indices):
                raise SurgeryError("no index is kept", where=name, hint="keep at least one")
            if int(indices[0]) < 0 or int(indices[-1]) >= group.size:
                raise SurgeryError(
                    f"kept indices run from {int(indices[0])} to {int(indices[-1])}",
                    where=name,
                    hint=f"the group has {group.size}, counted from 0",
                )
            found[group.atom] = indices
        return found

    def describe(self) -> str:
        """A table for people: every group with its members, then what is frozen and why."""
        lines: list[str] = []
        for group in self:
            lines.append(f"{group.name}  [{group.size}]")
            lines += [f"    {m.role:9s} {m.tensor} dim {m.dim}" for m in group.members]
        if self.frozen:
            lines.append("frozen:")
        lines += [f"    {group.name}  [{group.size}]  {group.frozen}" for group in self.frozen]
        lines += [f"    unknown operator {name}: {places}" for name, places in self.unknown.items()]
        return "\n".join(lines)


def groups(program: Program, keep: Sequence[str] = ()) -> Groups:
    """Find what can shrink in a program, and with what.

    Args:
        program: left untouched.
        keep: globs over tensor and group names whose axes must keep their size.
    """
    equations = Equations(program)
    members: dict[Atom, list[Member]] = {}
    for name, dims in equations.tensors.items():
        for dim, term in enumerate(dims):
            role = equations.roles.get((name, dim), "parameter")
            for atom in dict.fromkeys(axes.atoms(term)):
                members.setdefault(atom, []).append(Member(name, dim, role, axes.resolve(term)))
    costly = {
        atom
        for monomials in equations.multiply_adds.values()
        for terms in monomials
        for term in terms
        for atom in axes.atoms(term)
    }
    twice = {atom for dims in equations.tensors.values() for t in dims for atom in axes.repeats(t)}
    found: list[Group] = []
    names: dict[str, int] = {}
    for atom, carried in members.items():
        if all(member.role == "kernel" for member in carried):
            continue
        name = _unique(_name(atom, carried), names)
        frozen = atom.frozen
        if frozen is None and atom not in costly:
            frozen = "no multiply-add depends on it"
        if frozen is None and atom in twice:
            frozen = "it stands twice in one axis"
        if frozen is None and _matches(name, carried, keep):
            frozen = "kept by request"
        found.append(Group(name, atom.size, tuple(carried), frozen, atom))
    return Groups(equations, found)


def _matches(name: str, members: Sequence[Member], keep: Sequence[str]) -> bool:
    named = [name, *(member.tensor for member in members)]
    return any(fnmatchcase(one, pattern) for one in named for pattern in keep)


def _unique(name: str, names: dict[str, int]) -> str:
    names[name] = names.get(name, 0) + 1
    return name if names[name] == 1 else f"{name}~{names[name]}"


def _name(atom: Atom, members: Sequence[Member]) -> str:
    """Path of the weight that produces the axis, and which part of its output it is."""
    ranked = sorted(members, key=lambda m: ("producer", "consumer").index(m.role) if m.role in (
        "producer", "consumer") else 2)  # fmt: skip
    first = ranked[0]
    path = first.tensor.removesuffix(".weight")
    side = {"producer": "out", "consumer": "in"}.get(first.role, f"dim{first.dim}")
    if first.term is atom:
        return f"{path}.{side if atom.hint is None or side != 'out' else 'out'}"
    if atom.hint is not None:
        return f"{path}.{atom.hint}"
    inner = list(dict.fromkeys(axes.atoms(first.term)))
    return f"{path}.{side}.{inner.index(atom)}" if len(inner) > 1 else f"{path}.{side}"
