"""What may vary in a network: knobs with their choices, and the members that turning them gives.

A member is plain JSON, `{"width:layer1.0.conv1.out": 8, "depth:layer1": 6}`: every knob with the
choice it stands at. The first choice of a knob is the network as it is, so the whole network is a
member of every space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TypeAlias

import torch

from laconic.core.errors import RecipeError
from laconic.core.suggest import nearest

KINDS = ("resolution", "kernel", "depth", "width", "bits")
"""In the order in which training opens them; resolution is open from the beginning."""
Member: TypeAlias = dict[str, int]
Wishes: TypeAlias = Mapping[str, Sequence[int | float]]
DEFAULT: Wishes = {"width:*": [1.0, 0.75, 0.5, 0.25], "depth:*": [1.0, 0.75, 0.5, 0.25]}
_SPREAD = 0.35


@dataclass(frozen=True)
class Knob:
    """One thing that varies.

    Attributes:
        kind: "width" (indices of a group that stay), "depth" (residual branches of a stage that
            stay), "kernel" (its side), "resolution" (side of the input), "bits" (of a weight).
        site: group, stage, weight or input.
        choices: descending; the first is the network as it is.
    """

    kind: str
    site: str
    choices: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its key in a member."""
        return f"{self.kind}:{self.site}"


@dataclass(frozen=True)
class Space:
    """All knobs, in graph order within each kind."""

    knobs: tuple[Knob, ...]

    def plain(self) -> dict[str, list[int]]:
        """Name → choices: a declaration that gives this very space again."""
        return {knob.name: list(knob.choices) for knob in self.knobs}

    def members(self) -> int:
        """How many there are."""
        return prod(len(knob.choices) for knob in self.knobs)

    def member(self, genes: Sequence[int]) -> Member:
        """The member that stands at these places among the choices."""
        pairs = zip(self.knobs, genes, strict=True)
        return {knob.name: knob.choices[gene] for knob, gene in pairs}

    def genes(self, member: Member) -> tuple[int, ...]:
        """The inverse of `member`."""
        return tuple(knob.choices.index(member[knob.name]) for knob in self.knobs)

    def full(self) -> Member:
        """The network as it is."""
        return self.member([0] * len(self.knobs))

    def least(self) -> Member:
        """Every knob at its smallest."""
        return self.member([len(knob.choices) - 1 for knob in self.knobs])

    def at(self, level: float) -> Member:
        """Every knob at the same part of its way down: 0 is the whole network, 1 the least."""
        return self.member([round(level * (len(knob.choices) - 1)) for knob in self.knobs])

    def random(self, generator: torch.Generator) -> Member:
        """A member drawn so that sizes spread from the whole network to the least.

        Independent draws of many knobs all cost nearly the same; here a level is drawn first, and
        every knob around it.
        """
        draws = torch.rand(len(self.knobs) + 1, generator=generator, dtype=torch.float64)
        level, noise = float(draws[0]), (draws[1:] - 0.5) * 2 * _SPREAD
        places = [min(max(level + float(part), 0.0), 1.0) for part in noise]
        pairs = zip(self.knobs, places, strict=True)
        return self.member([round(place * (len(knob.choices) - 1)) for knob, place in pairs])

    def mutated(self, member: Member, rate: float, generator: torch.Generator) -> Member:
        """A neighbour: each knob is turned with probability `rate`, at least one of them."""
        turned = torch.rand(len(self.knobs), generator=generator) < rate
        turned[int(torch.randint(len(self.knobs), (1,), generator=generator))] = True
        genes = list(self.genes(member))
        for place in turned.nonzero().flatten().tolist():
            others = [g for g in range(len(self.knobs[place].choices)) if g != genes[place]]
            genes[place] = others[int(torch.randint(len(others), (1,), generator=generator))]
        return self.member(genes)

    def checked(self, member: Mapping[str, int]) -> Member:
        """`member` with the knobs it does not name at the whole network's.

        Raises:
            RecipeError: a knob that there is not, or a choice that it does not have.
        """
        known = {knob.name: knob for knob in self.knobs}
        for name, choice in member.items():
            if name not in known:
                raise RecipeError(f"no knob {name!r}", where="member", hint=nearest(name, known))
            if choice not in known[name].choices:
                raise RecipeError(
                    f"{choice} is none of its choices {list(known[name].choices)}",
                    where=f"member, {name}",
                )
        return {**self.full(), **member}

    def opened(self, parts: Mapping[str, float]) -> "Space":
        """The space with only a leading part of the choices of each kind, from 0 (one) to 1."""
        knobs = [
            replace(
                knob,
                choices=knob.choices[: 1 + int(parts[knob.kind] * (len(knob.choices) - 1) + 1e-9)],
            )
            for knob in self.knobs
        ]
        return Space(tuple(knobs))


def named(member: Mapping[str, int], kind: str) -> list[tuple[str, int]]:
    """Sites and choices of the knobs of one kind."""
    start = f"{kind}:"
    return [(k.removeprefix(start), v) for k, v in member.items() if k.startswith(start)]


def choices_of(kind: str, size: int, wished: Sequence[int | float]) -> tuple[int, ...]:
    """The sizes that are meant, descending, the whole first: a float is a part, an int a size.

    >>> choices_of("width", 16, [1.0, 0.5, 4, 32])
    (16, 8, 4)
    """
    least = 0 if kind == "depth" else 1
    found = {size}
    for wish in wished:
        if isinstance(wish, float):
            exact = wish * size
            wish = ceil(exact - 1e-9) if kind == "depth" else max(round(exact), 1)
        if least <= wish <= size:
            found.add(int(wish))
    return tuple(sorted(found, reverse=True))


def check_wishes(wishes: Wishes) -> None:
    """Refuse kinds that do not exist and choices that are none.

    Raises:
        ValueError: names what was found and what may be.
    """
    for pattern, values in wishes.items():
        kind = pattern.partition(":")[0]
        if kind not in KINDS:
            raise ValueError(f"{pattern!r} is no 'kind:glob'; {nearest(kind, KINDS)}")
        if not values:
            raise ValueError(f"{pattern}: no choices")
        for value in values:
            part = isinstance(value, float) and not 0 < value <= 1
            if part or value < 0 or (isinstance(value, float) and kind in ("kernel", "bits")):
                raise ValueError(
                    f"{pattern}: {value} is no choice; a float is a part above 0 up to 1, an "
                    "integer a size; kernels and bits are integers"
                )
            odd = kind == "kernel" and value % 2 == 0
            if odd or (kind == "bits" and value != 32 and not 2 <= value <= 16):
                raise ValueError(f"{pattern}: {value} is no choice; kernels are odd, bits 2 to 16 "
                                 "or 32 for floats")  # fmt: skip
