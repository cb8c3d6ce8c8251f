"""Heads of exits that are the rest of the network with fewer of its layers.

Behind its place a head goes on as the network does, with the network's own weights to begin with;
whole residual layers are left out until it is as cheap as it has to be. That they fit together is
what residual networks are (Veit et al. 2016, arXiv 1605.06431); a student that begins so learns
faster than one from nothing (Sanh et al. 2019, "DistilBERT", 1910.01108).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from laconic.core.errors import RecipeError
from laconic.program.capture import capture
from laconic.program.program import Program
from laconic.solvers.dynamic.exits import Heads, Place, Work
from laconic.solvers.layers import depth
from laconic.solvers.layers.grafting import between, graft


def tails(program: Program, found: Sequence[Place], budget: float) -> Heads:
    """A shorter rest of the network for each place, as many multiply-adds as `budget` at most.

    Args:
        program: the network, shapes propagated; stays as it is.
        found: the places.
        budget: multiply-adds per sample that a head may take.

    Raises:
        RecipeError: what cannot be left out behind a place takes more than that.
    """
    rests = [shortened(program, place, budget) for place in found]
    values = {node.name: node.meta for node in program.graph.nodes}
    inputs = [
        node.name
        for node in program.placeholders
        if any(node.name in _read(rest, place) for rest, place in zip(rests, found, strict=True))
    ]
    sources = (*(place.node for place in found), *inputs)
    made = _empty([_example(values[name]) for name in sources], len(found))
    ends: list[fx.Node] = []
    for number, (rest, place) in enumerate(zip(rests, found, strict=True)):
        by_name = {node.name: node for node in rest.graph.nodes}
        held = dict(zip(sources, made.placeholders, strict=True))
        stands = {by_name[name]: held[name] for name in (place.node, *inputs)}
        ends += graft(made, rest, stands, f"exits.{number}.")
    made.output_node.args = (tuple(ends),)
    made.graph.eliminate_dead_code()
    made.drop_unused()
    made.recompile()
    made.propagate()
    return Heads(made, sources)


def shortened(program: Program, place: Place, budget: float) -> Program:
    """A copy in which layers behind a place are left out, so that chains become equally short.

    Raises:
        RecipeError: what cannot be left out takes more than `budget` multiply-adds.
    """
    made = program.clone()
    made.propagate()
    work = Work(made)
    order = {node: number for number, node in enumerate(made.graph.nodes)}
    here = next(number for node, number in order.items() if node.name == place.node)
    found = depth.chains(made)
    chains = [[x for x in chain if order[x.branches[0].total] > here] for chain in found]
    price = {
        layer.name: sum(work.macs.get(n.name, 0) for b in layer.branches for n in b.inner)
        for chain in chains for layer in chain
    }  # fmt: skip
    left = budget - (work.total * (1 - place.share) - sum(price.values()))
    if left < 0:
        raise RecipeError(
            f"behind {place.name} {(budget - left) / work.total:.3f} of the network's "
            "multiply-adds cannot be left out: they are in no residual layer",
            where="size",
            hint=f"found {budget / work.total:g}; take more, or head: new",
        )
    prices = [[price[layer.name] for layer in chain] for chain in chains]
    counts = _counts(prices, [len(chain) for chain in found], left)
    kept = {
        chain[at].name
        for chain, count in zip(chains, counts, strict=True)
        for at in depth.places(count, len(chain), "even")
    }
    before = {layer.name for chain in found for layer in chain} - set(price)
    depth.keep_only(made, found, [*before, *kept])
    return made


def _counts(prices: Sequence[Sequence[float]], lengths: Sequence[int], left: float) -> list[int]:
    """How many layers behind the place each chain keeps, one more at a time.

    The chain of which the smallest part stays is next, layers in front of the place counted; of
    equals the last, whose features are nearest to the answer.
    """
    counts = [0] * len(prices)
    able = {number for number, chain in enumerate(prices) if chain}
    while able:
        gone = {number: len(prices[number]) - counts[number] for number in able}
        number = max(able, key=lambda n: (gone[n] / lengths[n], n))
        price = max(prices[number])
        if price <= left and gone[number]:
            left -= price
            counts[number] += 1
        else:
            able.remove(number)
    return counts


def _read(rest: Program, place: Place) -> set[str]:
    """Names of the placeholders that the rest behind a place reads by itself."""
    first = [node for node in rest.graph.nodes if node.name == place.node]
    needed = between(first, rest.output_node.all_input_nodes)
    return {node.name for node in needed if node.op == "placeholder"}


def _example(meta: dict[str, object]) -> Tensor:
    shape, dtype = meta["shape"], meta["dtype"]
    assert isinstance(shape, tuple)
    assert isinstance(dtype, torch.dtype)
    return torch.zeros(shape, dtype=dtype)


class _Empty(nn.Module):
    """Reads everything, to give something for each exit."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read = sum((value.flatten(1).float().sum(1) for value in values), torch.zeros(()))
        return tuple(read + number for number in range(self.count))


def _empty(values: Sequence[Tensor], count: int) -> Program:
    """A Program with the right arguments and outputs, and nothing in between that matters."""
    return capture(_Empty(count).eval(), (tuple(values),))
