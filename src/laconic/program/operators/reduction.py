"""Reductions: the reduced axes vanish; what is left of them is what is reduced."""

from typing import Any

from torch import fx

from laconic.program.axes import Atom
from laconic.program.equations import Arguments, Dims, Equations, Row


def _reduced(a: Arguments, count: int) -> set[int]:
    asked: Any = a.get("dim")
    if asked is None or asked == []:
        return set(range(count))
    return (
        {dim % count for dim in ([asked] if isinstance(asked, int) else asked)} if count else set()
    )


def reduce(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Any reduction that treats all indices alike."""
    x = see.dims(node.args[0])
    gone = _reduced(a, len(x))
    if a.get("keepdim"):
        return tuple(Atom(1) if place in gone else term for place, term in enumerate(x))
    return tuple(term for place, term in enumerate(x) if place not in gone)


def by_number(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Reductions whose result is an index: the axis stays."""
    x = see.dims(node.args[0])
    see.freeze(node, "the result is an index of it", *(x[d] for d in _reduced(a, len(x))))
    return reduce(see, node, a)


def with_index(see: Equations, node: fx.Node, a: Arguments) -> list[Dims] | Dims:
    """max, min: over everything, of two tensors, or values and indices along one axis."""
    if "other" in a:
        return see.broadcast(node, see.dims(a["self"]), see.dims(a["other"]))
    if "dim" not in a:
        return reduce(see, node, a)
    picks = any(user.args[1] == 1 for user in node.users)  # does anybody read the indices?
    found = by_number(see, node, a) if picks else reduce(see, node, a)
    return [found, found]


def var_mean(see: Equations, node: fx.Node, a: Arguments) -> list[Dims]:
    """Variance and mean."""
    found = reduce(see, node, a)
    return [found, found]


def topk(see: Equations, node: fx.Node, a: Arguments) -> list[Dims]:
    """The largest, or all in order: the axis stays."""
    x = list(see.dims(a["self"]))
    dim = a["dim"] if a["dim"] is not None else -1
    see.freeze(node, "sorted along it", x[dim])
    x[dim] = see.rigid(node, "sorted", node.meta["shape"][0][dim])[0]
    return [tuple(x), tuple(x)]


_REDUCE = (
    "mean sum amax amin prod any all var std norm linalg_vector_norm logsumexp count_nonzero "
    "nansum nanmean square_sum frobenius_norm"
)
ROWS: dict[str, Row] = {f"aten.{name}": reduce for name in _REDUCE.split()} | {
    "aten.argmax": by_number,
    "aten.argmin": by_number,
    "aten.max": with_index,
    "aten.min": with_index,
    "aten.var_mean": var_mean,
    "aten.std_mean": var_mean,
    "aten.topk": topk,
    "aten.sort": topk,
}
