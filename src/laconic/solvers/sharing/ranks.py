"""Ranks for many layers: the options that are cheaper than a layer, and which of them to take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor

from laconic.core.errors import BudgetError
from laconic.solvers.search import knapsack
from laconic.solvers.sharing import low_rank
from laconic.solvers.sharing.low_rank import Kind, Shape

Of = Literal["macs", "parameters"]
Scope = Literal["global", "layer"]
_STEPS = 64  # a layer has about so many options
_FITS = 6  # ranks at which cp is fitted to learn its error


@dataclass(frozen=True)
class Option:
    """A layer's ranks, () for the layer left whole; what that costs, and what it loses.

    `harm` is the part of the energy of the layer's output that is lost, 0 to 1 and some.
    """

    ranks: tuple[int, ...]
    macs: int
    params: int
    harm: float

    def cost(self, of: Of) -> int:
        """Multiply-adds per sample, or weights."""
        return self.macs if of == "macs" else self.params


def whole(shape: Shape) -> Option:
    """The layer as it is."""
    return Option((), shape.macs, shape.params, 0.0)


def held(kind: Kind, shape: Shape, ranks: Sequence[int]) -> tuple[int, ...]:
    """Ranks no larger than the weight can have."""
    taps = prod(shape.kernel)
    if kind == "cp":
        return tuple(ranks)
    if kind == "tucker2":
        inner = min(ranks[0], shape.into, shape.out * taps)
        return inner, min(ranks[1], shape.out, shape.into * taps)
    if kind == "channel":
        return (min(ranks[0], shape.out, shape.into * taps),)
    return (min(ranks[0], shape.into * shape.kernel[0], shape.out * shape.kernel[1]),)


def options(
    kind: Kind, shape: Shape, weight: Tensor, moment: Tensor | None, rows: Tensor | None
) -> list[Option]:
    """Those cheaper than the layer in multiply-adds and in weights, the costliest first.

    Args: as of `low_rank.decompose`.
    """
    if kind == "cp":
        return _by_fits(shape, weight, moment, rows)
    spectra = low_rank.spectra(kind, weight, moment, rows)
    lost = [_lost(spectrum) for spectrum in spectra]
    path = [(r,) for r in range(len(lost[0]) - 1, 0, -1)] if len(lost) == 1 else _path(shape, lost)
    found: list[Option] = []
    for ranks in path:
        macs, params = low_rank.cost(kind, shape, ranks)
        if macs < shape.macs and params < shape.params:
            harm = sum(float(rest[rank]) for rest, rank in zip(lost, ranks, strict=True))
            found.append(Option(ranks, macs, params, harm))
    step = max(1, len(found) // _STEPS)
    return found[::-1][::step][::-1]  # the smallest one stays


def take(
    layers: Mapping[str, Sequence[Option]],
    *,
    energy: float | None,
    ratio: float,
    of: Of,
    scope: Scope,
    total: int,
) -> dict[str, Option]:
    """What each layer gets; the first option of each is the layer left whole.

    Args:
        layers: name → options.
        energy: part of each layer's energy that stays; None goes by `ratio`.
        ratio: part of the cost that is to go: of `total`, or of each layer with scope "layer".
        of: the cost.
        scope: "global" is a knapsack over all layers.
        total: cost of the whole program.

    Raises:
        BudgetError: the ratio cannot be reached; says how far it can go, and what is in the way.
    """
    if energy is not None:
        return {name: _within(found, 1 - energy, of) for name, found in layers.items()}
    if scope == "layer":
        made = {
            name: _below(found, (1 - ratio) * found[0].cost(of), of)
            for name, found in layers.items()
        }
        if ratio and all(option is layers[name][0] for name, option in made.items()):
            raise _too_much_of_each(layers, ratio, of)
        return made
    held = list(layers.values())
    rest = total - sum(found[0].cost(of) for found in held)
    items = [[(option.cost(of), option.harm) for option in found] for found in held]
    places = knapsack.choose(items, (1 - ratio) * total - rest)
    if places is None:
        raise _too_much(layers, ratio, of, total, rest)
    return {name: found[i] for (name, found), i in zip(layers.items(), places, strict=True)}


def _lost(spectrum: Tensor) -> Tensor:
    """`[n + 1]`: part of the energy that is lost at rank 0, 1, …, n."""
    rest = spectrum.flip(0).cumsum(0).flip(0)
    return torch.cat([rest, rest.new_zeros(1)]) / rest[0].clamp(min=1e-300)


def _path(shape: Shape, lost: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Pairs of ranks from full to (1, 1): the next to fall is the one that loses least for it."""
    ranks = [len(rest) - 1 for rest in lost]
    path: list[tuple[int, ...]] = []
    while max(ranks) > 1:
        now = low_rank.cost("tucker2", shape, ranks)[0]
        rates: list[float] = []
        for mode in (0, 1):
            fewer = [rank - (place == mode) for place, rank in enumerate(ranks)]
            saved = now - low_rank.cost("tucker2", shape, fewer)[0]
            more = float(lost[mode][fewer[mode]] - lost[mode][ranks[mode]])
            rates.append(more / saved if fewer[mode] else torch.inf)
        ranks[rates.index(min(rates))] -= 1
        path.append((ranks[0], ranks[1]))
    return path


def _by_fits(
    shape: Shape, weight: Tensor, moment: Tensor | None, rows: Tensor | None
) -> list[Option]:
    """Options of cp: fitted at a few ranks; those that do not settle are none."""
    base = low_rank.cost("cp", shape, (1,))
    largest = min((shape.macs - 1) // base[0], (shape.params - 1) // base[1])
    ranks = sorted({ceil(largest * (i + 1) / _FITS) for i in range(_FITS)} if largest else ())
    found: list[Option] = []
    scale = 1.0 if rows is None else rows[:, None]
    matrix = weight.flatten(1)
    for rank in reversed(ranks):
        factors = low_rank.decompose("cp", weight, (rank,), moment, rows)
        if factors is None:
            continue
        parts = scale * matrix, scale * (matrix - low_rank.product("cp", factors))
        energies = [
            float((part.square() if moment is None else (part @ moment) * part).sum())
            for part in parts
        ]
        found.append(Option((rank,), base[0] * rank, base[1] * rank, energies[1] / energies[0]))
    return found


def _within(found: Sequence[Option], lost: float, of: Of) -> Option:
    """The cheapest option that loses at most so much."""
    return min((o for o in found if o.harm <= lost), key=lambda o: o.cost(of))


def _below(found: Sequence[Option], cost: float, of: Of) -> Option:
    """The least harmful option at that cost or less; whole where there is none."""
    return min((o for o in found if o.cost(of) <= cost), key=lambda o: o.harm, default=found[0])


def furthest(found: Sequence[Option], of: Of) -> float:
    """Largest part of a layer's cost that can go."""
    return 1 - min(option.cost(of) for option in found) / found[0].cost(of)


def _too_much_of_each(layers: Mapping[str, Sequence[Option]], ratio: float, of: Of) -> BudgetError:
    best = max(layers, key=lambda name: furthest(layers[name], of))
    return BudgetError(
        f"{of} of this layer can fall by {furthest(layers[best], of):.1%} at most, and of no other "
        f"one further, but {ratio:.1%} of each was asked for",
        where=best,
        hint="ask for less, or select other sites",
    )


def _too_much(
    layers: Mapping[str, Sequence[Option]], ratio: float, of: Of, total: int, rest: int
) -> BudgetError:
    least = {name: min(o.cost(of) for o in found) for name, found in layers.items()}
    lowest = rest + sum(least.values())
    worst = max(least, key=lambda name: least[name], default=None)
    return BudgetError(
        f"{of} can fall by {1 - lowest / total:.1%} at most, from {total:,} to {lowest:,}, "
        f"but {ratio:.1%} was asked for",
        where=worst,
        hint="of the layers chosen this one holds most of what is left: ask for less or select more"
        if worst
        else "no layer can be replaced by cheaper ones: select other sites",
    )
