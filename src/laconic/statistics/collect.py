"""One calibration pass for everybody: run the data once, feed every statistic asked for."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx

from laconic.core.errors import DataError, LaconicError, RecipeError
from laconic.core.progress import SILENT, Progress
from laconic.core.suggest import nearest
from laconic.program.program import Program
from laconic.statistics.base import Statistic
from laconic.statistics.batches import padding_mask
from laconic.statistics.walk import Order, Walk

Key = TypeVar("Key", bound=Hashable)
Request = tuple[str, str, Statistic]


@torch.no_grad()
def collect(
    program: Program,
    batches: Iterable[Sequence[Tensor]],
    requests: Mapping[Key, Request],
    progress: Progress = SILENT,
    *,
    total: int | None = None,
) -> dict[Key, Statistic]:
    """Fill statistics from one pass over `batches`; each batch stops after the last node needed.

    Where an input is an attention mask, values at padded places are left out of statistics of all
    values together or of the last dimension: nobody reads them, and a network that was trained on
    has anything there.

    Args:
        program: run in eval mode whatever its mode is; left as it was.
        batches: flat inputs in placeholder order (`statistics.batches.Batches` makes them).
        requests: key → (node name, "output" or "input 0", "input 1", …, statistic). "input i" is
            argument `i` of the node, a tensor.
        progress: moved on by one for each batch.
        total: how many batches there are, for the progress.

    Returns:
        key → the statistic that was given, filled.

    Raises:
        RecipeError: no such node or place.
        DataError: no batch came, or a value is NaN or infinite; names the node.
    """
    program = program.clone() if program.training else program
    order = Order(program)
    wanted = _by_node(program, requests)
    batch = None
    for batch in progress.track(batches, "collecting statistics", total):
        walk, real = Walk(program, batch, order), padding_mask(program, batch)
        for node, entries in sorted(wanted.items(), key=lambda item: order.place[item[0]]):
            walk.run(order.place[node])
            for place, statistic in entries:
                if place is not None:
                    value = walk.input(node, place)
                    _feed(statistic, value, real, node, f"input {place}")
            walk.run(order.place[node] + 1, hold=[node])
            for place, statistic in entries:
                if place is None:
                    _feed(statistic, walk.values[node], real, node, "output")
    if batch is None and wanted:
        raise DataError("there was no batch to collect statistics from", where="calibration")
    return {key: statistic for key, (_, _, statistic) in requests.items()}


def _by_node(
    program: Program, requests: Mapping[Key, Request]
) -> dict[fx.Node, list[tuple[int | None, Statistic]]]:
    nodes = {node.name: node for node in program.graph.nodes}
    found: dict[fx.Node, list[tuple[int | None, Statistic]]] = {}
    for name, place, statistic in requests.values():
        if name not in nodes:
            raise RecipeError(f"no node named {name!r}", hint=nearest(name, nodes))
        node = nodes[name]
        found.setdefault(node, []).append((_place(node, place), statistic))
    return found


def _place(node: fx.Node, place: str) -> int | None:
    if place == "output":
        return None
    word, _, number = place.partition(" ")
    if word != "input" or not number.isdigit() or int(number) >= len(node.args):
        raise RecipeError(
            f"{place!r} is neither 'output' nor 'input 0' to 'input {len(node.args) - 1}'",
            where=node.name,
        )
    return int(number)


def _feed(
    statistic: Statistic, value: object, real: Tensor | None, node: fx.Node, place: str
) -> None:
    where = f"{node.name} {place} ({node.meta.get('origin') or 'top level'})"
    if not isinstance(value, Tensor):
        raise DataError(f"found {type(value).__name__}, expected a tensor", where=where)
    if real is not None and getattr(statistic, "axis", 0) in (None, -1):
        value = _unpadded(value, real)
    try:
        statistic.update(value)
    except LaconicError as error:
        raise DataError(error.message, where=where, hint=error.hint) from error


def _unpadded(value: Tensor, real: Tensor) -> Tensor:
    """Real tokens of `[batch, tokens, ...]` or `[batch, heads, tokens, size]`: `[real, ...]`.

    A value of another shape is given back as it is.
    """
    if value.ndim >= 3 and value.shape[:2] == real.shape:
        return value[real.to(value.device)]
    if value.ndim == 4 and (value.shape[0], value.shape[2]) == tuple(real.shape):
        return value.transpose(1, 2)[real.to(value.device)]
    return value
