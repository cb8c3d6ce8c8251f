"""Tensors made inside the graph."""

from typing import Any

from torch import fx

from laconic.program.axes import Atom
from laconic.program.equations import Arguments, Dims, Equations, Row
from laconic.program.rewrites import Values


def filled(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """One value everywhere: sizes follow the axes they stand for."""
    shape, sizes = node.meta["shape"], a["size"]
    result: Dims = tuple(
        see.rigid(node, "a size of the inputs", size)[0]
        if isinstance(entry, fx.Node)
        else Atom(size)
        for entry, size in zip(sizes, shape, strict=True)
    )
    see.sizes(node, "size", result)
    return result


def counted(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Values that depend on the position: kept values are stored when the axis shrinks."""
    size = node.meta["shape"][0]
    if any(isinstance(value, fx.Node) for value in (*node.args, *node.kwargs.values())):
        return see.rigid(node, "a size of the inputs", size)
    del a
    axis = Atom(size)
    see.rewrite(Values(node, axis))
    return (axis,)


def fixed(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Values that depend on the position along every axis."""
    del a
    shape: Any = node.meta["shape"]
    return see.rigid(node, "values depend on the position", *shape)


def meshgrid(see: Equations, _: fx.Node, a: Arguments) -> list[Dims]:
    """Every tensor along its own axis."""
    axes = [(*see.dims(tensor), Atom(1))[0] for tensor in a["tensors"]]
    if a.get("indexing") == "xy":
        axes[:2] = axes[:2][::-1]
    return [tuple(axes)] * len(axes)


_FILLED = "full zeros ones empty new_full new_zeros new_ones new_empty"
ROWS: dict[str, Row] = {f"aten.{name}": filled for name in _FILLED.split()}
ROWS.update({f"aten.{name}": counted for name in ("arange", "linspace", "logspace")})
ROWS.update(
    {f"aten.{name}": fixed for name in ("eye", "scalar_tensor", "randn", "rand", "tril_indices")}
)
ROWS.update({"aten.meshgrid": meshgrid})
